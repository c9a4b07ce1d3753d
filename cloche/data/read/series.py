"""A .csv of one series → Examples of kind "series": a column of times or whole numbers, then columns of numbers, with a header."""

import csv
from pathlib import Path
import re

import numpy as np

from cloche.data.read.examples import Examples, plain, utf8
from cloche.errors import UserError
from cloche.words import _, listed, number

# International airline passengers in thousands a month, 1949 to 1960: Box & Jenkins 1970, "Time Series Analysis", series G.
AIRLINE = """112 118 132 129 121 135 148 148 136 119 104 118 115 126 141 135 125 149 170 170 158 133 114 140 145 150 178 163 172 178 199
199 184 162 146 166 171 180 193 181 183 218 230 242 209 191 172 194 196 196 236 235 229 243 264 272 237 211 180 201 204 188 235 227 234 264
302 293 259 229 203 229 242 233 267 269 270 315 364 347 312 274 237 278 284 277 317 313 318 374 413 405 355 306 271 306 315 301 356 348 355
422 465 467 404 347 305 336 340 318 362 348 363 435 491 505 404 359 310 337 360 342 406 396 420 472 548 559 463 407 362 405 417 391 419 461
472 535 622 606 508 461 390 432"""


def read_airline() -> Examples:
    return _examples([f"{1949 + i // 12}-{i % 12 + 1:02}" for i in range(144)], np.array(AIRLINE.split(), float)[:, None])


def read_series(path: Path) -> Examples:
    """Raises: UserError that names lines, for a byte that is not UTF-8, no number, an uneven time, a column that never changes."""
    text = utf8(path)
    comma = max("\t;,", key=text.partition("\n")[0].count)
    try:
        reader = csv.reader(text.splitlines(True), delimiter=comma, strict=True)
        lines = [(reader.line_num, [c.strip() if comma == "," else c.strip().replace(",", ".") for c in row]) for row in reader if any(row)]
    except csv.Error as fault:
        raise UserError(_("{path} cannot be read as a table").format(path=path), str(fault), _("save it as CSV in UTF-8")) from None
    bad, do = _faults(lines[0][1] if lines else [], lines[1:])
    if bad:
        raise UserError(_("{path} is no series in even steps").format(path=path), listed(bad), do)
    return _examples([c[0] for _line, c in lines[1:]], np.array([c[1:] for _line, c in lines[1:]]).astype(float))


def _examples(names: list[str], values: np.ndarray) -> Examples:
    return plain("series", {"values": values}, names, ((name.encode(), row) for name, row in zip(names, values, strict=True)))


def _faults(names: list[str], rows: list[tuple[int, list[str]]]) -> tuple[list[str], str]:
    """What is wrong, of the first of these: header, cells, times, columns; and what to do about it."""
    if len(names) < 2 or any(_value(name) is not None for name in names) or len(rows) < 3:
        return [_("line 1: {found}; {n} more").format(found=listed(names), n=number(len(rows)))], _("give a header and three lines or more")
    if bad := [_("line {line}: {n} cells, not {m}").format(line=n, n=len(c), m=len(names)) for n, c in rows if len(c) != len(names)]:
        return bad, _("give every line one cell a column")
    read = [_date if _value(rows[0][1][0]) is None else _value] + [_value] * (len(names) - 1)
    if bad := [(n, k, v) for n, c in rows for k, v, f in zip(names, c, read, strict=True) if f(v) is None]:
        bad = [_('line {line}: {name} is "{found}"').format(line=n, name=k, found=v) for n, k, v in bad]
        return bad, _("fill them: a time is 1960-12, 1960-12-31 23:00 or a whole number, all else a number")
    times = np.array([read[0](c[0]) for _n, c in rows])
    if times.dtype.kind == "M":  # months and years are even by the calendar, not in days
        times = times.astype("M8[M]" if (np.diff(np.unique(times)) >= np.timedelta64(28, "D")).all() else "M8[s]").astype(np.int64)
    moves = np.diff(times).round(9)
    steps, counts = np.unique(moves[moves > 0], return_counts=True)
    pairs = [(a, b) for a, b, move in zip(rows, rows[1:], moves, strict=False) if not len(steps) or move != steps[counts.argmax()]]
    if bad := [_("line {line}: {time} after {before}").format(line=b[0], time=b[1][0], before=a[1][0]) for a, b in pairs]:
        return bad, _("give one line for every step, sorted by time, and fill those that are missing")
    return [k for i, k in enumerate(names) if len({read[i](c[i]) for _n, c in rows}) == 1], _("take out the columns that never change")


def _value(cell: str) -> float | None:
    return float(cell) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", cell) else None


def _date(cell: str) -> np.datetime64 | None:
    try:
        return np.datetime64(cell, "s") if re.match(r"\d{4}-\d[^Z+]*$", cell) else None
    except ValueError:
        return None
