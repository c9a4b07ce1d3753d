"""A series as windows: rows behind an origin t and the rows that follow it, as changes from one season to the next.

    past y … y(t−1) │ future y(t) … y(t+horizon−1)     z(i) = (log y(i) − log y(i−season) − mean) / std, or without log
    past z … z(t−1) │ future z(t) − z(t−1) …           what the net reads and gives

So a net that gives 0 says: the last change goes on.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
import torch
from torch import Tensor
import torch.nn.functional as F

from cloche.config import Frozen, Port
from cloche.data.chunk import Chunk
from cloche.data.prepare import Scaled
from cloche.data.read.series import read_series
from cloche.data.table import Table
from cloche.errors import UserError
from cloche.words import _, listed

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

    def gather(self, encoded: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return {"history": torch.from_numpy(np.stack([e["history"] for e in encoded]))}

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
