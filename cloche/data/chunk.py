"""What the code hands around: `Chunk`, the rows that one forward pass sees, and `Part`, which cuts a part of the data into them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cloche import rng
from cloche.data.order import ByTokens, Lanes, Order, Shuffled


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

    def to(self, device: torch.device) -> "Chunk":
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in ("ids", "at", "weight", "draw")}
        return replace(self, data={k: t.to(device, non_blocking=True) for k, t in self.data.items()}, **moved)

    def head(self, n: int) -> "Chunk":
        """Its first n rows."""
        cut = {k: getattr(self, k)[:n] for k in ("ids", "at", "weight")}
        return replace(self, data={k: t[:n] for k, t in self.data.items()}, **cut)


class Rows(Protocol):
    """A store or a view of one: arrays known by row number."""

    n: int
    lengths: np.ndarray | None  # (n,) what each row costs, where they differ
    fields: dict[str, Any]
    running: bool  # row i goes on where row i - 1 ended

    def to(self, device: torch.device) -> "Rows": ...
    def rows(self, ids: np.ndarray) -> dict[str, Tensor]: ...
    def name(self, i: int) -> str: ...


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
    carried: bool = False  # the net hands a state on: rows are read in lanes

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
        bounds = [*range(0, rows, per), rows]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
            del bounds[-2]
        return bounds, per

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
        draw = rng.draw(0, 0)
        if self.carried:
            lanes = Lanes(len(self), max(1, min(batch, len(self) // 16)))  # long enough that a cold start counts little
            for k in range(lanes.each):
                yield k, self._chunk(lanes.ids(0, k)[0], np.arange(lanes.lanes) + k * lanes.lanes, draw, False, 0)
            return
        for i in range(rank, -(-len(self) // batch), size):
            rows = np.arange(i * batch, min((i + 1) * batch, len(self)))
            yield i, self._chunk(rows, rows, draw, False, batch)

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
        short = full - len(positions) if self.fill else 0
        weight = torch.ones(len(positions) + max(short, 0))
        ended = np.flatnonzero(positions < 0)  # lanes that have come to their end
        if len(ended):
            weight[ended], positions = 0, np.where(positions < 0, positions.max(), positions)
        if short > 0:
            weight[len(positions) :] = 0
            positions, at = (np.concatenate([a, np.repeat(a[:1], short)]) for a in (positions, at))
        ids = self.ids[positions]
        chunk = Chunk(self.store.rows(ids), torch.from_numpy(ids), torch.from_numpy(at), weight, draw, train, short > 0 or len(ended) > 0)
        return self.prepare.device(chunk.to(self.device))
