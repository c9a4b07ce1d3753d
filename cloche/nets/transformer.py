"""The encoder–decoder transformer: one half reads the source, the other writes the target, looking at what was read.

    source (B, S) ─ embed + place ─ [look at the source ─ feed] … ─ norm ─ memory (B, S, C) ─┐
    target (B, U) ─ embed + place ─ [look at the past ─ look at the memory ─ feed] … ─ norm ─┴─ head ─ logits (B, U, V)

Each […] adds to its input what it makes of the normed input: x + f(norm(x)), which trains without a long warm-up.
Source: Vaswani et al. 2017, "Attention is all you need", arXiv 1706.03762; the place of the norm: Xiong et al. 2020, arXiv 2002.04745.
"""

from typing import ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.config import NetConfig, Port
from cloche.nets.attention import Carry, Memory, MultiHead, attention_weights, check_heads, sinusoid, split_heads
from cloche.nets.parts import Dropout
from cloche.words import _


class TransformerConfig(NetConfig):
    kind: Literal["transformer"] = "transformer"
    width: int = Field(128, ge=2, description=_("numbers that stand for one token"))
    layers: int = Field(2, ge=1, le=200, description=_("blocks of the encoder, and of the decoder"))
    heads: int = Field(4, ge=1, description=_("how many places a token can look at at once"))
    dropout: float = Field(0.1, ge=0, lt=1, description=_("share of values zeroed in what each block adds, while training"))

    faces: ClassVar = ("pairs",)

    def build(self, inputs: Port, outputs: Port, face: str) -> "Transformer":
        check_heads(self.width, self.heads)
        return Transformer(inputs.size, outputs.size, self)


class Layer(nn.Module):
    """One block: look at the own sequence, then, in a decoder, at the memory, then feed each place for itself."""

    def __init__(self, width: int, heads: int, dropout: float, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.norm3, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), Dropout(dropout)
        self.own, self.up, self.down = MultiHead(width, heads), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if decoder:
            self.norm2, self.cross = nn.LayerNorm(width), MultiHead(width, heads)

    def look(self, x: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """cache: keys and values so far (B, 2, H, limit, D), which the new ones are written into, and the places (B, T) where."""
        y = self.norm1(x)
        kv = self.own.kv(y)
        if cache is not None:
            new = torch.stack(kv, 1)  # (B, 2, H, T, D)
            kv = cache[0].scatter_(3, cache[1][:, None, None, :, None].expand_as(new), new).unbind(1)
        return x + self.drop(self.own.look(y, kv, mask))

    def read(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        return x + self.drop(self.cross.look(self.norm2(x), kv, mask))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.drop(F.relu(self.up(self.norm3(x))))))


class Transformer(nn.Module):
    """source (B, S), target (B, U) → logits (B, U, V); position u of the target sees the places 0 … u of it."""

    def __init__(self, sources: int, targets: int, config: TransformerConfig) -> None:
        super().__init__()
        w = self.width = config.width
        self.embed_source, self.embed_target, self.head = nn.Embedding(sources, w), nn.Embedding(targets, w), nn.Linear(w, targets)
        halves = ([Layer(w, config.heads, config.dropout, decoder) for _ in range(config.layers)] for decoder in (False, True))
        self.encoder, self.decoder = map(nn.ModuleList, halves)
        self.norm_source, self.norm_target, self.drop = nn.LayerNorm(w), nn.LayerNorm(w), Dropout(config.dropout)

    def encode(self, source: Tensor, source_len: Tensor) -> Memory:
        x, marks = self.embed_source(source), sinusoid(source.shape[1], self.width, source.device)  # (B, S, C), (S, C)
        mask = torch.arange(source.shape[1], device=source.device) < source_len[:, None]  # (B, S)
        return self.read(x + marks.to(x.dtype), mask), mask

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        """The encoder without knowledge of places: source tokens as numbers (B, S, C) → (B, S, C)."""
        x = self.drop(x)
        for layer in self.encoder:
            x = layer.feed(layer.look(x, mask))
        return self.norm_source(x)

    def start(self, rows: int, limit: int, memory: Memory) -> dict[str, Tensor]:
        """Room for the keys and values of `limit` tokens, and those of the memory, made once."""
        read = torch.stack([torch.stack(layer.cross.kv(memory[0]), 1) for layer in self.decoder], 1)  # (B, layers, 2, H, S, D)
        room = read.new_zeros(*read.shape[:4], limit, read.shape[5])
        return {"own": room, "read": read, "length": torch.zeros(rows, dtype=torch.int64, device=room.device)}

    def decode(self, target: Tensor, memory: Memory, carry: Carry = None) -> tuple[Tensor, Carry]:
        """With a carry: the tokens that follow those it has seen. Its room is written into; what comes back counts them."""
        x, _before = self._blocks(target, memory, carry)
        return self.head(self.norm_target(x)), carry and {**carry, "length": carry["length"] + target.shape[1]}

    def _blocks(self, target: Tensor, memory: Memory, carry: Carry) -> tuple[Tensor, list[Tensor]]:
        """(B, U, C) after the last block, and what each block looks at the memory with."""
        x, before, limit = self.embed_target(target), [], target.shape[1] if carry is None else carry["own"].shape[4]  # (B, U, C)
        at = torch.arange(target.shape[1], device=x.device)[None] + (0 if carry is None else carry["length"][:, None])  # (1 or B, U)
        mask = torch.arange(limit, device=x.device) <= at[:, None, :, None]  # (1 or B, 1, U, limit): the past
        x = self.drop(x + sinusoid(limit, self.width, x.device).to(x.dtype)[at])
        for i, layer in enumerate(self.decoder):
            kv = layer.cross.kv(memory[0]) if carry is None else carry["read"][:, i].unbind(1)  # (B, H, S, D) each
            x = layer.look(x, mask, None if carry is None else (carry["own"][:, i], at))
            before.append(x)
            x = layer.feed(layer.read(x, kv, memory[1]))
        return x, before

    def attention(self, source: Tensor, source_len: Tensor, target: Tensor) -> Tensor:
        """(B, layers, H, U, S): how much each target token looks at each source token."""
        memory = self.encode(source, source_len)
        blocks = zip(self.decoder, self._blocks(target, memory, None)[1], strict=True)
        looks = [(split_heads(layer.cross.q(layer.norm2(x)), layer.cross.heads), layer.cross.kv(memory[0])[0]) for layer, x in blocks]
        return torch.stack([attention_weights(q, k, memory[1]) for q, k in looks], 1)

    def forward(self, source: Tensor, source_len: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, self.encode(source, source_len))[0]
