"""Sets that need no download: `digits` from scikit-learn, `spirals` and `curve` made with a known truth."""

from collections.abc import Callable
from datetime import date, timedelta
import re
from typing import Any

from babel.dates import format_date, get_date_format
import numpy as np

from cloche import rng
from cloche.data.audio import read_dialtones
from cloche.data.captions import spoken
from cloche.data.pairs import examples
from cloche.data.read.examples import Examples, digest, examples_of
from cloche.data.series import read_airline
from cloche.data.text import read_pydocs

LANGUAGES = ("en", "hi", "sw", "af", "uk", "pl")
FORMS = ("full", "long", "medium")
FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)


def read_digits() -> Examples:
    """1 797 handwritten digits, 8×8, sixteen greys (E. Alpaydin and C. Kaynak, UCI 1998), as scikit-learn ships them."""
    from sklearn.datasets import load_digits  # here: it takes a second, and the store remembers

    found = load_digits()
    image = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    fields = {"image": image, "size": np.full((len(image), 2), 8, np.int32)}
    return _examples("pictures", fields, "digit", label=found.target.astype(np.int64), labels=[str(k) for k in range(10)])


def read_spirals(rows: int, noise: float) -> Examples:
    """Two arms that wind round each other, 1½ turns: no straight line parts them."""
    g = rng.generator("spirals", rows)
    label = np.arange(rows) % 2
    along = np.sqrt(g.uniform(0.02, 1, rows))  # even over the plane, so that the outer turns are not thin
    angle = along * 3 * np.pi + label * np.pi
    x = np.stack([along * np.cos(angle), along * np.sin(angle)], 1) + noise * g.standard_normal((rows, 2))
    fields, labels = {"columns": x.astype(np.float32)}, ["clockwise", "anticlockwise"]
    return _examples("columns", fields, "point", label=label.astype(np.int64), labels=labels)


def read_curve(rows: int, noise: float) -> Examples:
    """y = sin 3x + 0.3 x and noise, x in −3..3."""
    g = rng.generator("curve", rows)
    x = g.uniform(-3, 3, (rows, 1))
    y = np.sin(3 * x) + 0.3 * x + noise * g.standard_normal((rows, 1))
    return _examples("columns", {"columns": x.astype(np.float32)}, "point", label=y.astype(np.float32))


def written(day: date, language: str, form: str) -> str:
    """The date in words, its year with four digits, narrow spaces as the ones that a keyboard gives."""
    pattern = re.sub("y+", "y", get_date_format(form, language).pattern)
    return format_date(day, pattern, language).replace("\u202f", " ").replace("\xa0", " ")


def pair(day: date, language: str, form: str, wanted: str) -> tuple[str, str]:
    """Source and target; wanted: one of LANGUAGES, or "iso"."""
    source = f"<{wanted}>{written(day, language, form)}"
    return source, day.isoformat() if wanted == "iso" else written(day, wanted, "full" if form == "full" else "long")


def read_dates(rows: int) -> Examples:
    """`rows` pairs: a date as people of six languages write it → ISO, or as those of another language write it, half of them each.

        <iso>ijumaa, 15 Machi 2024   → 2024-03-15
        <pl>Mar 15, 2024             → 15 marca 2024

    The mark says what is wanted. A full date stays full, so that its weekday is read off and not worked out; a long or a medium one
    becomes long: the target follows from the source. The words are CLDR's, which Babel carries. Pairs of one day stay together.
    """
    g, n = rng.generator("dates", rows), len(LANGUAGES)
    days, language, form = g.integers((LAST - FIRST).days + 1, size=rows), g.integers(n, size=rows), g.integers(len(FORMS), size=rows)
    other, iso = (language + g.integers(1, n, rows)) % n, g.random(rows) < 0.5
    dates = [FIRST + timedelta(int(d)) for d in days]
    drawn = zip(dates, language, form, np.where(iso, n, other), strict=True)
    pairs = [pair(day, LANGUAGES[a], FORMS[f], (*LANGUAGES, "iso")[b]) for day, a, f, b in drawn]
    group = np.stack([digest(day.isoformat().encode()) for day in dates])
    return examples([(a.encode(), b.encode()) for a, b in pairs], [a for a, _b in pairs], group=group)


def _examples(kind: str, fields: dict[str, np.ndarray], name: str, **labels: Any) -> Examples:
    rows = next(iter(fields.values()))
    return examples_of(kind, fields, [f"{name} {i}" for i in range(len(rows))], ((row,) for row in rows), **labels)


# name → (kind, reader, the keys of [data] that it takes)
BUILTIN: dict[str, tuple[str, Callable[..., Examples], tuple[str, ...]]] = {
    "digits": ("pictures", read_digits, ()),
    "spirals": ("columns", read_spirals, ("rows", "noise")),
    "curve": ("columns", read_curve, ("rows", "noise")),
    "airline": ("series", read_airline, ()),
    "pydocs": ("text", read_pydocs, ()),
    "dates": ("pairs", read_dates, ("rows",)),
    "digits-captions": ("captions", lambda: spoken(read_digits()), ()),
    "dialtones": ("audio", read_dialtones, ("rows", "snr_db")),
}
