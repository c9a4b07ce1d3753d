"""What the code hands around: `Chunk`, the rows that one forward pass sees, and `Part`, which cuts its rows into them in an `Order`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloche import rng
from cloche.data.table import Table, on_grid


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
    idle: bool = False  # of several processes this one has nothing left to do in the step: computed, counted nowhere
    progress: float = 1.0  # share of the training that lies behind it

    def to(self, device: torch.device) -> "Chunk":
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in ("ids", "at", "weight", "draw")}
        return replace(self, data={k: t.to(device, non_blocking=True) for k, t in self.data.items()}, **moved)

    def head(self, n: int) -> "Chunk":
        """Its first n rows."""
        cut = {k: getattr(self, k)[:n] for k in ("ids", "at", "weight")}
        return replace(self, data={k: t[:n] for k, t in self.data.items()}, **cut)


class Shuffled:
    """A new permutation each epoch, cut into steps of `batch` rows; the last step takes what is left.

    A last step of a single row would have no variance for batch normalisation: it is merged into the one before.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n, self.batch, self.seed = n, batch, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def steps(self, epoch: int) -> int:
        full, rest = divmod(self.n, self.batch)
        return max(1, full + (rest > 1 or (rest == 1 and full == 0)))

    def ids(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, rng.generator(rng.ORDER, self.seed, epoch).permutation(self.n)
        first = index * self.batch
        last = self.n if index == self.steps(epoch) - 1 else first + self.batch
        return self._order[first:last], first


class ByTokens:
    """Rows of like length together: shuffled, sorted by length on a grid, cut, the steps shuffled.

    A step holds as much as `batch` rows of mean length, fillers counted; the cuts are the same in every epoch, so the number of steps is
    known before the first.
    """

    def __init__(self, lengths: np.ndarray, batch: int, seed: int) -> None:
        self.cost, self.seed = on_grid(np.asarray(lengths)), seed
        sizes, budget, self.cuts = np.sort(self.cost), batch * self.cost.mean(), [0]
        for i, size in enumerate(sizes):
            if size * (i + 1 - self.cuts[-1]) > budget and i - self.cuts[-1] > 1:
                self.cuts.append(i)
        if len(sizes) - self.cuts[-1] == 1 and len(self.cuts) > 1:  # no step of a single row: it takes another in, or joins the one before
            if self.cuts[-1] - self.cuts[-2] > 2:
                self.cuts[-1] -= 1
            else:
                self.cuts.pop()
        self.cuts.append(len(sizes))
        self._epoch, self._order, self._steps = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def steps(self, epoch: int) -> int:
        return len(self.cuts) - 1

    def ids(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        if epoch != self._epoch:
            g = rng.generator(rng.ORDER, self.seed, epoch)
            mixed = g.permutation(len(self.cost))
            self._epoch, self._order = epoch, mixed[np.argsort(self.cost[mixed], kind="stable")]
            self._steps = g.permutation(len(self.cuts) - 1)
        k = self._steps[index]
        return self._order[self.cuts[k] : self.cuts[k + 1]], self.cuts[k]


class Lanes:
    """Running text: row i goes on where row i - 1 ended. Lane l reads rows l·k, l·k + 1, … of its own, one a step, in every epoch alike.

    A lane that has come to its end gives -1: a filler that keeps the shape, and the carry with its lane.
    """

    def __init__(self, n: int, batch: int) -> None:
        self.n, self.each = n, -(-n // min(batch, n))
        self.lanes = -(-n // self.each)  # none without a row

    def steps(self, epoch: int) -> int:
        return self.each

    def ids(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        rows = np.arange(self.lanes) * self.each + index
        return np.where((rows < self.n) & (index < self.each), rows, -1), index * self.lanes


# Pure in (seed, epoch), so that a resume finds its place; ids(epoch, index): the rows of a step and the position of the first.
Order = Shuffled | ByTokens | Lanes


@dataclass(frozen=True)
class Part:
    """A part of the data ("train", "validation", "test") and the one way from its rows to prepared chunks."""

    name: str
    store: Table  # or a view of it
    ids: np.ndarray  # (n,) the rows of the store that belong to it
    prepare: Any  # its `device` normalises, and augments where chunk.train
    device: torch.device = torch.device("cpu")
    fill: bool = False  # pad every chunk to its full shape: for devices that want static shapes
    carried: bool = False  # the net hands a state on: rows are read in lanes
    progress: float = 1.0  # share of the training that lies behind its next step; `Job.chunks` sets it

    def __len__(self) -> int:
        return len(self.ids)

    def order(self, batch: int, seed: int) -> Order:
        """Lanes for a carried state, like lengths together where they differ, else a permutation."""
        if self.carried:
            return Lanes(len(self), batch)
        if self.store.lengths is not None:
            return ByTokens(self.store.lengths[self.ids], batch, seed)
        return Shuffled(len(self), batch, seed)

    def bounds(self, rows: int, chunks: int, batch: int) -> tuple[list[int], int]:
        """Where the chunks of a step of so many rows begin, and end, and how many rows a full one has.

        A chunk with one real row is merged into its neighbour.
        """
        full = rows if self.store.lengths is not None else max(batch, rows)  # rows of unequal cost: their number varies
        per = -(-full // chunks)
        return [0, *(a for a in range(per, rows, per) if a + 1 < rows), rows], per

    def step(
        self, order: Order, epoch: int, index: int, chunks: int, batch: int, draw: Tensor, share: tuple[int, int] = (0, 1)
    ) -> list[Chunk]:
        """The chunks of one training step that process r of N = share does: r, r + N, …; as many as any other, the last may be idle."""
        rows, first = order.ids(epoch, index)
        (bounds, per), (rank, size), out = self.bounds(len(rows), chunks, batch), share, []
        for c in range(rank, -(-(len(bounds) - 1) // size) * size, size):
            idle = c >= len(bounds) - 1
            a, b = bounds[0 if idle else c], bounds[1 if idle else c + 1]
            out.append(replace(self._chunk(rows[a:b], np.arange(first + a, first + b), draw, True, per), idle=idle))
        return out

    def once(self, batch: int, rank: int = 0, size: int = 1) -> Iterator[tuple[int, Chunk]]:
        """Every row once, without augmentation: in the part's own order, or in lanes; every size-th chunk, with its number."""
        if self.carried:
            lanes = Lanes(len(self), max(1, min(batch, len(self) // 16)))  # long enough that a cold start counts little
            for k, (rows, first) in enumerate(lanes.ids(0, k) for k in range(lanes.each)):
                yield k, self._chunk(rows, np.arange(first, first + len(rows)), rng.draw(0, 0), False, 0)
            return
        for i in range(rank, -(-len(self) // batch), size):
            rows = np.arange(i * batch, min((i + 1) * batch, len(self)))
            yield i, self._chunk(rows, rows, rng.draw(0, 0), False, batch)

    def without(self, rows: list[int]) -> "Part":
        """The part with neighbours in the place of these rows: every other row keeps its place in the order."""
        good = np.flatnonzero(~np.isin(self.ids, rows))
        return replace(self, ids=self.ids[good[np.searchsorted(good, np.arange(len(self))) % len(good)]]) if rows else self

    def field(self, name: str) -> np.ndarray:
        """A fixed field of its rows, as in the store: the labels, say."""
        return self.store.fields[name][torch.from_numpy(self.ids)].cpu().numpy()

    def take(self, positions: np.ndarray) -> Chunk:
        """A few rows by their position in the part, prepared as for evaluation."""
        return self._chunk(np.asarray(positions), np.asarray(positions), rng.draw(0, 0), False, 0)

    def _chunk(self, positions: np.ndarray, at: np.ndarray, draw: Tensor, train: bool, full: int) -> Chunk:
        n, short = len(positions), max(0, full - len(positions)) if self.fill else 0
        positions, at = (np.concatenate([a, np.repeat(a[:1], short)]) for a in (positions, at))
        real = (positions >= 0) & (np.arange(n + short) < n)  # -1: a lane that has come to its end
        ids, weight = self.ids[np.where(positions < 0, positions.max(), positions)], torch.from_numpy(real).to(torch.float32)
        chunk = Chunk(
            self.store.rows(ids), torch.from_numpy(ids), torch.from_numpy(at), weight, draw, train, not real.all(), progress=self.progress
        )
        return self.prepare.device(chunk.to(self.device))
