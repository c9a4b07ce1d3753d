"""A series as windows: rows behind an origin t and the rows that follow it, as changes from one season to the next.

    past y … y(t−1) │ future y(t) … y(t+horizon−1)     z(i) = (log y(i) − log y(i−season) − mean) / std, or without log
    past z … z(t−1) │ future z(t) − z(t−1) …           what the net reads and gives

So a net that gives 0 says: the last change goes on.
"""

import csv
from dataclasses import replace
from pathlib import Path
import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
import torch
from torch import Tensor
import torch.nn.functional as F

from cloche.config import Frozen, Port
from cloche.data.chunk import Chunk
from cloche.data.prepare import Scaled
from cloche.data.read.examples import Examples, examples_of, utf8
from cloche.data.table import Table
from cloche.errors import UserError
from cloche.words import _, listed, number

# International airline passengers in thousands a month, 1949 to 1960: Box & Jenkins 1970, "Time Series Analysis", series G.
AIRLINE = """112 118 132 129 121 135 148 148 136 119 104 118 115 126 141 135 125 149 170 170 158 133 114 140 145 150 178 163 172 178 199
199 184 162 146 166 171 180 193 181 183 218 230 242 209 191 172 194 196 196 236 235 229 243 264 272 237 211 180 201 204 188 235 227 234 264
302 293 259 229 203 229 242 233 267 269 270 315 364 347 312 274 237 278 284 277 317 313 318 374 413 405 355 306 271 306 315 301 356 348 355
422 465 467 404 347 305 336 340 318 362 348 363 435 491 505 404 359 310 337 360 342 406 396 420 472 548 559 463 407 362 405 417 391 419 461
472 535 622 606 508 461 390 432"""

Size = Annotated[int, Field(ge=1, le=100_000)]


class SeriesConfig(Frozen):
    kind: Literal["series"] = "series"
    source: str = Field(description=_("a set that needs no download, or a path"))
    look: Size = Field(12, description=_("rows that the net looks back over"))
    horizon: Size = Field(12, description=_("rows that are foretold"))
    season: Size = Field(12, description=_("rows after which the series repeats itself; 1 where it does not"))
    origins: int = Field(24, ge=1, le=1_000_000, description=_("the last points in time, from which the test foretells"))
    log: bool = Field(False, description=_("changes as ratios: for numbers above zero that grow by a share"))

    def parts(self, store: Any) -> dict[str, np.ndarray]:
        """Cut in time: the test part is what is foretold from its origins, nothing else."""
        cut, least = store.n - self.origins - self.horizon + 1, max(self.look, self.season) + self.season + self.horizon + 1
        if cut < least:
            do = _("{n} more are needed, or a smaller data.look, data.season, data.horizon or data.origins").format(n=least - cut)
            raise UserError(_("the series is too short"), _("{n} rows").format(n=store.n), do)
        return {"train": np.arange(cut), "validation": np.empty(0, np.int64), "test": np.arange(cut, store.n)}


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
    return examples_of("series", {"values": values}, names, ((name.encode(), row) for name, row in zip(names, values, strict=True)))


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


class SeriesPrepare(Scaled):
    """Gives past (B, look, F) and future (B, horizon, F); history, truth and scale in the series' own unit, float64."""

    kind: Literal["series"] = "series"
    look: Size
    horizon: Size
    season: Size
    log: bool
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[float, ...] = Field(strict=False)
    labels: tuple[str, ...] = Field((), strict=False)

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: SeriesConfig) -> "SeriesPrepare":
        plain = cls(look=config.look, horizon=config.horizon, season=config.season, log=config.log, mean=(), std=())
        y = plain.checked(store.fields["values"].numpy(), store.names, 0)[rows["train"]]
        std, mean = torch.std_mean(plain.changes(torch.from_numpy(y)[None])[0], 0)  # (F,) each
        if std.min() < 1e-9:
            raise UserError(_("from season to season this series only repeats itself"), "", _("set data.season to its real one"))
        return plain.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple(std.tolist())})

    @property
    def port(self) -> Port:
        return Port("series", (self.look, len(self.std)))

    @property
    def behind(self) -> int:  # rows that must lie before an origin
        return max(self.look, self.season) + self.season

    def checked(self, values: np.ndarray, names: Any, least: int) -> np.ndarray:
        """Raises: UserError where rows or columns lack, or a number has no logarithm."""
        if len(values) < least or values.shape[1] != len(self.std or values[0]):
            what, found = _("this run needs {n} rows of {m} numbers").format(n=least, m=len(self.std)), _("{n} rows of {m}")
            raise UserError(what, found.format(n=len(values), m=values.shape[1]))
        if len(low := np.flatnonzero((values <= 0).any(1) & self.log)):
            found = listed(f"{names[i]}: {values[i].min():g}" for i in low)
            raise UserError(_("data.log = true needs numbers above zero"), found, _("set data.log=false"))
        return values

    def view(self, store: Any, ids: np.ndarray) -> tuple["Windows", np.ndarray]:
        values = self.checked(store.fields["values"].cpu().numpy(), store.names, self.behind + self.horizon)
        return Windows(values, store.names, self), np.arange(max(ids[0], self.behind), ids[-1] + 2 - self.horizon)

    def encode(self, given: Any) -> dict[str, np.ndarray]:
        """A .csv or rows of numbers, of which the last count: what follows them is foretold."""
        values = read_series(Path(given)).fields["values"] if isinstance(given, str | Path) else np.array(given, float)
        values = values.reshape(len(values), -1)
        return {"history": self.checked(values, range(1, len(values) + 1), self.behind)[-self.behind :]}

    def changes(self, y: Tensor) -> Tensor:
        x = y.log() if self.log else y
        return x[:, self.season :] - x[:, : -self.season]  # (B, T − season, F)

    def device(self, chunk: Chunk) -> Chunk:
        z, t = self.changes(torch.cat([chunk.data[k] for k in ("history", "truth") if k in chunk.data], 1)), self.behind - self.season
        z = (z - z.new_tensor(self.mean)) / z.new_tensor(self.std)
        past, future = z[:, t - self.look : t].float(), (z[:, t:] - z[:, t - 1 : t]).float()
        return replace(chunk, data={**chunk.data, "past": past, "future": future})

    def undo(self, prepared: Tensor, chunk: Chunk) -> Tensor:
        """(B, horizon, F) → the series' own unit, float64: the last season and, on top, the changes of every season since."""
        history, turns = chunk.data["history"], -(-self.horizon // self.season)
        z = prepared * history.new_tensor(self.std) + self.changes(history)[:, -1:]
        z = F.pad(z, (0, 0, 0, turns * self.season - self.horizon)).unflatten(1, (turns, self.season)).cumsum(1)
        last = history[:, None, -self.season :]  # (B, 1, season, F)
        return (last * z.exp() if self.log else last + z).flatten(1, 2)[:, : self.horizon]


class Windows(Table):
    """Rows by origin, the first row that is foretold. A view: windows are cut out of the one array when they are asked for."""

    def __init__(self, values: np.ndarray, names: list[str] | None, prepare: SeriesPrepare) -> None:
        season = prepare.season
        mean = np.abs(values[season:] - values[:-season]).cumsum(0) / np.arange(1, len(values) - season + 1)[:, None]
        scale = np.concatenate([np.zeros_like(values[: season + 1]), mean[:-1]])  # (n, F), each over all rows before it
        super().__init__({"values": values, "scale": scale}, names)
        self.behind, self.width = prepare.behind, prepare.behind + prepare.horizon

    def rows(self, ids: np.ndarray) -> dict[str, Tensor]:
        at = torch.from_numpy(np.asarray(ids, np.int64)).to(self.fields["values"].device)
        both = self.fields["values"].unfold(0, self.width, 1)[at - self.behind].transpose(1, 2)  # (B, behind + horizon, F)
        return {"history": both[:, : self.behind], "truth": both[:, self.behind :], "scale": self.fields["scale"][at]}
