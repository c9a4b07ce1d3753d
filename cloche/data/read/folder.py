"""A folder with one folder of pictures for each class, also below train/, validation/ and test/ → Examples of kind "pictures"."""

from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import re
from typing import NamedTuple
import unicodedata

import numpy as np

from cloche.data.pictures import Picture, Unreadable, decode, framed
from cloche.data.read.examples import NONE, TEST, TRAIN, VALIDATION, Examples, digest
from cloche.data.read.idx import looks_like_idx, read_idx
from cloche.errors import UserError
from cloche.words import _, listed

JUNK = {"thumbs.db", "desktop.ini", "__macosx"}  # and all that begins with a dot
PARTS = {"train": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "test": TEST}
BLOCK = 256  # files handed to the threads at once: Ctrl-C waits for no more
LeftOut = list[tuple[str, str]]  # (name, reason)


class Row(NamedTuple):
    part: int
    label: str
    file: Path  # below the root


def read_folder(root: Path, pixels: int) -> Examples:
    """ROOT/CLASS/**, or ROOT/train/CLASS/** with validation (val, valid) or test beside it; rows by part, class and natural path; or IDX.

    Returns: `image` (n, H, W, C) uint8 and `size` (n, 2) int32, see `framed`; notes ignored, merged, turned.
    Raises: UserError if root has no class folders, fewer than two classes that can be read, or a class that train lacks.
    """
    if looks_like_idx(root):
        return read_idx(root, pixels)
    files, folders, left_out, ignored = _walk(root)
    rows, merged = _rows(root, files, folders, left_out)
    named = _labels(root, rows, left_out)
    read = read_pictures(root, [row.file for row in rows], pixels, left_out)
    rows = [row for row in rows if row.file in read]
    labels = _labels(root, rows, left_out)
    pictures, digests = zip(*read.values(), strict=True)
    left_out += [(shown(label), _("no readable picture in this class folder")) for label in named if label not in labels]
    return Examples(
        "pictures",
        fields=framed([picture.array for picture in pictures]),
        label=np.array([labels.index(row.label) for row in rows], np.int64),
        labels=labels,
        digest=np.stack(digests),
        part=np.array([row.part for row in rows], np.uint8),
        names=[shown(row.file) for row in rows],
        left_out=sorted(left_out, key=lambda told: natural(told[0])),
        notes={"ignored": ignored, "merged": merged, "turned": sum(picture.turned for picture in pictures)},
    )


def read_pictures(root: Path, names: list[Path], pixels: int, left_out: LeftOut) -> dict[Path, tuple[Picture, np.ndarray]]:
    """Each file below root that can be read: its picture and digest, by threads, in the order given; the others are left out by reason."""

    def read(name: Path) -> tuple[Picture, np.ndarray] | Exception:
        try:
            return decode(root / name, pixels), digest((root / name).read_bytes())  # first what bounds a file's size
        except (Unreadable, OSError) as fault:
            return fault

    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), BLOCK):
            block = names[start : start + BLOCK]
            found |= zip(block, pool.map(read, block), strict=True)
    left_out += [(shown(name), told(fault)) for name, fault in found.items() if isinstance(fault, Exception)]
    return {name: picture for name, picture in found.items() if isinstance(picture, tuple)}


def told(fault: Exception) -> str:
    return getattr(fault, "strerror", None) or str(fault)


def natural(name: str) -> tuple[list[str | int], str]:
    """A sort key by which "2" comes before "10"; odd places are the numbers."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d+)", name))], name


def shown(name: str | Path) -> str:
    """A name on one line: what cannot be printed is escaped, but not the joiners that Hindi words and emoji need."""
    text = name.as_posix() if isinstance(name, Path) else name
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode() for c in text)


def _walk(root: Path) -> tuple[list[Path], list[Path], LeftOut, int]:
    """(regular files, folders, what is left out, how many ignored) below the root; nothing is opened, so that no pipe blocks."""
    files, folders, left_out, ignored = [], [Path()], [], 0
    for folder in folders:  # which grows meanwhile
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as fault:
            left_out.append((shown(folder), told(fault)))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name.lower() in JUNK:
                ignored += 1
            elif os.path.isfile(entry):
                files.append(path)
            elif not os.path.isdir(entry):
                left_out.append((shown(path), _("not a regular file") if os.path.exists(entry) else _("link to nothing")))
            elif entry.is_symlink():
                left_out.append((shown(path), _("link to a folder: not followed")))
            else:
                folders.append(path)
    return files, folders[1:], left_out, ignored


def _rows(root: Path, files: list[Path], folders: list[Path], left_out: LeftOut) -> tuple[list[Row], int]:
    """(a row for each file in a class folder, in order; how many class folders became one with another)."""
    found = {top: PARTS.get(top.lower(), NONE) for top in (folder.parts[0] for folder in folders)}
    kinds = set(found.values()) - {NONE}
    if TRAIN in kinds and len(kinds) > 1:
        depth, parts = 1, {top: part for top, part in found.items() if part != NONE}
    else:  # train alone tells no split
        depth, parts = int(kinds == {TRAIN} and len(found) == 1), dict.fromkeys(found, NONE)
    rows, classes = [], {folder.parts[: depth + 1] for folder in folders if len(folder.parts) > depth and folder.parts[0] in parts}
    for file in files:
        if file.parts[: depth + 1] in classes:
            label = unicodedata.normalize("NFC", file.parts[depth]).encode("utf-8", "backslashreplace").decode()
            rows.append(Row(parts[file.parts[0]], label, file))
        else:
            left_out.append((shown(file), _("not in a class folder")))
    used = {row.file.parts[: depth + 1] for row in rows}
    left_out += [(shown("/".join(folder)), _("empty class folder")) for folder in sorted(classes - used)]
    if not rows:
        what = _("{path} has no class folders with pictures").format(path=shown(root))
        do = _("put the pictures of each class into a folder of its own: {path}/maize, {path}/beans").format(path=shown(root))
        raise UserError(what, reasons(left_out) or _("there is nothing in it"), do)
    merged = len({(row.label, row.file.parts[depth]) for row in rows}) - len({row.label for row in rows})
    return sorted(rows, key=lambda row: (row.part, natural(row.label), [natural(piece) for piece in row.file.parts])), merged


def _labels(root: Path, rows: list[Row], left_out: LeftOut) -> list[str]:
    """The classes of the rows in natural order; UserError if no classifier can be trained on them."""
    labels = sorted({row.label for row in rows}, key=natural)
    if not rows:
        raise UserError(_("no picture in {path} can be read").format(path=shown(root)), reasons(left_out))
    if len(labels) == 1:
        do = _("a classifier needs at least two folders, one for each class; if they lie inside this one, give {path}")
        inner = shown(root / rows[0].file.parts[0])
        raise UserError(_("one class only: {name}").format(name=shown(labels[0])), reasons(left_out), do.format(path=inner))
    trained = {row.label for row in rows if row.part in (NONE, TRAIN)}
    if row := next((row for row in rows if row.label not in trained), None):
        what, found = _("the class {name} does not occur in train").format(name=shown(row.label)), _("one of its pictures is {name}")
        raise UserError(what, found.format(name=shown(row.file)), _("add pictures of it to train, or take it out of the other parts"))
    return labels


def reasons(left_out: LeftOut) -> str:
    return listed((f"{name} ({reason})" for name, reason in left_out), most=3)
