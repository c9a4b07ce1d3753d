"""Figures from sums: what is measured adds up over chunks and processes, and becomes a figure at the very end."""

from dataclasses import dataclass
import math

import numpy as np
from torch import Tensor, nn

from cloche.data.chunk import Chunk
from cloche.words import _, number, percent

Nets = dict[str, nn.Module]
Carry = dict[str, Tensor] | None
Sums = dict[str, Tensor]


NAMES = {
    "accuracy": _("accuracy"),
    "mse": _("mean squared error"),
    "mase": _("MASE"),
    "bits_per_byte": _("bits per byte"),
    "exact": _("exact matches"),
    "bleu": _("BLEU"),
    "cer": _("character error rate"),
    "agreement": _("agreement with the prompt"),
    "loss": _("loss"),
}
SHARES = ("accuracy", "exact", "cer", "agreement")  # told in percent
HIGHER = ("accuracy", "exact", "bleu", "agreement")  # the higher the better; of all others the lower


def told(name: str, value: float) -> str:
    """A figure as a person reads it: a share in percent, anything else as a number."""
    return percent(value) if name in SHARES else number(value, 4)


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval (None where none is known) and how many examples it was taken of."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0


def given(chunk: Chunk) -> Tensor:
    """The input of a net that maps: what the data kind calls `image` or `columns`."""
    for name in ("image", "columns"):
        if name in chunk.data:
            return chunk.data[name]
    raise KeyError(f"a chunk with image or columns; found {sorted(chunk.data)}")


def average(sums: Sums, name: str = "loss") -> Figure:
    return Figure(float(sums[name] / sums["n"]), n=int(sums["n"]))


def share(right: float, n: float) -> Figure:
    """right of n with Wilson's score interval.

    Source: E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n <= 0:
        return Figure(math.nan, math.nan, math.nan, 0)
    p, z = right / n, 1.959964
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(p, 0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half, int(n))


def mean(total: float, squares: float, n: float) -> Figure:
    """total / n with the normal interval of a mean, from the sum and the sum of squares."""
    m = total / n
    half = 1.959964 * math.sqrt(max(squares / n - m * m, 0.0) / max(n - 1, 1))
    return Figure(m, m - half, m + half, int(n))


def scores(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and support (K,) from how often each class was told rightly, told, and true.

    A class never predicted has precision 0, one that never occurs recall 0 (scikit-learn's zero_division = 0).
    """
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)  # counts: whole numbers
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return {"precision": precision, "recall": recall, "f1": f1, "support": support, "predicted": predicted}


def averages(table: dict[str, np.ndarray], every: bool = False) -> dict[str, float]:
    """Macro and weighted means of precision, recall and F1, as scikit-learn: over classes that occur or are predicted, or `every` one."""
    there = (table["support"] > 0) | (table["predicted"] > 0) | every
    weight = table["support"] / max(table["support"].sum(), 1)
    out = {}
    for name in ("precision", "recall", "f1"):
        out[f"macro_{name}"] = float(table[name][there].mean()) if there.any() else 0.0
        out[f"weighted_{name}"] = float((table[name] * weight).sum())
    return out
