"""In which order a training part is read: pure in (seed, epoch), so that a resume needs one number to find its place."""

import numpy as np

from cloche import rng


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
