"""A folder with one folder of pictures for each class, also below train/, validation/ and test/ → Examples of kind "pictures"."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
import difflib
from itertools import islice
import os
from pathlib import Path
import re
from typing import NamedTuple
import unicodedata

import numpy as np

from cloche.data.pictures import Unreadable, decode, frame_size
from cloche.data.read.examples import NONE, TEST, TRAIN, VALIDATION, Allocate, Examples, digest
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


def looks_like_pictures(root: Path) -> bool:
    """Whether there is a picture, by its header, among the first 100 files of the first 100 folders."""
    for folder, inner, names in islice(os.walk(root), 100):
        inner[:] = [name for name in inner if not name.startswith(".")]  # where os.walk goes next
        for path in (Path(folder, name) for name in names[:100]):
            with suppress(Unreadable, OSError):
                if path.is_file() and frame_size(path, 1):  # is_file first: a pipe would block
                    return True
    return False


def read_folder(root: Path, pixels: int, allocate: Allocate) -> Examples:
    """ROOT/CLASS/**, or ROOT/train/CLASS/** with validation (val, valid) or test beside it; rows by part, class and natural path.

    Two passes in threads: the headers give the frame (H, W, C), the largest of each; then each file is read once, hashed and decoded
    into its row. A grey picture in a set with colour is repeated to 3 channels.

    Returns: `image` (n, H, W, C) uint8, zeros right of and below a smaller picture; `size` (n, 2) int32; notes ignored, merged, turned.
    Raises: UserError if root is no folder, has no class folders, fewer than two classes that can be read, or a class that train lacks.
    """
    if not os.path.isdir(root):
        if os.path.lexists(root):
            raise UserError(_("{path} is a file, not a folder").format(path=shown(root)), "", _("give the folder of the class folders"))
        near = difflib.get_close_matches(root.name, [path.name for path in root.parent.glob("*")], n=1)
        do = _("did you mean {path}?").format(path=shown(root.with_name(near[0]))) if near else ""
        raise UserError(_("there is no folder {path}").format(path=shown(root)), "", do)
    files, folders, left_out, ignored = _walk(root)
    rows, merged = _rows(root, files, folders, left_out)
    named = _labels(root, rows, left_out)
    rows, sizes = _each(lambda i: frame_size(root / rows[i].file, pixels), rows, left_out)
    _labels(root, rows, left_out)
    frame = tuple(np.max(sizes, axis=0).tolist())  # (H, W, C)
    image, size = allocate("image", (len(rows), *frame), np.uint8), allocate("size", (len(rows), 2), np.int32)

    def fill(i: int) -> tuple[int, np.ndarray, bool]:
        content = (root / rows[i].file).read_bytes()
        array, turned = decode(content, pixels)
        if any(own > most for own, most in zip(array.shape, frame, strict=True)):
            raise Unreadable(_("changed while it was read"))
        h, w = size[i] = array.shape[:2]
        image[i, h:], image[i, :, w:] = 0, 0
        image[i, :h, :w] = array
        return i, digest(content), turned

    rows, done = _each(fill, rows, left_out)
    labels = _labels(root, rows, left_out)
    index, (at, contents, turned) = {label: k for k, label in enumerate(labels)}, zip(*done, strict=True)
    for to, i in enumerate(at):  # rows that failed are closed up in place: no second copy of the pictures
        if to != i:
            image[to], size[to] = image[i], size[i]
    left_out += [(shown(label), _("no readable picture in this class folder")) for label in named if label not in labels]
    return Examples(
        "pictures",
        fields={"image": image[: len(rows)], "size": size[: len(rows)]},
        label=np.array([index[row.label] for row in rows], np.int64),
        labels=labels,
        digest=np.stack(contents),
        part=np.array([row.part for row in rows], np.uint8),
        names=[shown(row.file) for row in rows],
        left_out=sorted(left_out, key=lambda told: natural(told[0])),
        notes={"ignored": ignored, "merged": merged, "turned": sum(turned)},
    )


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
        except OSError as error:
            left_out.append((shown(folder), error.strerror or str(error)))
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
        what = _("{path} has no class folders with pictures")
        do = _("put the pictures of each class into a folder of its own: {path}/maize, {path}/beans")
        raise UserError(what.format(path=shown(root)), _told(left_out) or _("there is nothing in it"), do.format(path=shown(root)))
    merged = len({(row.label, row.file.parts[depth]) for row in rows}) - len({row.label for row in rows})
    return sorted(rows, key=lambda row: (row.part, natural(row.label), [natural(piece) for piece in row.file.parts])), merged


def _labels(root: Path, rows: list[Row], left_out: LeftOut) -> list[str]:
    """The classes of the rows in natural order; UserError if no classifier can be trained on them."""
    labels = sorted({row.label for row in rows}, key=natural)
    if not rows:
        raise UserError(_("no picture in {path} can be read").format(path=shown(root)), _told(left_out))
    if len(labels) == 1:
        do = _("a classifier needs at least two folders, one for each class; if they lie inside this one, give {path}")
        inner = shown(root / rows[0].file.parts[0])
        raise UserError(_("one class only: {name}").format(name=shown(labels[0])), _told(left_out), do.format(path=inner))
    trained = {row.label for row in rows if row.part in (NONE, TRAIN)}
    if row := next((row for row in rows if row.label not in trained), None):
        what, found = _("the class {name} does not occur in train").format(name=shown(row.label)), _("one of its pictures is {name}")
        raise UserError(what, found.format(name=shown(row.file)), _("add pictures of it to train, or take it out of the other parts"))
    return labels


def _each(work: Callable, rows: list[Row], left_out: LeftOut) -> tuple[list[Row], list]:
    """(the rows for which work(row's number) succeeds, its results), in threads; the others are left out with their reason."""
    kept, results = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            for row, job in zip(block, [pool.submit(work, start + i) for i in range(len(block))], strict=True):
                try:
                    results.append(job.result())
                    kept.append(row)
                except (Unreadable, OSError) as error:
                    left_out.append((shown(row.file), getattr(error, "strerror", None) or str(error)))
    return kept, results


def _told(left_out: LeftOut) -> str:
    return listed((f"{name} ({reason})" for name, reason in left_out), most=3)
