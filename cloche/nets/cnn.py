"""The convolutional network of the primer, its stages settable.

    x (B, C, h, w) ─ [conv ─ norm? ─ activation] … ─ pool ─ … ─ flatten ─ dropout ─ fc1 ─ activation ─ dropout ─ fc2 ─ y (B, K)

A stage is a list of widths, one a convolution, closed by one pooling; the default [[32, 64], [128]] on 3 × 48 × 48 has
9 536 074 parameters at ten classes. A convolution is a stamp: place the kernel, multiply and add (plus the bias), write
one number, slide by the stride. The kernel is the same at every place (weight sharing) and sees only its
neighbourhood (locality), so a shifted picture gives shifted maps.

Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition".
"""

import math
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cloche.config import NetConfig, Port
from cloche.nets.parts import ACTIVATIONS, Activation, BatchNorm, Dropout
from cloche.words import _

Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1, max_length=200)]


class CnnConfig(NetConfig):
    kind: Literal["cnn"] = "cnn"
    stages: tuple[Widths, ...] = Field(
        ((32, 64), (128,)), strict=False, min_length=1, max_length=200, description=_("channels of each convolution, by stage")
    )
    kernel: int = Field(3, ge=1, le=99, description=_("side of the kernel in pixels"))
    stride: int = Field(1, ge=1, description=_("how far the kernel slides"))
    padding: Annotated[int, Field(ge=0, le=99)] | Literal["same"] = Field(
        "same", description=_('rows of zeros around a picture; "same" keeps its side at stride 1')
    )
    pool: Literal["max", "average"] = Field("max", description=_("what a 2×2 pooling keeps"))
    norm: Literal["none", "batch"] = Field("none", description=_("normalisation before the activation"))
    activation: Activation = Field("relu", description=_("what follows each convolution and hidden layer"))
    hidden: int = Field(512, ge=1, description=_("neurons of the dense layer"))
    dropout: float = Field(0.5, ge=0, lt=1, description=_("share of values zeroed before each dense layer while training"))

    faces: ClassVar = ("maps",)
    reads: ClassVar = ("image",)

    @property
    def pad(self) -> int | str:
        """What Conv2d is given: an even kernel that keeps the side needs one row more on one side than on the other."""
        if self.padding != "same":
            return self.padding
        return "same" if self.stride == 1 and self.kernel % 2 == 0 else self.kernel // 2

    def sides(self, side: int) -> list[int]:
        """The picture's side after each stage; 0 or less where nothing is left."""
        out = []
        for stage in self.stages:
            for _width in stage:
                side = side if self.pad == "same" else (side + 2 * int(self.pad) - self.kernel) // self.stride + 1
            side //= 2
            out.append(side)
        return out

    def build(self, inputs: Port, outputs: Port, face: str) -> "Cnn":
        channels, side, _side = inputs.shape
        told = _("stage {n} of net.stages leaves nothing of a picture with {side} pixels a side. Fewer stages, or more data.pixels")
        for n, left in enumerate(self.sides(side), 1):
            if left < 1:
                raise ValueError(told.format(n=n, side=side))
        return Cnn(channels, side, math.prod(outputs.shape), self)


class Cnn(nn.Module):
    """(B, C, h, w) → (B, K)."""

    head = property(lambda self: self.fc2)

    def __init__(self, channels: int, side: int, outputs: int, config: CnnConfig) -> None:
        super().__init__()
        self.order, n = [], 0  # names of the layers before the dense ones, as they follow one another
        for s, widths in enumerate(config.stages, 1):
            for width in widths:
                n += 1
                setattr(self, f"conv{n}", nn.Conv2d(channels, width, config.kernel, config.stride, config.pad))
                if config.norm == "batch":
                    setattr(self, f"norm{n}", BatchNorm(width))
                self.order += [f"conv{n}", *[f"norm{n}"] * (config.norm == "batch"), "activation"]
                channels = width
            setattr(self, f"pool{s}", nn.MaxPool2d(2) if config.pool == "max" else nn.AvgPool2d(2))
            self.order.append(f"pool{s}")
        # relu and max commute, to the bit and in the gradient too: pooled first, it has a quarter of the values to go through
        commute, text = config.activation == "relu" and config.pool == "max", " ".join(self.order)
        self.quick = re.sub(r"activation (pool\d+)", r"\1 activation", text).split() if commute else self.order
        self.fc1 = nn.Linear(channels * config.sides(side)[-1] ** 2, config.hidden)
        self.fc2 = nn.Linear(config.hidden, outputs)
        self.activation = ACTIVATIONS[config.activation]()
        self.drop1, self.drop2 = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.quick if self.training else self.order:
            x = getattr(self, name)(x)  # (B, width, h, w), each pooling halves h and w
        x = self.drop1(x.flatten(1))  # (B, width·h·w)
        x = self.activation(self.fc1(x))  # (B, hidden)
        return self.fc2(self.drop2(x))  # (B, K)
