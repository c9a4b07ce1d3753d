"""Which row belongs to which part, before anything is fitted: pure in the content of the data.

A part that the source names itself is kept. Otherwise whole groups of twins (equal content) are ranked by their digest within
each class and the ranking is cut: test, validation, train. `fold` k moves the test cut to the k-th place of the same
ranking, so that the folds of a cross-validation cover every row exactly once.
"""

import numpy as np

from cloche.data.read.examples import NONE, TEST, VALIDATION
from cloche.errors import UserError
from cloche.words import _, listed, number


def split(
    group: np.ndarray, label: np.ndarray, given: np.ndarray, validation: float, test: float, fold: int, in_order: bool = False
) -> dict[str, np.ndarray]:
    """Rows of each part.

    Args:
        group: (n, 16) uint8 hashes, alike for rows that stay together. label: (n,) int64 classes, else (n, K) float32.
        given: (n,) uint8 parts. validation, test: shares of the whole; where the source has a test part, `validation` is a share of the
        rest. in_order: cut as the rows stand, the test part last, for running text and for time.
    Returns: {"train", "validation", "test"} → sorted int64 rows.
    Raises: UserError when a fold is asked of a source with its own test part, or when nothing is left to train on.
    """
    n, part = len(group), given.copy()
    official = bool((given != NONE).any())
    if (official or in_order) and fold:
        raise UserError(
            _("this data is cut in order, so there are no folds to rotate")
            if in_order
            else _("this data has its own test part, so there are no folds to rotate"),
            _("data.fold = {fold}").format(fold=fold),
            _("leave out --folds"),
        )
    if official:
        test = 0.0
    elif fold and round((fold + 1) * test, 9) > 1:
        raise UserError(
            _("there is no such fold"),
            _("data.fold = {fold} with data.test = {test}").format(fold=fold, test=test),
            _("folds run from 0 to {last}").format(last=int(1 / test + 1e-9) - 1 if test else 0),
        )
    free = np.flatnonzero((given != TEST) & (given != VALIDATION)) if official else np.arange(n)
    if not (given == VALIDATION).any() or not official:
        if in_order:
            held, kept = round(test * len(free)), round(validation * len(free))
            part[free[len(free) - held - kept : len(free) - held]] = VALIDATION
            part[free[len(free) - held :]] = TEST
        else:
            part[free] = _ranked(group[free], _classes(label)[free], validation, test, fold)
    rows = {
        "train": np.flatnonzero((part != VALIDATION) & (part != TEST)),
        "validation": np.flatnonzero(part == VALIDATION),
        "test": np.flatnonzero(part == TEST),
    }
    if not len(rows["train"]):
        raise UserError(
            _("nothing is left to train on"),
            _("{n} examples").format(n=number(n)),
            _("lower data.validation and data.test, or add examples"),
        )
    return rows


def _classes(label: np.ndarray) -> np.ndarray:
    """(n,) int64: the class, the set of labels, or 0 for a number."""
    if label.ndim == 1:
        return label
    if label.shape[1] == 1:
        return np.zeros(len(label), np.int64)
    return np.unique(label, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _ranked(digest: np.ndarray, classes: np.ndarray, validation: float, test: float, fold: int) -> np.ndarray:
    """(n,) uint8 parts by rank within each class; a group's class is the first among its rows'."""
    _digests, first, group = np.unique(digest, axis=0, return_index=True, return_inverse=True)  # groups come out ranked by digest
    group = group.reshape(-1)
    sizes, kind = np.bincount(group), classes[first]
    np.minimum.at(kind, group, classes)  # twins that differ in their class: the first class, whatever the order of the rows
    part = np.full(len(first), NONE, np.uint8)
    for c in np.unique(kind):
        mine = np.flatnonzero(kind == c)
        if len(mine) == 1:  # a class with one picture can only be trained on
            continue
        total = int(sizes[mine].sum())
        middle = np.cumsum(sizes[mine]) - sizes[mine] / 2  # a group lies where its middle lies
        low, high = round(fold * test * total), round((fold + 1) * test * total)
        after = (middle - high) % total
        part[mine[(middle >= low) & (middle < high)]] = TEST
        part[mine[((middle < low) | (middle >= high)) & (after < round(validation * total))]] = VALIDATION
    return part[group]


def twins(digest: np.ndarray, rows: dict[str, np.ndarray]) -> int:
    """How many rows of the test part stand in the training or validation part too (only where the source made the parts)."""
    seen = {d.tobytes() for name in ("train", "validation") for d in digest[rows[name]]}
    return sum(d.tobytes() in seen for d in digest[rows["test"]])


def check_classes(label: np.ndarray, labels: list[str], rows: dict[str, np.ndarray]) -> None:
    """Raises: UserError for a class that training never sees."""
    if label.ndim == 1 and labels:
        missing = [labels[c] for c in np.setdiff1d(label, label[rows["train"]])]
        if missing:
            raise UserError(
                _("the training part has no example of {names}").format(names=listed(missing)),
                "",
                _("add examples of it, or lower data.test and data.validation"),
            )
