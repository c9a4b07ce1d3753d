"""What every reader returns: examples as they came, decoded but not yet prepared, each with its content hash."""

from collections.abc import Iterable
from dataclasses import dataclass, field
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cloche.errors import UserError
from cloche.words import _, number

NONE, TRAIN, VALIDATION, TEST = 0, 1, 2, 3  # the part that the source itself gives an example


@dataclass(frozen=True)
class Examples:
    """Rows of a source.

    fields: arrays with rows first: `image` (n, H, W, C) uint8 with each picture in the top-left corner and `size`
        (n, 2) int32 its own height and width, or `columns` (n, F) float32; text and sound as Ragged.
    label: (n,) int64 into `labels`; or float32, (n, K) zeros and ones for K labels, (n, 1) for a number.
    digest: (n, 16) uint8, hash of the content: twins share it. part: (n,) uint8, NONE where the source says nothing.
    group: (n, 16) uint8, what must stay in one part; the digest where it is None.
    names: what a message calls each row. left_out: (name, reason) of what could not be read. notes: counts for the person.
    """

    kind: str
    fields: dict[str, Any]
    label: np.ndarray
    labels: list[str]
    digest: np.ndarray
    part: np.ndarray
    names: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    group: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.digest)


def examples_of(kind: str, fields: dict[str, Any], names: list[str], contents: Iterable[tuple], **more: Any) -> Examples:
    """Examples without parts, and without classes where `more` gives none. contents: for each row, what its hash is taken of."""
    digests, none = np.stack([digest(*c) for c in contents]), np.zeros(len(names), np.int64)
    return Examples(
        **{"label": none, "labels": [], **more}, kind=kind, fields=fields, names=names, digest=digests, part=none.astype(np.uint8)
    )


def digest(*contents: bytes | memoryview | np.ndarray) -> np.ndarray:
    """(16,) uint8 hash of what an example is made of."""
    h = hashlib.blake2b(digest_size=16)
    for c in contents:
        h.update(np.ascontiguousarray(c) if isinstance(c, np.ndarray) else c)
    return np.frombuffer(h.digest(), np.uint8)


def row_digests(rows: np.ndarray) -> np.ndarray:
    """(n, 16) uint8, a hash for each row of an array."""
    return np.stack([digest(row) for row in rows])


def utf8(path: Path) -> str:
    """The text of a file, its line ends as \\n. Raises: UserError with the place of the first byte that is no UTF-8."""
    try:
        content = path.read_bytes()
        return content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except OSError as fault:
        raise UserError(_("{path} cannot be read").format(path=path), fault.strerror or "") from None
    except UnicodeDecodeError as fault:
        told = _("byte {byte}: 0x{value}").format(byte=number(fault.start), value=f"{content[fault.start]:02x}")
        raise UserError(_("{path} is not UTF-8").format(path=path), told, _("save it as UTF-8")) from None
