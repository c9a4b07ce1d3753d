"""Which row belongs to which part, before anything is fitted: pure in the content of the data.

A part that the source names itself is kept. Otherwise whole groups of twins (equal content) are ranked by their digest within
each class and the ranking is cut: test, validation, train. `fold` k moves the test cut to the k-th place of the same
ranking, so that the folds of a cross-validation cover every row exactly once.
"""

import numpy as np

from cloche.data.read.examples import NONE, TEST, TRAIN, VALIDATION
from cloche.errors import UserError
from cloche.words import _, listed, number

PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


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
    official = bool((given != NONE).any())
    if fold and (official or in_order):
        what = _("this data is cut in order, so there are no folds to rotate")
        what = what if in_order else _("this data has its own test part, so there are no folds to rotate")
        raise UserError(what, _("data.fold = {fold}").format(fold=fold), _("leave out --folds"))
    if official:
        test = 0.0
    elif fold and round((fold + 1) * test, 9) > 1:
        found = _("data.fold = {fold} with data.test = {test}").format(fold=fold, test=test)
        do = _("folds run from 0 to {last}").format(last=int(1 / test + 1e-9) - 1 if test else 0)
        raise UserError(_("there is no such fold"), found, do)
    part = np.where(given == NONE, TRAIN, given)
    free = np.flatnonzero(part == TRAIN)
    if in_order and VALIDATION not in given:
        held, kept = round(test * len(free)), round(validation * len(free))
        part[free[len(free) - held - kept :]] = VALIDATION
        part[free[len(free) - held :]] = TEST
    elif VALIDATION not in given:
        part[free] = _ranked(group[free], label[free], validation, test, fold)
    rows = {name: np.flatnonzero(part == code) for name, code in PARTS.items()}
    if not len(rows["train"]):
        found, do = _("{n} examples").format(n=number(len(group))), _("lower data.validation and data.test, or add examples")
        raise UserError(_("nothing is left to train on"), found, do)
    return rows


def _ranked(digest: np.ndarray, label: np.ndarray, validation: float, test: float, fold: int) -> np.ndarray:
    """(n,) uint8 parts by rank within each class; a group's class is the first among its rows'."""
    label = label.reshape(len(label), -1)  # a class, or a set of labels; numbers are one class
    label = np.zeros_like(label) if label.dtype.kind == "f" and label.shape[1] == 1 else label
    classes = np.unique(label, axis=0, return_inverse=True)[1].reshape(-1)
    _digests, first, group = np.unique(digest, axis=0, return_index=True, return_inverse=True)  # groups come out ranked by digest
    group = group.reshape(-1)
    sizes, kind = np.bincount(group), classes[first]
    np.minimum.at(kind, group, classes)  # twins that differ in their class: the first class, whatever the order of the rows
    part = np.full(len(first), TRAIN, np.uint8)
    for c in np.unique(kind):
        mine = np.flatnonzero(kind == c)
        if len(mine) == 1:  # a class with one picture can only be trained on
            continue
        total = int(sizes[mine].sum())
        middle = np.cumsum(sizes[mine]) - sizes[mine] / 2  # a group lies where its middle lies
        low, high = round(fold * test * total), round((fold + 1) * test * total)
        after = (middle - high) % total
        part[mine[after < round(validation * total)]] = VALIDATION
        part[mine[(middle >= low) & (middle < high)]] = TEST
    return part[group]


def twins(digest: np.ndarray, rows: dict[str, np.ndarray]) -> int:
    """How many rows of the test part stand in the training or validation part too (only where the source made the parts)."""
    seen = {d.tobytes() for name in ("train", "validation") for d in digest[rows[name]]}
    return sum(d.tobytes() in seen for d in digest[rows["test"]])


def check_classes(label: np.ndarray, labels: list[str], rows: dict[str, np.ndarray]) -> None:
    """Raises: UserError for a class that training never sees."""
    if label.ndim == 1 and labels and (missing := [labels[c] for c in np.setdiff1d(label, label[rows["train"]])]):
        what, do = _("the training part has no example of {names}"), _("add examples of it, or lower data.test and data.validation")
        raise UserError(what.format(names=listed(missing)), "", do)
