"""What the code hands around: `Chunk`, the rows that one forward pass sees, and `Part`, which cuts a part of the data into them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cloche import rng


@dataclass(frozen=True)
class Chunk:
    """Rows on their way through a forward pass. Every tensor has B first.

    data: names fixed by the data kind: `image`, `columns`, …; `label` where there is one.
    ids: (B,) int64, which row of the store: fault messages name them. at: (B,) int64, position in the epoch's order.
    weight: (B,) float32, 0 marks a filler that only keeps the shape; every task multiplies by it.
    draw: () int64, hash of (seed, epoch): a tensor, so that no epoch recompiles. fillers: known on the host, no sync.
    """

    data: dict[str, Tensor]
    ids: Tensor
    at: Tensor
    weight: Tensor
    draw: Tensor
    train: bool
    fillers: bool = False

    def to(self, device: torch.device) -> "Chunk":
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in ("ids", "at", "weight", "draw")}
        return replace(self, data={k: t.to(device, non_blocking=True) for k, t in self.data.items()}, **moved)


class Rows(Protocol):
    """A store or a view of one: arrays known by row number."""

    n: int

    def rows(self, ids: np.ndarray) -> dict[str, Tensor]: ...


class Order(Protocol):
    """Which rows each step takes: pure in (seed, epoch)."""

    def steps(self, epoch: int) -> int: ...
    def ids(self, epoch: int, index: int) -> tuple[np.ndarray, int]: ...  # the rows of a step and the position of the first


class Prepare(Protocol):
    def device(self, chunk: Chunk) -> Chunk: ...  # normalise; augment if chunk.train


@dataclass(frozen=True)
class Part:
    """A part of the data ("train", "validation", "test") and the one way from its rows to prepared chunks."""

    name: str
    store: Rows
    ids: np.ndarray  # (n,) the rows of the store that belong to it
    prepare: Prepare
    device: torch.device = torch.device("cpu")
    fill: bool = False  # pad every chunk to its full shape: for devices that want static shapes

    def __len__(self) -> int:
        return len(self.ids)

    def step(self, order: Order, epoch: int, index: int, chunks: int, batch: int, draw: Tensor) -> list[Chunk]:
        """The chunks of one training step; a chunk with one real row is merged into its neighbour."""
        rows, first = order.ids(epoch, index)
        per = -(-max(batch, len(rows)) // chunks)
        bounds = list(range(0, len(rows), per)) + [len(rows)]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
            del bounds[-2]
        return [self._chunk(rows[a:b], np.arange(first + a, first + b), draw, True, per) for a, b in zip(bounds, bounds[1:], strict=False)]

    def once(self, batch: int) -> Iterator[Chunk]:
        """Every row once, in the part's own order, without augmentation."""
        draw = rng.draw(0, 0)
        for a in range(0, len(self.ids), batch):
            b = min(a + batch, len(self.ids))
            yield self._chunk(np.arange(a, b), np.arange(a, b), draw, False, batch)

    def take(self, positions: np.ndarray) -> Chunk:
        """A few rows by their position in the part, prepared as for evaluation."""
        return self._chunk(np.asarray(positions), np.asarray(positions), rng.draw(0, 0), False, 0)

    def _chunk(self, positions: np.ndarray, at: np.ndarray, draw: Tensor, train: bool, full: int) -> Chunk:
        short = full - len(positions) if self.fill else 0
        weight = torch.ones(len(positions) + max(short, 0))
        if short > 0:
            weight[len(positions) :] = 0
            positions, at = (np.concatenate([a, np.repeat(a[:1], short)]) for a in (positions, at))
        ids = self.ids[positions]
        chunk = Chunk(self.store.rows(ids), torch.from_numpy(ids), torch.from_numpy(at), weight, draw, train, short > 0)
        return self.prepare.device(chunk.to(self.device))
