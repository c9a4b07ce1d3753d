"""What a task is: what the loop asks of it, and what most tasks say alike."""

from typing import Any, Protocol

import torch
from torch import Tensor

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.tasks.metrics import Carry, Figure, Nets, Sums


class Task(Protocol):
    """What is learned. A task may also have:

    losses(nets, chunk) -> (B,) float32: what `loss` and `measure` add up, where it does not write its own.
    score(answers, chunk, nets) -> Sums: figures of what a person would get, which add up over chunks; `samples`, of how many rows at most.
    truth(chunk) -> list[str]: what the "text" of each answer ought to be, where answers are text.
    known(train) -> what its baselines need of the training part, as JSON; baselines(known, part, train or None) -> Figures by their name.
    """

    face: str  # how its net is called
    choose: tuple[str, int] = ("loss", -1)  # the figure that selection on the validation part looks at, and its sign
    headline: str  # the figure that a person is told first
    ports: dict[str, tuple[Port, Port]]  # by net: what goes in, what comes out

    def answer(self, nets: Nets, chunk: Chunk) -> list[Any]: ...  # what a person gets: predict, generate, serve
    def figures(self, sums: Sums) -> dict[str, Figure]: ...

    def size(self, chunk: Chunk) -> Tensor:
        """(B,) what each row counts for: itself, its letters, its tokens."""
        return torch.ones_like(chunk.weight)

    def count(self, chunk: Chunk) -> Tensor:
        """() what a step's loss is divided by; known before any forward pass."""
        return (self.size(chunk) * chunk.weight).sum()

    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        """() float32 sum over rows, the carry for the next chunk, sums for the log."""
        return (self.losses(nets, chunk) * chunk.weight).sum(), None, {}

    def measure(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Sums, Carry, dict[str, Tensor]]:
        """Sums that `figures` reads, the carry, and by row its loss and what else is known of it."""
        losses = self.losses(nets, chunk)
        sums = {"loss": (losses * chunk.weight.double()).sum(), "n": self.count(chunk).double()}
        return sums, None, {"loss": losses / self.size(chunk)}


def pairs(task: Task, answers: list[dict[str, Any]], chunk: Chunk) -> list[tuple[str, str]]:
    """What was said and what ought to have been, by real row."""
    rows = zip(answers, task.truth(chunk), chunk.weight.tolist(), strict=True)
    return [(answer["text"], truth) for answer, truth, weight in rows if weight]
