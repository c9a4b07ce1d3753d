"""A number, or several: mean squared error."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cloche.config import Frozen, Port
from cloche.data.chunk import Chunk
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, given, mean


class RegressConfig(Frozen):
    kind: Literal["regress"] = "regress"

    def resolve(self, outputs: int, multi: bool) -> "RegressConfig":
        return self

    def build(self, labels: tuple[str, ...], outputs: int, multi: bool) -> "Regress":
        return Regress(outputs)


class Regress:
    face: ClassVar = "maps"
    choose: ClassVar = ("mse", -1)

    def __init__(self, outputs: int) -> None:
        self.outputs = Port("vector", (outputs,))

    def count(self, chunk: Chunk) -> Tensor:
        return chunk.weight.sum()

    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        return (self._errors(self._values(nets, chunk), chunk) * chunk.weight).sum(), None, {}

    def measure(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Sums, Carry, dict[str, Tensor]]:
        y = self._values(nets, chunk)
        errors, w, target = self._errors(y, chunk), chunk.weight.double(), chunk.data["label"].double()
        apart = (y - target).abs().mean(1)
        sums = {"loss": (errors * w).sum(), "squares": (errors.double().square() * w).sum(), "absolute": (apart * w).sum(), "n": w.sum()}
        sums |= {"y": (target * w[:, None]).sum(0), "yy": (target.square() * w[:, None]).sum(0)}
        return sums, None, {"loss": errors, "predicted": y[:, 0], "probability": torch.ones_like(errors)}

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        rows = self._values(nets, chunk).tolist()
        return [{"value": row[0]} if len(row) == 1 else {"values": row} for row in rows]

    def figures(self, sums: Sums) -> dict[str, Figure]:
        """mse, mae and, where the values vary, r2 (the share of the variance that is explained)."""
        n = float(sums["n"])
        mse = mean(float(sums["loss"]), float(sums["squares"]), n)
        variance = float((sums["yy"] / n - (sums["y"] / n).square()).mean())
        r2 = {"r2": Figure(1 - mse.value / variance, n=int(n))} if variance > 0 else {}
        return {"mse": mse, "mae": Figure(float(sums["absolute"]) / n, n=int(n)), **r2, "loss": Figure(mse.value, n=int(n))}

    def baseline(self, label: np.ndarray, train: np.ndarray) -> tuple[Figure, str]:
        """What always giving the training part's mean gets on `label`."""
        common = train.mean(0)
        errors = np.square(label - common).mean(1)
        return mean(float(errors.sum()), float(np.square(errors).sum()), len(label)), f"{common[0]:.3g}"

    def _values(self, nets: Nets, chunk: Chunk) -> Tensor:
        return nets["net"](given(chunk)).float().reshape(len(chunk.ids), -1)  # (B, K)

    def _errors(self, y: Tensor, chunk: Chunk) -> Tensor:
        return (y - chunk.data["label"]).square().mean(1)  # (B,)
