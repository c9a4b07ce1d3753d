"""The residual network: blocks that add to what they are given, so that depth costs no gradient.

    x (B, C, h, w) ─ stem ─ norm ─ relu ─ [block] … ─ pool ─ head ─ y (B, K)
    block: x ─┬─ conv1 ─ norm1 ─ relu ─ conv2 ─ norm2 ─ + ─ relu
              └───────────── short ──────────────────── ┘

From stage to stage the width doubles and the side halves (rounded up), in the stage's first block; its `short` is then a 1×1 convolution
with a norm, else nothing. A block's last gain begins at 0, so that it begins by changing nothing (Goyal et al. 2017, arXiv 1706.02677,
section 5.1). Every side is averaged to one place in the end: it takes pictures of any side.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cloche.config import NetConfig, Port
from cloche.nets.parts import BatchNorm
from cloche.words import _

LEAST = 8  # pixels a side


class ResnetConfig(NetConfig):
    kind: Literal["resnet"] = "resnet"
    size: Literal["xs", "s", "m", "l"] | None = Field(None, description=_("how large, in one word: sets what is not set beside it"))
    width: int = Field(32, ge=1, description=_("channels of the first stage; each further stage has twice as many"))
    blocks: tuple[Annotated[int, Field(ge=1, le=200)], ...] = Field(
        (2, 2, 2), strict=False, min_length=1, max_length=8, description=_("blocks of each stage; each stage has half the side of the last")
    )

    faces: ClassVar = ("maps",)
    reads: ClassVar = ("image",)
    any_side: ClassVar = True
    sizes: ClassVar = {  # 0.08, 0.3, 2.8 and 11 million parameters; a larger one takes more rows a step for its longer steps to pay
        "xs": {"net.width": 16, "net.blocks": [1, 1, 1], "train.batch": 64},
        "s": {"net.width": 32, "net.blocks": [1, 1, 1], "train.batch": 64},
        "m": {"net.width": 64, "net.blocks": [2, 2, 2], "train.batch": 128},
        "l": {"net.width": 64, "net.blocks": [2, 2, 2, 2], "train.batch": 128},
    }

    def build(self, inputs: Port, outputs: Port, face: str) -> "Resnet":
        channels, side, _side = inputs.shape
        if side < LEAST:
            told = _("a resnet reads pictures of {least} pixels a side and more, these have {side}")
            raise ValueError(told.format(least=LEAST, side=side))
        return Resnet(channels, math.prod(outputs.shape), self)


class Block(nn.Module):
    """(B, before, h, w) → (B, after, ⌈h / stride⌉, ⌈w / stride⌉)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), BatchNorm(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), BatchNorm(after)
        self.short, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        if stride > 1 or before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), BatchNorm(after))
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = self.short(x), self.relu(self.norm1(self.conv1(x)))  # (B, after, h', w') both
        return self.relu(self.norm2(self.conv2(x)) + kept)


class Resnet(nn.Module):
    """(B, C, h, w) → (B, K)."""

    def __init__(self, channels: int, outputs: int, config: ResnetConfig) -> None:
        super().__init__()
        before = config.width
        self.stem, self.norm, self.relu = nn.Conv2d(channels, before, 3, 1, 1, bias=False), BatchNorm(before), nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList()
        for stage, blocks in enumerate(config.blocks):
            for n in range(blocks):
                after = config.width * 2**stage
                self.blocks.append(Block(before, after, 2 if stage and n == 0 else 1))
                before = after
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(before, outputs)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):  # He et al. 2015, arXiv 1502.01852, equation 10
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))  # (B, width, h, w)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))  # (B, K)
