"""Every word that a person reads goes through here: gettext, plural forms, numbers as the language writes them."""

from collections.abc import Iterable
import gettext
from pathlib import Path

_catalogue = gettext.translation("cloche", Path(__file__).parent / "lang", fallback=True)


def _(text: str) -> str:
    """The message in the person's language (LANGUAGE, LC_ALL, LC_MESSAGES, LANG), else as written."""
    return _catalogue.gettext(text)


def _n(one: str, many: str, n: int) -> str:
    """The plural form for n: Polish and Ukrainian have three."""
    return _catalogue.ngettext(one, many, n)


def language() -> str:
    """The language of the catalogue in use, "en" where there is none."""
    return _catalogue.info().get("language", "en")


def number(value: float, digits: int = 0) -> str:
    """12345.678, 1 → "12 345.7"; the decimal sign is the language's own."""
    # Translators: the decimal sign of your language, one character.
    text = f"{value:,.{digits}f}".replace(",", "\u00a0")
    return text.replace(".", _(".")) if digits else text


def percent(share: float, digits: int = 1) -> str:
    """0.983 → "98.3 %"."""
    return f"{number(100 * share, digits)}\u00a0%"


def duration(seconds: float) -> str:
    """371 → "6 min 11 s"; under ten seconds with one digit."""
    if seconds < 10:
        return f"{number(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Bytes as a person reads them: 38_144_296 → "38.1 MB"."""
    unit = 0
    while count >= 1000 and unit < 3:
        count, unit = count / 1000, unit + 1
    return f"{number(count, 0 if unit == 0 or count >= 100 else 1)} {('B', 'kB', 'MB', 'GB')[unit]}"


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    more = len(names) - most
    text = ", ".join(names[:most])
    return text if more <= 0 else _("{names} and {n} more").format(names=text, n=number(more))
