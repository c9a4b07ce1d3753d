"""What a training is made of: its config, where it stands, and the job that the loop does."""

from dataclasses import dataclass, field, replace
from functools import cached_property
import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from cloche.config import Frozen
from cloche.data.chunk import Chunk, Order, Part
from cloche.tasks import Task
from cloche.tasks.metrics import Nets
from cloche.training.optim import OptimConfig
from cloche.training.parallel import Group
from cloche.training.precision import Precision
from cloche.words import _


class TrainConfig(Frozen):
    epochs: int | None = Field(None, ge=1, description=_("times that every training example is seen"))
    steps: int | None = Field(None, ge=1, description=_("updates in all, in place of epochs"))
    batch: int = Field(64, ge=1, description=_("examples of one step"))
    chunks: int = Field(1, ge=1, description=_("forward passes that a step is cut into, to save memory or for several processes"))
    exact_sum: bool = Field(False, description=_("several processes: add gradients in the order of one alone, for equal bits"))
    test_batch: int = Field(256, ge=1, description=_("examples of one forward pass in evaluation"))
    seed: int = Field(0, ge=0, lt=2**31, description=_("what all randomness hangs on"))
    select: Literal["best", "last"] = Field("best", description=_("which weights are kept: best on the validation part, or last"))
    patience: int = Field(0, ge=0, description=_("epochs without a better validation figure before stopping; 0 never stops early"))
    ema: float = Field(0.0, ge=0, lt=1, description=_("keep the running average of the weights: its memory; 0 for none"))
    log_steps: int = Field(10, ge=1, description=_("steps between two lines of the log"))
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description=_("number format; auto tries on this machine"))
    layout: Literal["auto", "plain", "channels_last"] = Field(
        "auto", description=_("memory layout of pictures; auto tries on this machine")
    )
    matmul: Literal["auto", "default", "onednn"] = Field("auto", description=_("what multiplies float32 matrices on a CPU; auto tries"))
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description=_("where it is trained: auto, cpu, cuda, cuda:1"))


@dataclass(frozen=True)
class Place:
    """Where a run stands: steps done, the epoch and the step within it that come next."""

    step: int
    epoch: int
    index: int


@dataclass
class Job:
    """Everything that the loop needs, built."""

    nets: Nets
    trained: tuple[str, ...]
    task: Task
    train: Part
    validation: Part | None
    order: Order
    optim: OptimConfig
    config: TrainConfig
    precision: Precision
    noun: str = "examples"
    group: Group = field(default_factory=Group)

    @cached_property
    def steps(self) -> int:
        if self.config.steps:
            return self.config.steps
        return sum(self.order.steps(e) for e in range(self.config.epochs or 1))

    @property
    def epochs(self) -> int:
        return self.config.epochs or math.ceil(self.steps / self.order.steps(0))

    def chunks(self, epoch: int, index: int, draw: Tensor) -> list[Chunk]:
        """This process's chunks of a step."""
        done = sum(map(self.order.steps, range(epoch))) + index
        train = replace(self.train, progress=done / self.steps)
        return train.step(self.order, epoch, index, self.config.chunks, self.config.batch, draw, (self.group.rank, self.group.size))
