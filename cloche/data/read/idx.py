"""The IDX files of MNIST and its relatives, packed by gzip or not → Examples of kind "pictures"."""

import gzip
from math import prod
from pathlib import Path
import re
import zlib

import numpy as np
from PIL import Image

from cloche.data.pictures import shrunk
from cloche.data.read.examples import NONE, TEST, TRAIN, Examples, row_digests
from cloche.errors import UserError
from cloche.words import _, number

NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
MAX_BYTES = 1 << 31  # 2.7 million pictures of 28 × 28


def looks_like_idx(root: Path) -> bool:
    """Whether a folder holds a file of pictures with one of MNIST's names."""
    return any(kind == "images" for part, kind in _found(root))


def read_idx(root: Path, pixels: int) -> Examples:
    """ROOT/train-images-idx3-ubyte.gz and its three companions: the rows of train, then those of test.

    Returns: `image` (n, h, w, 1) uint8, h and w ≤ pixels; `size` (n, 2) int32; labels "0" … the largest that occurs.
    Raises: UserError if train or a file of labels is missing, or a file is not what its header promises.
    """
    found = _found(root)
    if ("train", "images") not in found:
        do = _("add {name}").format(name="train-images-idx3-ubyte.gz")
        raise UserError(_("{path} lacks the training pictures").format(path=root), "", do)
    parts = [part for part in ("train", "test") if (part, "images") in found]
    images, labels = zip(*(_pair(found, part) for part in parts), strict=True)  # each (n, h, w), (n,)
    shapes = [" × ".join(map(str, rows.shape[1:])) for rows in images]
    if len(set(shapes)) > 1:
        told = _("{train} in train, {test} in test").format(train=shapes[0], test=shapes[1])
        raise UserError(_("the pictures of train and test differ in size"), told, _("download or copy them again"))
    rows, label = np.concatenate(images), np.concatenate(labels).astype(np.int64)
    small = rows if max(rows.shape[1:]) <= pixels else np.stack([np.asarray(shrunk(Image.fromarray(row), pixels)) for row in rows])
    return Examples(
        kind="pictures",
        fields={"image": small[..., None], "size": np.full((len(rows), 2), small.shape[1:], np.int32)},
        label=label,
        labels=[str(k) for k in range(label.max() + 1)],
        digest=row_digests(rows),
        part=np.repeat(np.array([TRAIN, TEST] if len(parts) > 1 else [NONE], np.uint8), [*map(len, images)]),  # train alone: no split
        names=[f"{part} {i}" for part, found in zip(parts, images, strict=True) for i in range(len(found))],
    )


def _found(root: Path) -> dict[tuple[str, str], Path]:
    """(train | test, images | labels) → file; of a file and its .gz the unpacked one."""
    names = sorted((path.name for path in root.iterdir() if path.is_file()), reverse=True) if root.is_dir() else []
    return {("train" if m[1] == "train" else "test", m[2]): root / m[0] for m in map(NAME.fullmatch, names) if m}


def _pair(found: dict[tuple[str, str], Path], part: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, h, w) pictures and their (n,) labels."""
    name = found[part, "images"].name
    if (part, "labels") not in found:
        wanted = name.replace("images", "labels").replace("idx3", "idx1")
        raise UserError(_("the labels of {name} are missing").format(name=name), "", _("add {name}").format(name=wanted))
    images, labels = _read(found[part, "images"], 3), _read(found[part, "labels"], 1)
    if len(images) != len(labels):
        counts = _("{n} pictures but {m} labels").format(n=number(len(images)), m=number(len(labels)))
        raise UserError(_("{name} and its labels do not belong together").format(name=name), counts, _("download or copy them again"))
    return images, labels


def _read(path: Path, axes: int) -> np.ndarray:
    """The array in an IDX file of bytes with so many axes; one byte more than promised is read at most, so that no gzip can swell."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            magic, *shape = np.frombuffer(head.ljust(4 + 4 * axes, b"\0"), ">u4").tolist()
            if len(head) < 4 + 4 * axes:
                raise EOFError(_("it ends at byte {byte}, inside its header").format(byte=number(len(head))))
            if magic != 2048 + axes:
                raise ValueError(_("it begins with {found} instead of {wanted}").format(found=magic, wanted=2048 + axes))
            if not 0 < prod(shape) <= MAX_BYTES:
                raise ValueError(_("its header promises {shape} bytes").format(shape=" × ".join(map(number, shape))))
            body = file.read(prod(shape) + 1)
            if len(body) != prod(shape):
                told = _("it has more than the {promised} bytes that its header promises")
                told = told if len(body) > prod(shape) else _("it has {found} bytes, its header promises {promised}")
                raise EOFError(told.format(found=number(len(head) + len(body)), promised=number(len(head) + prod(shape))))
            return np.frombuffer(body, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as fault:
        raise UserError(_("{name} is damaged").format(name=path.name), str(fault), _("download or copy it again")) from None
