"""Running text: a .txt file, or a folder of them, as paragraphs in their order; one that was there before is dropped, for it leaks."""

from pathlib import Path
from pydoc_data.topics import topics
import re

import numpy as np

from cloche.data.read.examples import Examples, plain, utf8
from cloche.data.table import Ragged
from cloche.errors import UserError
from cloche.words import _, number

LEAST_BYTES, LEAST_ROWS = 2000, 20


def read_text(path: Path) -> Examples:
    """`text` as ragged UTF-8 bytes, a row a paragraph with the empty line after it; a line, where there are no paragraphs. notes: repeated.

    Raises: UserError for bytes that are not UTF-8 (file and byte), for an empty folder, and for empty or too short text.
    """
    found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else [path]
    return examples({p.name: utf8(p) for p in found}, str(path))


def read_pydocs() -> Examples:
    """The English of CPython's own documentation, as `help()` shows it; its length differs between versions of Python."""
    return examples({name: topics[name] for name in sorted(topics)}, "pydocs")


def examples(texts: dict[str, str], source: str) -> Examples:
    """texts: by the name of their file, in order."""
    for end, cut in (("\n\n", r"\n(?:[^\S\n]*\n)+"), ("\n", r"\n")):
        seen: dict[bytes, str] = {}  # paragraph → where it stood first
        pieces = [(piece, f"{name}:{n}") for name, text in texts.items() for n, piece in enumerate(re.split(cut, text), 1) if piece.strip()]
        for piece, where in pieces:
            seen.setdefault((piece.strip("\n").rstrip() + end).encode(), where)
        if len(seen) >= LEAST_ROWS:
            break
    size = sum(map(len, seen))
    if len(seen) < LEAST_ROWS or size < LEAST_BYTES:
        what = _("the text in {path} is too short") if seen else _("the text in {path} is empty")
        found = _("{n} bytes in {m} different paragraphs or lines").format(n=number(size), m=number(len(seen)))
        told = _("give at least {n} bytes in {m} paragraphs with an empty line between them, or as many lines")
        raise UserError(what.format(path=source), found, told.format(n=number(LEAST_BYTES), m=LEAST_ROWS))
    rows = {"text": Ragged.of(list(seen), np.uint8)}
    return plain("text", rows, list(seen.values()), ((row,) for row in seen), notes={"repeated": len(pieces) - len(seen)})
