"""Pairs of texts: a .tsv file, a source, a tab, a target on each line; or a folder with two files of equal length, source first by name."""

from pathlib import Path
from typing import Any

import numpy as np

from cloche.data.read.examples import Examples, plain, utf8
from cloche.data.table import Ragged
from cloche.errors import UserError
from cloche.words import _, listed, number


def read_pairs(path: Path) -> Examples:
    """`source` and `target` as ragged UTF-8 bytes; a pair with an empty side is left out.

    Raises: UserError for bytes that are not UTF-8, lines without exactly one tab, files of unequal length, not two files, or no pairs.
    """
    pairs = {_("line {n}").format(n=number(n)): pair for n, pair in enumerate(_beside(path) if path.is_dir() else _tabbed(path), 1)}
    sides = {name: (a.encode(), b.encode()) for name, (a, b) in pairs.items() if a and b}
    left_out = [(name, _("the target is empty") if a else _("the source is empty")) for name, (a, b) in pairs.items() if not (a and b)]
    if not sides:
        what, found = _("there are no pairs in {path}").format(path=path), listed(f"{name}: {why}" for name, why in left_out)
        raise UserError(what, found, _("one pair a line: source, a tab, target"))
    return examples(list(sides.values()), list(sides), left_out=left_out)


def examples(pairs: list[tuple[bytes, bytes]], names: list[str], **more: Any) -> Examples:
    sides = {side: Ragged.of(texts, np.uint8) for side, texts in zip(("source", "target"), zip(*pairs, strict=True), strict=True)}
    return plain("pairs", sides, names, ((a, b"\t", b) for a, b in pairs), **more)


def _tabbed(path: Path) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.split("\t")] for line in _lines(path)]
    if wrong := [number(n) for n, cells in enumerate(lines, 1) if len(cells) != 2]:
        what, told = _("{path} has lines without exactly one tab").format(path=path), _("line {lines}").format(lines=listed(wrong, 6))
        raise UserError(what, told, _("one pair a line: source, a tab, target"))
    return lines


def _beside(root: Path) -> list[tuple[str, str]]:
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
    if len(files) != 2:
        what, found = _("{path} has not two files, a source and a target").format(path=root), listed(p.name for p in files)
        raise UserError(what, found or _("no files"), _("give a .tsv file, or a folder with two text files"))
    sides = [[line.strip() for line in _lines(p)] for p in files]
    if len(sides[0]) != len(sides[1]):
        told = ", ".join(f"{p.name}: {number(len(side))}" for p, side in zip(files, sides, strict=True))
        what = _("the two files of {path} differ in their number of lines").format(path=root)
        raise UserError(what, told, _("line n of one belongs to line n of the other"))
    return list(zip(*sides, strict=True))


def _lines(path: Path) -> list[str]:
    return text.rstrip("\n").split("\n") if (text := utf8(path)) else []
