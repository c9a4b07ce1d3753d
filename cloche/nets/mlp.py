"""The perceptron of many layers: `z = W·x + b`, an activation, and so on to the output.

    x (B, F) ─ fc1 ─ norm? ─ activation ─ dropout? ─ … ─ fcN ─ y (B, K)

Without activations the whole is one linear map; with them it approximates any continuous function (Hornik 1991).
Source: Rumelhart, Hinton & Williams 1986; dropout Srivastava 2014.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cloche.config import NetConfig, Port
from cloche.nets.parts import ACTIVATIONS, Activation, BatchNorm, Dropout
from cloche.words import _


class MlpConfig(NetConfig):
    kind: Literal["mlp"] = "mlp"
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 64), strict=False, max_length=200, description=_("neurons of each hidden layer")
    )
    activation: Activation = Field("relu", description=_("what follows each hidden layer"))
    norm: Literal["none", "batch"] = Field("none", description=_("normalisation before the activation"))
    dropout: float = Field(0.0, ge=0, lt=1, description=_("share of hidden values zeroed while training"))

    faces: ClassVar = ("maps",)

    def build(self, inputs: Port, outputs: Port, face: str) -> "Mlp":
        return Mlp(math.prod(inputs.shape), self.widths, outputs.shape, self)


class Mlp(nn.Module):
    """(B, …) → (B, K), or another shape of the output."""

    head = property(lambda self: getattr(self, self.order[-1]))

    def __init__(self, inputs: int, widths: tuple[int, ...], shape: tuple[int, ...], config: MlpConfig) -> None:
        super().__init__()
        self.order, self.shape = [], shape  # names of the layers, as they follow one another
        for i, (before, after) in enumerate(zip((inputs, *widths), (*widths, math.prod(shape)), strict=True), 1):
            setattr(self, f"fc{i}", nn.Linear(before, after))
            self.order.append(f"fc{i}")
            if config.norm == "batch" and i <= len(widths):
                setattr(self, f"norm{i}", BatchNorm(after))
                self.order.append(f"norm{i}")
            self.order += ["activation", "drop"] * (i <= len(widths))
        self.activation = ACTIVATIONS[config.activation]()
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # (B, F)
        for name in self.order:
            x = getattr(self, name)(x)  # (B, width)
        return x.unflatten(1, self.shape)  # (B, K)
