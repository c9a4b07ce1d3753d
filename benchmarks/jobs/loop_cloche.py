"""One process of benchmarks/loop.py: cloche's loop or a bare one over the same job, and what each used.

    python benchmarks/jobs/loop_cloche.py (try | bare | cloche | saves) RECIPE STEPS [KEY=JSON ...]

try: the number format, layout and kernel that cloche would choose here. bare, cloche: seconds a step, on one thread, over chunks that
were made before. saves: the whole loop on all threads with its checkpoints as they fall due, and what those took. Prints JSON.
"""
# ruff: noqa: E402  (the allocator is set before torch is imported, as `python -m cloche` does)

from cloche import start

start.calm_threads()
start.tune_allocator()

from collections.abc import Callable
import json
from pathlib import Path
import sys
import tempfile
import time

import numpy as np
import torch
from torch import Tensor
from watch import FIRST_TIMED_STEP

from cloche import rng
from cloche.build import facts_of, job_of, nets_of, open_data, task_of
from cloche.data.chunk import Chunk
from cloche.recipe import change, find, parse
from cloche.training.job import Job
from cloche.training.log import Progress
from cloche.training.loop import loop
from cloche.training.objective import Objective
from cloche.training.parallel import Group
from cloche.training.run import Run
from cloche.training.speed import flops_of
from cloche.use.train import choose_precision

WITHOUT = {"data.validation": 0.0, "train.select": "last", "train.device": "cpu"}  # validation is work, not what the loop costs
CLOCKS = {"cpu_s_per_step": time.process_time, "thread_s_per_step": time.thread_time, "wall_s_per_step": time.perf_counter}


class Marks(Progress):
    """The end of each step, by all clocks: what cloche's loop calls anyway."""

    def __init__(self) -> None:
        super().__init__(1, "", quiet=True)
        self.ends: list[tuple[float, ...]] = []

    def step(self, *given: object) -> None:
        self.ends.append(tuple(clock() for clock in CLOCKS.values()))

    def per_step(self) -> dict[str, float]:
        """From the end of step FIRST_TIMED_STEP to that of the last: the log's lines and the ends of epochs are between them."""
        first, last = self.ends[FIRST_TIMED_STEP - 1], self.ends[-1]
        return {name: (b - a) / (len(self.ends) - FIRST_TIMED_STEP) for name, a, b in zip(CLOCKS, first, last, strict=True)}


class Counted(Run):
    """A run folder that knows how often it was saved."""

    saves = 0

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict) -> None:
        super().save(step, tensors, numbers)
        self.saves += 1


def bare(job: Job, chunks: list[list[Chunk]], mark: Callable[[], None]) -> list[Tensor]:
    """A forward pass, a backward pass, an update. Returns the losses."""
    job.precision.apply(job.nets)
    objective = Objective(job.nets, job.task, job.precision).train()
    optimizer, losses = job.optim.build(list(objective.parameters())), []
    with job.precision.products():
        for (chunk,) in chunks:
            total, _carry, _sums = objective(chunk, None)
            loss = total / len(chunk.ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            mark()
    return losses


def measure(side: str, name: str, steps: int, sets: dict) -> dict:
    source, raw = find(name, sets.pop("data", None))
    recipe = parse(change(raw, WITHOUT | sets | {"train.steps": steps}), source)
    opened = open_data(recipe, torch.device("cpu"))
    facts = facts_of(recipe, opened)
    recipe, task = task_of(recipe, opened.prepare, facts)
    nets = nets_of(recipe, task)
    job = job_of(recipe, opened, task, nets, {}, Group())
    if side == "try":
        first = job.train.take(np.arange(recipe.train.batch))
        chosen = choose_precision(recipe, job, first, flops_of(nets, task, first))[0].train
        return {f"train.{key}": getattr(chosen, key) for key in ("precision", "layout", "matmul")}
    if side != "saves":
        torch.set_num_threads(1)
        places = [divmod(step, job.order.steps(0)) for step in range(steps)]
        made = {place: job.chunks(*place, rng.draw(job.config.seed, place[0])) for place in places}
        job.chunks = lambda epoch, index, draw: made[epoch, index]
    marks = Marks()
    if side == "bare":
        losses = bare(job, list(made.values()), marks.step)[FIRST_TIMED_STEP:]
        return marks.per_step() | {"steps": steps, "loss": float(torch.stack(losses).mean())}
    with tempfile.TemporaryDirectory() as folder:
        run = Counted(Path(folder) / "run")
        run.open(recipe.tables(), facts, False, ())
        run.begin(recipe.toml(), facts, opened.prepare.model_dump(mode="json"))
        t0 = time.perf_counter()
        _place, clock = loop(job, run, marks)
        found = {"run_s": time.perf_counter() - t0, "saving_s": clock.saving_s, "saves": run.saves}
        run.close()
        lines = [e for e in map(json.loads, run.log.read_text().splitlines()) if e["kind"] == "step"]
    timed = [(e["loss"], e["n"]) for e in lines if e["step"] > FIRST_TIMED_STEP]
    return marks.per_step() | {"steps": steps, "loss": sum(x * n for x, n in timed) / sum(n for _, n in timed), **found}


if __name__ == "__main__":
    side, name, steps, *words = sys.argv[1:]
    print(json.dumps(measure(side, name, int(steps), {k: json.loads(v) for k, _, v in (word.partition("=") for word in words)})))
