"""The tasks by name: `[task] kind`. Every task has the methods of `Task`; the loop knows nothing else of it."""

from typing import Any, Protocol

from torch import Tensor

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.tasks.classify import ClassifyConfig
from cloche.tasks.diffusion import DiffusionConfig
from cloche.tasks.forecast import ForecastConfig
from cloche.tasks.language import LanguageConfig
from cloche.tasks.metrics import Carry, Figure, Nets, Sums
from cloche.tasks.regress import RegressConfig
from cloche.tasks.transcribe import TranscribeConfig
from cloche.tasks.translate import TranslateConfig

TASKS = {
    "classify": ClassifyConfig,
    "regress": RegressConfig,
    "forecast": ForecastConfig,
    "transcribe": TranscribeConfig,
    "language": LanguageConfig,
    "translate": TranslateConfig,
    "diffusion": DiffusionConfig,
}


class Task(Protocol):
    """What is learned. A task may also have:

    score(answers, chunk, nets) -> Sums: figures of what a person would get, which add up over chunks; `samples`, of how many rows at most.
    truth(chunk) -> list[str]: what the "text" of each answer ought to be, where answers are text.
    known(train) -> what its baselines need of the training part, as JSON; baselines(known, part, train or None) -> Figures by their name.
    """

    face: str  # how its net is called
    choose: tuple[str, int]  # the figure that selection on the validation part looks at, and its sign
    headline: str  # the figure that a person is told first
    ports: dict[str, tuple[Port, Port]]  # by net: what goes in, what comes out

    def count(self, chunk: Chunk) -> Tensor: ...  # () what a step's loss is divided by; before any forward pass
    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]: ...  # () float32 sum over rows; sums for the log
    def measure(
        self, nets: Nets, chunk: Chunk, carry: Carry
    ) -> tuple[Sums, Carry, dict[str, Tensor]]: ...  # sums; loss and predicted by row
    def answer(self, nets: Nets, chunk: Chunk) -> list[Any]: ...  # what a person gets: predict, generate, serve
    def figures(self, sums: Sums) -> dict[str, Figure]: ...
