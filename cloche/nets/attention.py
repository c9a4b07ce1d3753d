"""Attention as functions, and the layer that looks with several heads: what every transformer of the house shares.

    x (B, T, C) ─ q ─┐
    memory ─ k, v ───┴─ softmax(q·kᵀ / √D) · v, each head for itself ─ out ─ y (B, T, C)

Source: Vaswani et al. 2017, "Attention is all you need", arXiv 1706.03762, section 3.2 and 3.5.
"""

import math

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.words import _

Memory = tuple[Tensor, Tensor]  # (B, S, C) and (B, S) bool, True where a token stands
Carry = dict[str, Tensor] | None
SCORES = 1 << 26  # numbers that attention may hold for its backward pass, 128 MB
FEW = 32


def check_heads(width: int, heads: int, each: int = 1) -> None:
    """Raises: ValueError when the heads do not cut the width into parts of a multiple of `each`."""
    if width % (each * heads):
        fit = ", ".join(str(n) for n in range(1, width + 1) if width % (each * n) == 0) or _("an even width")
        raise ValueError(_("net.heads = {heads} does not fit net.width = {width}. Choose {fit}").format(heads=heads, width=width, fit=fit))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, T, C) → (B, H, T, D)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) → (B, T, C)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q·kᵀ / √D) · v, (B, H, T, D), by torch's fused kernel; nothing is promised of a row that may look nowhere.

    On a CPU that kernel is slow in bfloat16, for one query and for few keys: written out, forward and backward over 12 · 6 heads and 256
    places take 17 ms on one core, not 52. But the scores have to be held, so for many of them it is the kernel nevertheless.

    Args: q: (B, H, T, D). k, v: (B, H, S, D). mask: bool, True where may be looked: (B, S), or what broadcasts to (B, H, T, S).
        causal: place t looks at places 0 … t.
    """
    slow = q.shape[2] == 1 or k.shape[2] < FEW or q.dtype == torch.bfloat16
    if q.device.type == "cpu" and slow and q.numel() // q.shape[3] * k.shape[2] <= SCORES:
        return attention_weights(q, k, mask, causal and q.shape[2] > 1) @ v
    seen = _seen(q, k, mask, causal) if mask is not None else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal and seen is None)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """How much place t of each head looks at place s, written out, for pictures; arguments as `attend`. Returns: (B, H, T, S)."""
    seen, few = _seen(q, k, mask, causal), k.shape[2] < FEW <= q.shape[2]
    a, b = (k, q) if few else (q, k)  # a softmax along few numbers is slow: then across them
    scores = a / math.sqrt(q.shape[-1]) @ b.transpose(-1, -2)  # (B, H, T, S), or (B, H, S, T)
    if seen is not None:
        bias = torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, -math.inf)
        scores = scores + (bias.transpose(-1, -2) if few else bias)  # a third faster than filling them
    return scores.softmax(-2).transpose(-1, -2) if few else scores.softmax(-1)


def _seen(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Both limits as one mask that broadcasts to (B, H, T, S)."""
    mask = mask[:, None, None] if mask is not None and mask.ndim == 2 else mask  # (B, 1, 1, S)
    if not causal:
        return mask
    past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()  # (T, S)
    return past if mask is None else past & mask


def sinusoid(n: int, width: int, device: torch.device | None = None) -> Tensor:
    """(n, C) float32: sin and cos of place · 10000^(−2i/C) in turn, so that each place has a mark of its own (section 3.5)."""
    place, even = torch.arange(n, device=device).float(), torch.arange(0, width, 2, device=device)
    angle = place[:, None] * 10000.0 ** (-even / width)  # (n, C/2)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]


class MultiHead(nn.Module):
    """(B, T, C) looks at (B, S, C) with several heads; equal to torch.nn.MultiheadAttention with the same weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def kv(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C) → keys and values (B, H, S, D): made once, looked at often."""
        return split_heads(self.k(memory), self.heads), split_heads(self.v(memory), self.heads)

    def look(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.out(merge_heads(attend(split_heads(self.q(x), self.heads), *kv, mask, causal)))  # (B, T, C)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.look(x, self.kv(memory), mask, causal)
