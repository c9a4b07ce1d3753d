"""The decoder-only transformer: each token looks back at those before it, and the next one is foretold.

    tokens (B, T) ─ embed ─ [ x + attention(norm x) ─ x + feed-forward(norm x) ] × layers ─ norm ─ · embedᵀ ─ logits (B, T, V)

Places are marked by turning queries and keys (rotary): a score depends on how far two tokens lie apart, not on where they stand.
While text is written, keys and values of earlier tokens stay in a cache of fixed size.
Source: Radford et al. 2019; Su et al. 2021, arXiv 2104.09864 (rotary); Zhang & Sennrich 2019, arXiv 1910.07467 (RMSNorm);
So et al. 2021, arXiv 2109.08668 (squared ReLU); Press & Wolf 2017, arXiv 1608.05859 (one matrix for input and output).
"""

from typing import ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.config import NetConfig, Port
from cloche.nets.attention import Carry, attend, attention_weights, check_heads, merge_heads, split_heads
from cloche.nets.parts import Dropout, Tied
from cloche.words import _


class GptConfig(NetConfig):
    kind: Literal["gpt"] = "gpt"
    width: int = Field(192, ge=2, description=_("numbers that stand for one token"))
    layers: int = Field(4, ge=1, le=200, description=_("blocks on top of one another"))
    heads: int = Field(4, ge=1, description=_("how many places a token can look at at once"))
    dropout: float = Field(0.0, ge=0, lt=1, description=_("share of values zeroed in what each block adds, while training"))

    faces: ClassVar = ("continues",)

    def build(self, inputs: Port, outputs: Port, face: str) -> "Gpt":
        """Its context is the length of the rows that it is trained on."""
        check_heads(self.width, self.heads, 2)
        return Gpt(inputs.size, inputs.shape[0] or 0, self)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, Dropout(dropout)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        for last in (self.out, self.down):  # at first a block adds nothing, which trains without a long warm-up
            nn.init.zeros_(last.weight)

    def look(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D), the first two turned by their places."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        return turned(q, turn), turned(k, turn), v

    def add(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.drop(self.out(merge_heads(seen)))  # (B, T, C)
        return x + self.drop(self.down(F.relu(self.up(self.norm2(x))).square()))


class Gpt(nn.Module):
    """context: tokens that it was trained to look back over, 0 for no limit."""

    head = None  # the embedding

    def __init__(self, vocabulary: int, context: int, config: GptConfig) -> None:
        super().__init__()
        self.context, self.head_width = context, config.width // config.heads
        self.embed, self.drop = Tied(vocabulary, config.width), Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def start(self, rows: int, limit: int) -> dict[str, Tensor]:
        """Room for the keys and values of `limit` tokens, in the format that they will come in."""
        w, device = self.embed.weight, self.embed.weight.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w.dtype
        room = w.new_zeros(rows, len(self.blocks), self.blocks[0].heads, limit, self.head_width, dtype=kind)
        return {"k": room, "v": room.clone(), "length": torch.zeros(rows, dtype=torch.int64, device=w.device)}

    def forward(self, tokens: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """With a carry: the tokens that follow those it has seen. Its room is written into; what comes back counts them."""
        x = self.drop(self.embed(tokens))  # (B, T, C)
        at = torch.arange(tokens.shape[1], device=x.device)[None] + (0 if carry is None else carry["length"][:, None])  # (1 or B, T)
        turn, seen = rotation(at, self.head_width), None
        if carry is not None:
            seen = torch.arange(carry["k"].shape[3], device=x.device) <= at[:, None, :, None]  # (B, 1, T, limit)
        for i, block in enumerate(self.blocks):
            q, k, v = block.look(x, turn)
            if carry is not None:
                place = at[:, None, :, None].expand_as(k)
                k, v = (carry[name][:, i].scatter_(2, place, new) for name, new in (("k", k), ("v", v)))  # (B, H, limit, D)
            x = block.add(x, attend(q, k, v, seen, causal=carry is None))
        return self.embed.logits(self.norm(x)), carry and {**carry, "length": carry["length"] + tokens.shape[1]}

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, layers, H, T, T): how much each token looks at each one up to itself."""
        x, out = self.embed(tokens), []
        turn = rotation(torch.arange(tokens.shape[1], device=x.device)[None], self.head_width)
        for block in self.blocks:
            q, k, v = block.look(x, turn)
            out.append(attention_weights(q, k, causal=True))
            x = block.add(x, out[-1] @ v)
        return torch.stack(out, 1)


def rotation(at: Tensor, width: int) -> Tensor:
    """(B, T) places → (2, B, 1, T, D/2) cos and sin of place · 10000^(−2i/D) (section 3.4.2)."""
    angle = at[..., None] * 10000.0 ** (-torch.arange(0, width, 2, device=at.device) / width)
    return torch.stack([angle.cos(), angle.sin()])[:, :, None]


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """(B, H, T, D): number i and number i + D/2 as a point of the plane, turned by its angle."""
    (a, b), (cos, sin) = x.chunk(2, -1), turn  # in float32 or more: rounded to bf16, a score would hang on the place
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
