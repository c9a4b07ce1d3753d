"""The built-in set `dates`: a date as people of six languages write it → ISO, or as those of another language write it.

    <iso>ijumaa, 15 Machi 2024   → 2024-03-15
    <pl>Mar 15, 2024             → 15 marca 2024
    <uk>vrydag 15 Maart 2024     → пʼятниця, 15 березня 2024 р.

The mark at the beginning says what is wanted. A full date stays full, so that its weekday is read off and not worked out; a long or a
medium one becomes long: the target follows from the source. The words are those of the Unicode consortium's CLDR, which Babel carries.
"""

from datetime import date, timedelta
import re

from babel.dates import format_date, get_date_format
import numpy as np

from cloche import rng
from cloche.data.pairs import examples
from cloche.data.read.examples import Examples, digest

LANGUAGES = ("en", "hi", "sw", "af", "uk", "pl")
FORMS = ("full", "long", "medium")
FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)


def written(day: date, language: str, form: str) -> str:
    """The date in words, its year with four digits, narrow spaces as the ones that a keyboard gives."""
    pattern = re.sub("y+", "y", get_date_format(form, language).pattern)
    return format_date(day, pattern, language).replace("\u202f", " ").replace("\xa0", " ")


def pair(day: date, language: str, form: str, wanted: str) -> tuple[str, str]:
    """Source and target; wanted: one of LANGUAGES, or "iso"."""
    source = f"<{wanted}>{written(day, language, form)}"
    return source, day.isoformat() if wanted == "iso" else written(day, wanted, "full" if form == "full" else "long")


def read_dates(rows: int) -> Examples:
    """`rows` pairs: a day of 1900 … 2099, a language and a form drawn for each; half of them into ISO. Pairs of one day stay together."""
    g, n = rng.generator("dates", rows), len(LANGUAGES)
    days, language, form = g.integers((LAST - FIRST).days + 1, size=rows), g.integers(n, size=rows), g.integers(len(FORMS), size=rows)
    other, iso = (language + g.integers(1, n, rows)) % n, g.random(rows) < 0.5
    dates = [FIRST + timedelta(int(d)) for d in days]
    drawn = zip(dates, language, form, np.where(iso, n, other), strict=True)
    pairs = [pair(day, LANGUAGES[a], FORMS[f], (*LANGUAGES, "iso")[b]) for day, a, f, b in drawn]
    group = np.stack([digest(day.isoformat().encode()) for day in dates])
    return examples([(a.encode(), b.encode()) for a, b in pairs], [a for a, _b in pairs], group=group)
