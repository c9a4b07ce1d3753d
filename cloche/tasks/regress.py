"""A number, or several: mean squared error."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cloche.config import Port, RecipeError, TaskConfig, instead
from cloche.data.chunk import Chunk, Part
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, average, given, mean
from cloche.tasks.task import Task
from cloche.words import _


class RegressConfig(TaskConfig):
    kind: Literal["regress"] = "regress"
    fits: ClassVar = ("pictures", "columns")

    def resolve(self, facts: dict[str, Any]) -> "RegressConfig":
        if facts["labels"]:
            raise RecipeError([instead("task.kind", "regress", _("the labels of this data are classes"), "classify")])
        return self

    def build(self, prepare: Any, facts: dict[str, Any]) -> "Regress":
        return Regress(prepare.port, facts["outputs"])


class Regress(Task):
    face: ClassVar = "maps"
    choose: ClassVar = ("mse", -1)
    headline: ClassVar = "mse"

    def __init__(self, inputs: Port, outputs: int) -> None:
        self.ports = {"net": (inputs, Port("vector", (outputs,)))}

    def measure(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Sums, Carry, dict[str, Tensor]]:
        y, target, w = self._values(nets, chunk), chunk.data["label"].double(), chunk.weight.double()
        errors, apart = (y - chunk.data["label"]).square().mean(1), (y - target).abs().mean(1)
        sums = {"loss": (errors * w).sum(), "squares": (errors.double().square() * w).sum(), "absolute": (apart * w).sum(), "n": w.sum()}
        sums |= {"y": (target * w[:, None]).sum(0), "yy": (target.square() * w[:, None]).sum(0)}
        return sums, None, {"loss": errors, "predicted": y[:, 0], "probability": torch.ones_like(errors)}

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        rows = self._values(nets, chunk).tolist()
        return [{"value": row[0]} if len(row) == 1 else {"values": row} for row in rows]

    def figures(self, sums: Sums) -> dict[str, Figure]:
        """mse, mae and, where the values vary, r2 (the share of the variance that is explained)."""
        mse, n = mean(float(sums["loss"]), float(sums["squares"]), float(sums["n"])), sums["n"]
        variance = float((sums["yy"] / n - (sums["y"] / n).square()).mean())
        r2 = {"r2": Figure(1 - mse.value / variance, n=int(n))} if variance > 0 else {}
        return {"mse": mse, "mae": average(sums, "absolute"), **r2, "loss": average(sums)}

    def known(self, train: Part) -> dict[str, Any]:
        return {"label": train.field("label").mean(0).tolist()}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        """What always giving the training part's mean gets."""
        errors = np.square(part.field("label") - np.array(known["label"], np.float32)).mean(1)
        figure = mean(float(errors.sum()), float(np.square(errors).sum()), len(part))
        return {_('always answering "{answer}"').format(answer=f"{known['label'][0]:.3g}"): figure}

    def _values(self, nets: Nets, chunk: Chunk) -> Tensor:
        return nets["net"](given(chunk)).float().reshape(len(chunk.ids), -1)  # (B, K)

    def losses(self, nets: Nets, chunk: Chunk) -> Tensor:
        return (self._values(nets, chunk) - chunk.data["label"]).square().mean(1)
