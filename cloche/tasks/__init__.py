"""The tasks by name: `[task] kind`. Every task has the methods of `Task`; the loop knows nothing else of it."""

from typing import Any, Protocol

from torch import Tensor

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.tasks.classify import ClassifyConfig
from cloche.tasks.metrics import Carry, Figure, Nets, Sums
from cloche.tasks.regress import RegressConfig

TASKS = {"classify": ClassifyConfig, "regress": RegressConfig}


class Task(Protocol):
    face: str  # how its net is called
    choose: tuple[str, int]  # the figure that selection looks at, and its sign
    outputs: Port  # what its net has to give

    def count(self, chunk: Chunk) -> Tensor: ...  # () what a step's loss is divided by; before any forward pass
    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]: ...  # () float32 sum over rows; sums for the log
    def measure(
        self, nets: Nets, chunk: Chunk, carry: Carry
    ) -> tuple[Sums, Carry, dict[str, Tensor]]: ...  # sums; loss and predicted by row
    def answer(self, nets: Nets, chunk: Chunk) -> list[Any]: ...  # what a person gets: predict, generate, serve
    def figures(self, sums: Sums) -> dict[str, Figure]: ...
