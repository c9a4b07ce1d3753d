"""Arrays known by row number: fixed fields (n, …) and ragged ones, padded when rows are taken out of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

GRID = 8  # padded lengths are multiples of it: few shapes, aligned for the kernels


@dataclass
class Ragged:
    """Rows of different lengths, end to end: row i is values[offsets[i] : offsets[i + 1]]; values (N, …), offsets (n + 1,) int64."""

    values: Any  # an array, in a table a tensor
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: list[Any], dtype: Any) -> "Ragged":
        """From a list of rows: arrays, lists of numbers, or bytes."""
        arrays = [np.frombuffer(r, np.uint8) if isinstance(r, bytes) else np.asarray(r) for r in rows]
        values = np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
        return cls(values, np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Any:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def texts(self, ids: np.ndarray) -> list[str]:
        """Rows of UTF-8 bytes, read."""
        values = np.asarray(torch.as_tensor(self.values).cpu())
        return [bytes(values[self.offsets[i] : self.offsets[i + 1]]).decode() for i in ids]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows padded with zeros to a multiple of GRID (B, L, …), and their lengths (B,) int64."""
        start, length = self.offsets[ids], self.offsets[ids + 1] - self.offsets[ids]
        place = np.arange(on_grid(int(length.max())))
        inside = place < length[:, None]  # (B, L)
        at = torch.from_numpy(np.where(inside, start[:, None] + place, 0)).to(self.values.device)
        outside = torch.from_numpy(~inside).to(self.values.device)
        rows = self.values[at] if len(self.values) else self.values.new_zeros((*at.shape, *self.values.shape[1:]))
        rows[outside] = 0
        return rows, torch.from_numpy(length).to(self.values.device)


def on_grid(length: Any) -> Any:
    """A length, or an array of them, rounded up; at least GRID."""
    return np.maximum(1, -(-length // GRID)) * GRID


class Table:
    """fields: name → (n, …) or Ragged. A ragged field `x` comes out padded, beside `x_len`.

    main: the ragged field whose lengths say what a row costs. running: whether row i goes on where row i − 1 ended.
    """

    running = False

    def __init__(self, fields: dict[str, Any], names: list[str] | None = None, main: str = "") -> None:
        self.fields = {
            k: Ragged(torch.from_numpy(f.values), f.offsets) if isinstance(f, Ragged) else torch.from_numpy(f) for k, f in fields.items()
        }
        self.n = len(next(iter(self.fields.values())))
        self.names = names
        self.lengths: np.ndarray | None = self.fields[main].lengths if main else None

    def to(self, device: torch.device) -> "Table":
        """Data that fits lives on the device."""
        for k, f in self.fields.items():
            self.fields[k] = Ragged(f.values.to(device), f.offsets) if isinstance(f, Ragged) else f.to(device)
        return self

    def rows(self, ids: np.ndarray) -> dict[str, Tensor]:
        out, ids = {}, np.asarray(ids, np.int64)
        for k, f in self.fields.items():
            if isinstance(f, Ragged):
                out[k], out[f"{k}_len"] = f.take(ids)
            else:
                out[k] = f.index_select(0, torch.from_numpy(ids).to(f.device))
        return out

    def name(self, i: int) -> str:
        return self.names[i] if self.names else str(i)
