"""Recurrent encoder and decoder with attention: what the source says is looked up anew for every token of the target.

    source (B, S) ─ embed ─ GRU both ways ──────── memory (B, S, C) ──────────────┐
    target (B, U) ─ embed ─ GRU ─ state s (B, U, C) ─ softmax(s·W·memoryᵀ)·memory ┴─ GRU reads [s; found] ─ logits (B, U, V)

The decoder begins where the encoder that reads from the end has stopped. The first GRU asks, the second remembers what was found, so that
in training all places of a target are decoded at once.
Source: Bahdanau et al. 2015, arXiv 1409.0473 (the encoder and the first state); Luong et al. 2015, arXiv 1508.04025, equations 7 and 8
"general" (the attention); a second GRU in place of their input feeding, which would decode place after place.
"""

from typing import ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor, nn

from cloche.config import NetConfig, Port
from cloche.nets.attention import Memory
from cloche.nets.parts import Dropout, Tied
from cloche.nets.rnn import Carry, Cells
from cloche.words import _


class Seq2seqConfig(NetConfig):
    kind: Literal["seq2seq"] = "seq2seq"
    width: int = Field(256, ge=1, description=_("numbers in a state and in a token's row"))
    dropout: float = Field(0.1, ge=0, lt=1, description=_("share of values zeroed after embeddings and before the output while training"))

    faces: ClassVar = ("pairs",)

    def build(self, inputs: Port, outputs: Port, face: str) -> "Seq2seq":
        return Seq2seq(inputs.size, outputs.size, self.width, self.dropout)


class Seq2seq(nn.Module):
    context = 0  # no limit
    head = None  # the embedding

    def __init__(self, sources: int, targets: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed_source, self.embed_target = nn.Embedding(sources, width), Tied(targets, width)
        self.encoder, self.decoder = Cells("gru", width, (width + 1) // 2, both=True), Cells("gru", width, width)
        self.begin, self.key = nn.Linear(self.encoder.out, width), nn.Linear(self.encoder.out, width, bias=False)
        self.writer, self.bias = Cells("gru", width + self.encoder.out, width), nn.Parameter(torch.zeros(targets))
        self.drop = Dropout(dropout)
        nn.init.normal_(self.embed_target.weight, std=width**-0.5)  # also the rows of the output

    def encode(self, source: Tensor, source_len: Tensor) -> Memory:
        real = torch.arange(source.shape[1], device=source.device) < source_len[:, None]  # (B, S)
        y, _carry = self.encoder(self.drop(self.embed_source(source)), source_len)  # (B, S, C)
        return y.masked_fill(~real[..., None], 0), real

    def start(self, rows: int, limit: int, memory: Memory) -> dict[str, Tensor]:
        h = torch.tanh(self.begin(memory[0][:, :1]))  # (B, 1, C), of the place where the encoder from the end has read all
        return {"h": h, "written": torch.zeros_like(h)}

    def decode(self, target: Tensor, memory: Memory, carry: Carry = None) -> tuple[Tensor, dict[str, Tensor]]:
        carry = carry or self.start(len(target), 0, memory)
        state, weights, asked = self._look(target, memory, carry)
        y, written = self.writer(torch.cat([state, weights @ memory[0]], 2), carry={"h": carry["written"]})  # (B, U, C)
        return self.embed_target.logits(self.drop(y), self.bias), {**asked, "written": written["h"]}

    def _look(self, target: Tensor, memory: Memory, carry: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The decoder's states (B, U, C) and how much each looks at each place of the source (B, U, S)."""
        state, carry = self.decoder(self.drop(self.embed_target(target) * self.decoder.width**0.5), carry=carry)
        scores = state @ self.key(memory[0]).transpose(1, 2)  # (B, U, S)
        return state, scores.masked_fill(~memory[1][:, None], -1e9).softmax(2), carry

    def forward(self, source: Tensor, source_len: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, self.encode(source, source_len))[0]

    def attention(self, source: Tensor, source_len: Tensor, target: Tensor) -> Tensor:
        """(B, 1, 1, U, S): one layer, one head."""
        memory = self.encode(source, source_len)
        return self._look(target, memory, self.start(len(target), 0, memory))[1][:, None, None]
