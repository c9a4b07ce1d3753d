"""In which order a training part is read: pure in (seed, epoch), so that a resume needs one number to find its place."""

from typing import Protocol

import numpy as np

from cloche import rng
from cloche.data.table import on_grid


class Order(Protocol):
    """Which rows each step takes: pure in (seed, epoch)."""

    def steps(self, epoch: int) -> int: ...
    def ids(self, epoch: int, index: int) -> tuple[np.ndarray, int]: ...  # the rows of a step and the position of the first


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
