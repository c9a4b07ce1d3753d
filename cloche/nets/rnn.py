"""Recurrent networks: a state that each step of time reads and rewrites, by the plain cell, the LSTM or the GRU.

    x₁        x₂              x_T            rnn    h' = tanh(a + r)
    ↓         ↓               ↓              lstm   c' = forget · c + input · candidate,   h' = output · tanh c'
    cell ─h─→ cell ─h─→ … ─→ cell ─→ head    gru    h' = (1 − update) · candidate + update · h
    a = W·x + b is what the step reads, r = U·h + d what it remembers; every gate is a sigmoid of its own a + r.

Through the plain cell a gradient is multiplied by U and tanh' at every step and fades; an open gate of the others hands it on.
Source: Elman 1990; Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; Cho et al. 2014, arXiv 1406.1078.
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.config import NetConfig, Port
from cloche.nets.parts import Dropout, Tied
from cloche.words import _

Gates = dict[str, Tensor]
Carry = dict[str, Tensor] | None
CORES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RnnConfig(NetConfig):
    kind: Literal["rnn", "lstm", "gru"]
    width: int = Field(128, ge=1, description=_("numbers in the state of a layer"))
    layers: int = Field(1, ge=1, le=64, description=_("cells on top of one another"))
    both: bool = Field(False, description=_("a second set of cells reads from the end; not for text that goes on"))
    dropout: float = Field(0.0, ge=0, lt=1, description=_("share of values zeroed between layers and before the output while training"))
    stack: int = Field(1, ge=1, le=64, description=_("frames of sound that one step reads"))

    faces: ClassVar = ("maps", "streams", "continues")
    carries: ClassVar = True

    def build(self, inputs: Port, outputs: Port, face: str) -> nn.Module:
        if self.both and face == "continues":
            raise ValueError(_("net.both = true reads what is to be foretold; leave it out for text that goes on"))
        if self.stack > 1 and face != "streams":
            raise ValueError(_("net.stack = {n} joins frames of sound; leave it out for this task").format(n=self.stack))
        return {"maps": RnnMaps, "streams": RnnStreams, "continues": RnnContinues}[face](inputs, outputs, self)


def step(kind: str, a: Tensor, r: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Gates]:
    """One step of a cell, written out: a, r as above; the state h and, of an LSTM, c, (B, C) each → both anew, and the gates by name."""
    if kind == "rnn":
        return (a + r).tanh(), c, {}
    if kind == "lstm":
        i, f, g, o = (a + r).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, {"input": i, "forget": f, "output": o, "candidate": g, "cell": c}
    (ar, az, an), (rr, rz, rn) = a.chunk(3, -1), r.chunk(3, -1)
    reset, update = (ar + rr).sigmoid(), (az + rz).sigmoid()
    new = (an + reset * rn).tanh()  # as torch has it: the paper resets h before U, not U·h + d
    return (1 - update) * new + update * h, c, {"reset": reset, "update": update, "candidate": new}


class Cells(nn.Module):
    """Layers of cells, (B, T, F) → (B, T, C), or 2C with a second set from the end: by torch's kernels, or by `step` for its gates."""

    def __init__(self, kind: str, inputs: int, width: int, layers: int = 1, both: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind, self.width, self.out, self.names = kind, width, width * (1 + both), ("h", "c") if kind == "lstm" else ("h",)
        core, sizes, self.drop = CORES[kind], [inputs] + [self.out] * (layers - 1), Dropout(dropout)
        self.ahead = nn.ModuleList(core(n, width, batch_first=True) for n in sizes)
        self.back = nn.ModuleList(core(n, width, batch_first=True) for n in sizes * both)
        for lstm in [*self.ahead, *self.back] * (kind == "lstm"):  # forget little at first (Jozefowicz et al. 2015, section 5)
            nn.init.ones_(lstm.bias_ih_l0.data[width : 2 * width])

    def forward(self, x: Tensor, lengths: Tensor | None = None, carry: Carry = None) -> tuple[Tensor, dict[str, Tensor]]:
        """carry: {"h": (B, layers, C), "c": …} to go on from, else zeros. Returns: the top layer's states, and the carry after them."""
        ends = []
        for n, core in enumerate(self.ahead):
            x = self.drop(x) if n else x
            given = [carry[k][:, n].to(x.dtype)[None].contiguous() for k in self.names] if carry else None  # (1, B, C) each
            y, last = core(x, given and (tuple(given) if self.kind == "lstm" else given[0]))  # (B, T, C)
            ends.append(last if self.kind == "lstm" else (last,))
            x = torch.cat([y, turned(self.back[n](turned(x, lengths))[0], lengths)], 2) if self.back else y
        return x, {k: torch.cat(layers).transpose(0, 1) for k, layers in zip(self.names, zip(*ends, strict=True), strict=True)}

    def gates(self, x: Tensor) -> list[Gates]:
        """Every gate over time, by layer: name → (B, T, C), with `state`; of the cells that read from the front."""
        out = []
        for n, core in enumerate(self.ahead):
            out.append(self._unrolled(core, x))
            x = torch.cat([out[-1]["state"], *(turned(self._unrolled(back, turned(x))["state"]) for back in self.back[n : n + 1])], 2)
        return out

    def _unrolled(self, core: Any, x: Tensor) -> Gates:
        h, c, rows = x.new_zeros(len(x), self.width), x.new_zeros(len(x), self.width), []
        for t in range(x.shape[1]):
            read, remembered = F.linear(x[:, t], core.weight_ih_l0, core.bias_ih_l0), F.linear(h, core.weight_hh_l0, core.bias_hh_l0)
            h, c, gates = step(self.kind, read, remembered, h, c)
            rows.append({**gates, "state": h})
        return {k: torch.stack([row[k] for row in rows], 1) for k in rows[0]}  # (B, T, C)


def turned(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, T, F) with the real part of each row back to front; its padding stays at the end."""
    if lengths is None:
        return x.flip(1)
    t, n = torch.arange(x.shape[1], device=x.device), lengths[:, None]
    return x.gather(1, torch.where(t < n, n - 1 - t, t)[..., None].expand_as(x))


class RnnMaps(nn.Module):
    """Reads all, then answers: (B, T, F), (B, F) number by number or a picture (B, C, h, w) row by row → (B, …)."""

    def __init__(self, inputs: Port, outputs: Port, config: RnnConfig) -> None:
        super().__init__()
        features = {1: 1, 2: inputs.shape[-1], 3: inputs.shape[0] * inputs.shape[-1]}[len(inputs.shape)]
        self.cells = Cells(config.kind, features, config.width, config.layers, config.both, config.dropout)
        self.drop, self.head, self.shape = Dropout(config.dropout), nn.Linear(self.cells.out, math.prod(outputs.shape)), outputs.shape

    def frames(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2) if x.ndim == 4 else x if x.ndim == 3 else x[..., None]  # (B, T, F); a picture (B, h, C·w)

    def forward(self, x: Tensor) -> Tensor:
        y, one = self.cells(self.frames(x))[0], self.cells.width  # (B, T, C or 2C); each direction stops at its own end
        return self.head(self.drop(torch.cat([y[:, -1, :one], y[:, 0, one:]], 1))).unflatten(1, self.shape)


class RnnStreams(nn.Module):
    """An answer every `stack` frames: (B, T, F), (B,) → (B, T', K), (B,), T' = ⌈T / stack⌉."""

    def __init__(self, inputs: Port, outputs: Port, config: RnnConfig) -> None:
        super().__init__()
        self.cells = Cells(config.kind, inputs.shape[-1] * config.stack, config.width, config.layers, config.both, config.dropout)
        self.stack, self.drop, self.head = config.stack, Dropout(config.dropout), nn.Linear(self.cells.out, outputs.size)

    def frames(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]  # (B, T)
        x = F.pad(x.masked_fill(padding[..., None], 0), (0, 0, 0, -x.shape[1] % self.stack))
        return x.unflatten(1, (-1, self.stack)).flatten(2)  # (B, T', stack·F)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        steps = (lengths + self.stack - 1) // self.stack
        return self.head(self.drop(self.cells(self.frames(x, lengths), steps)[0])), steps


class RnnContinues(nn.Module):
    """The next token after each: (B, T) → (B, T, V). The rows of the output are those of the embedding (Press & Wolf 2017)."""

    context = 0  # no limit: what it remembers is its state
    head = None  # the embedding

    def __init__(self, inputs: Port, outputs: Port, config: RnnConfig) -> None:
        super().__init__()
        self.embed = Tied(inputs.size, config.width)
        self.cells = Cells(config.kind, config.width, config.width, config.layers, dropout=config.dropout)
        self.drop, self.bias = Dropout(config.dropout), nn.Parameter(torch.zeros(outputs.size))
        nn.init.normal_(self.embed.weight, std=config.width**-0.5)

    def start(self, rows: int, limit: int) -> dict[str, Tensor]:
        return {k: self.bias.new_zeros(rows, len(self.cells.ahead), self.cells.width) for k in self.cells.names}

    def frames(self, tokens: Tensor) -> Tensor:
        return self.drop(self.embed(tokens) * self.cells.width**0.5)  # (B, T, C), unit variance: pydocs 2.49 after 320 steps, not 2.71

    def forward(self, tokens: Tensor, carry: Carry = None) -> tuple[Tensor, dict[str, Tensor]]:
        y, carry = self.cells(self.frames(tokens), carry=carry)
        return self.embed.logits(self.drop(y), self.bias), carry
