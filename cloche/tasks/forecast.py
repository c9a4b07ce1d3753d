"""What comes next in a series: every row of the horizon at once, scored by how much better it is than last season's values.

MASE of an origin = mean |y − ŷ| over its horizon / mean |y(i) − y(i−season)| over all rows i before the origin.
Source: Hyndman & Koehler 2006, "Another look at measures of forecast accuracy", on scaled errors; with a season, their seasonal naive.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cloche.config import Port, TaskConfig
from cloche.data.chunk import Chunk, Part
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, average, mean
from cloche.tasks.task import Task
from cloche.words import _


class ForecastConfig(TaskConfig):
    kind: Literal["forecast"] = "forecast"
    fits: ClassVar = ("series",)

    def build(self, prepare: Any, facts: dict[str, Any]) -> "Forecast":
        return Forecast(prepare)


class Forecast(Task):
    """Squared error on prepared values; MASE and the mean absolute error in the series' own unit."""

    face: ClassVar = "maps"
    choose: ClassVar = ("mase", -1)
    headline: ClassVar = "mase"

    def __init__(self, prepare: Any) -> None:
        self.prepare = prepare
        self.ports = {"net": (prepare.port, Port("series", (prepare.horizon, prepare.port.shape[1])))}

    def losses(self, nets: Nets, chunk: Chunk) -> Tensor:
        return self._errors(nets["net"](chunk.data["past"]).float(), chunk)

    def measure(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Sums, Carry, dict[str, Tensor]]:
        y = nets["net"](chunk.data["past"]).float()
        losses, found = self._errors(y, chunk), self.prepare.undo(y, chunk)
        mase, apart, w = scaled(found, chunk), (found - chunk.data["truth"]).abs().mean((1, 2)), chunk.weight.double()
        sums = {"loss": (losses * w).sum(), "n": w.sum(), "absolute": (apart * w).sum()}
        sums |= {"mase": (mase * w).sum(), "squares": (mase.square() * w).sum()}
        return sums, None, {"loss": losses, "mase": mase}

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        """The values of the horizon in the series' own unit; of several columns a list for each row."""
        rows = self.prepare.undo(nets["net"](chunk.data["past"]).float(), chunk)  # (B, horizon, F)
        return [{"values": row} for row in (rows[..., 0] if rows.shape[2] == 1 else rows).tolist()]

    def figures(self, sums: Sums) -> dict[str, Figure]:
        """The interval takes the origins as independent; their futures overlap, so it is rather too narrow."""
        mase = mean(*(float(sums[k]) for k in ("mase", "squares", "n")))
        return {"mase": mase, "mae": average(sums, "absolute"), "loss": average(sums)}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        """MASE of four forecasts that need no training, from the same origins; the last is what a net that gives 0 says."""
        found: dict[str, list[Tensor]] = {}
        for _i, c in part.once(1024):
            past, p = c.data["history"], self.prepare
            said = {_("the last value"): seasonal(past, 1, p.horizon), _("the last season"): seasonal(past, p.season, p.horizon)}
            said[_("the last season and its growth")] = growing(past, p.season, p.horizon)
            said[_("the last season and its latest change")] = p.undo(torch.zeros_like(c.data["future"]), c)
            for name, y in said.items():
                found.setdefault(name, []).append(scaled(y, c)[c.weight > 0])
        return {k: mean(float((m := torch.cat(rows)).sum()), float(m.square().sum()), len(m)) for k, rows in found.items()}

    def _errors(self, y: Tensor, chunk: Chunk) -> Tensor:
        return (y - chunk.data["future"]).square().mean((1, 2))  # (B,)


def scaled(found: Tensor, chunk: Chunk) -> Tensor:
    """(B,) MASE of forecasts (B, horizon, F); a column that was flat over all rows before an origin counts in its own unit."""
    scale = torch.where(chunk.data["scale"] > 0, chunk.data["scale"], 1.0)
    return ((found - chunk.data["truth"]).abs().mean(1) / scale).mean(1)


def seasonal(history: Tensor, season: int, horizon: int) -> Tensor:
    """The last `season` rows, again and again."""
    return history[:, -season:].repeat(1, -(-horizon // season), 1)[:, :horizon]


def growing(history: Tensor, season: int, horizon: int) -> Tensor:
    """The last season times its growth over the one before, once more for every season ahead."""
    last, before = (rows.sum(1, keepdim=True) for rows in (history[:, -season:], history[:, -2 * season : -season]))
    ahead = torch.arange(horizon, device=history.device)[:, None] // season + 1  # (horizon, 1)
    return seasonal(history, season, horizon) * torch.where(before == 0, 1.0, last / before) ** ahead
