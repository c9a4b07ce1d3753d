"""How long things take. Durations only: nothing depends on what time it is."""

from dataclasses import asdict
import time

from cloche.training.job import Place
from cloche.training.run import Run
from cloche.training.state import State


class Clock:
    """Durations of a run, and when its next checkpoint is due: every save_s seconds, or, where that is 0, when it costs 1 %."""

    def __init__(self, save_s: float = 0.0) -> None:
        self.save_s = save_s
        self.steps_s: list[float] = []
        self.waiting_s = self.validation_s = self.saving_s = 0.0
        self.rows = 0
        self._t0 = self._saved = self.begun = time.perf_counter()
        self._last_save_s = 0.25  # a first guess; then what the last one took
        self.first_step_at = 0.0

    def start(self) -> None:
        self._t0 = time.perf_counter()

    def data(self) -> None:
        self.waiting_s += time.perf_counter() - self._t0

    def stop(self, rows: int) -> None:
        self.steps_s.append(time.perf_counter() - self._t0)
        self.rows += rows
        self.first_step_at = self.first_step_at or time.perf_counter()

    @property
    def mean_s(self) -> float:
        recent = self.steps_s[-20:]
        return sum(recent) / max(len(recent), 1)

    @property
    def rate(self) -> float:
        """Examples a second of late."""
        return self.rows / max(len(self.steps_s), 1) / max(self.mean_s, 1e-9)

    @property
    def save_is_due(self) -> bool:
        """A checkpoint may cost 1 % of the time since the last, if nobody asked for more of them."""
        return time.perf_counter() - self._saved > (self.save_s or 100 * self._last_save_s)

    def save(self, run: Run, state: State, place: Place) -> None:
        t0 = time.perf_counter()
        numbers = {"place": asdict(place), "seconds": run.spent_s + t0 - self.begun, **state.numbers()}
        run.save(place.step, state.tensors(), numbers)
        self._saved = time.perf_counter()
        self._last_save_s = self._saved - t0
        self.saving_s += self._last_save_s
