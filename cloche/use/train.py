"""`cloche train`: from a recipe to a finished run folder."""

from collections.abc import Callable
import contextlib
import os
from pathlib import Path
import signal
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from cloche import __version__
from cloche.build import Data, device_of, facts_of, job_of, nets_of, open_data, precision_of, task_of
from cloche.config import Fault, Frozen, RecipeError
from cloche.data.chunk import Chunk
from cloche.data.store import Store, cache_folder
from cloche.errors import FAILED, UserError
from cloche.files import read_json
from cloche.recipe import Recipe, change, find, parse
from cloche.tasks import Task
from cloche.tasks.metrics import Nets
from cloche.training.clock import Clock
from cloche.training.fault import no_memory, stopped
from cloche.training.job import Job
from cloche.training.log import Progress, say
from cloche.training.loop import loop
from cloche.training.parallel import Group
from cloche.training.parallel import group as processes
from cloche.training.precision import Precision, onednn_is_exact, trial
from cloche.training.run import Run
from cloche.training.speed import flops_of, limit_of, peak_memory, threads_for
from cloche.use import story
from cloche.use.layers import ledger
from cloche.use.model import Judge, Model, judged, load, read_prepare
from cloche.words import _, listed

MEASURED = ("precision", "layout", "matmul")  # keys of [train]: what was measured when a run began is read, not measured again


class Options(Frozen):
    """What the command line adds to a recipe."""

    out: str | None = None
    again: bool = False
    allow_change: tuple[str, ...] = ()
    rewind: bool = False
    save_s: float = 0.0  # seconds between two checkpoints; 0: as many as cost 1 %
    quiet: bool = False
    alone: bool = False  # in this process only, whoever else there is
    t0: float = 0.0  # the perf_counter reading from which seconds are counted; else the call


def train(recipe: str, data: str | None = None, sets: dict[str, Any] | None = None, options: Options | None = None) -> Model:
    """Train a recipe, or go on with its unfinished run; a finished one is only loaded.

    Args:
        recipe: a shipped name, a .toml file or a path to data. data: the path that [data] source is set to.
        sets: {"optim.lr": 0.01}. options: where it goes and how.
    Returns: the trained Model; its figures are in `results`.
    Raises: UserError; nothing else is meant to reach a person.
    """
    options = options or Options()
    name, raw = find(recipe, data)
    parsed = parse(change(raw, sets or {}), name)
    return train_recipe(parsed, Path(options.out or f"runs/{name}"), options)


def train_recipe(
    recipe: Recipe, path: Path, options: Options, store: Store | None = None, module: nn.Module | None = None, task: Task | None = None
) -> Model:
    """One run. store, module, task: a person's own, from `cloche.fit`."""
    group = Group() if options.alone else processes()
    try:
        with group.watched(lambda: 0):
            model = _train_recipe(recipe, Run(path, group), options, store, module, task)
    except BaseException as fault:
        group.failed(fault)
        if no_memory(fault):  # outside a step, which says more
            do = _("set a smaller train.batch or train.test_batch (--allow-change lets a run that is begun go on), or take a smaller net")
            raise UserError(
                _("there is not enough memory"), str(fault).partition("\n")[0], do, code=FAILED, name="out-of-memory"
            ) from fault
        raise
    group.runs += 1
    return model


def _train_recipe(recipe: Recipe, run: Run, options: Options, store: Store | None, module: nn.Module | None, task: Task | None) -> Model:
    group, path, t0 = run.group, run.path, options.t0 or time.perf_counter()
    options = options.model_copy(update={"t0": t0, "quiet": options.quiet or not group.leads})
    tell: Callable[[str], None] = (lambda text: None) if options.quiet else say
    device, run.save_s = device_of(recipe.train.device), options.save_s
    with signals(run):
        with group.turn("data"):
            opened = open_data(recipe, device, tell, _fitted(path, options), store)
        facts = facts_of(recipe, opened) | {"asked_chunks": recipe.train.chunks, "processes": group.size}
        if task is None:
            recipe, task = task_of(recipe, opened.prepare, facts)
        group.wait("begun")
        recipe = recipe.but(train={"chunks": run.chunks(recipe.train.chunks, options.again)})
        nets = {k: n.to(device) for k, n in ({"net": module} if module is not None else nets_of(recipe, task)).items()}
        part = opened.part("train")
        first = part.take(np.arange(min(max(2, -(-recipe.train.batch // recipe.train.chunks)), len(part))))  # a chunk
        counted = first if part.store.lengths is not None else part.take(np.arange(min(2, len(part))))  # rows alike cost alike
        flops, threads = flops_of(nets, task, counted), torch.get_num_threads()
        torch.set_num_threads(threads_for(flops * recipe.train.batch, threads))
        parameters = sum(p.numel() for net in nets.values() for p in net.parameters())
        facts |= {"threads": torch.get_num_threads(), "parameters": parameters, "flops": flops}
        try:
            found = run.open(recipe.tables(), facts, options.again, options.allow_change)
            if run.finished:
                tell(story.finished(path))
                if group.leads and not (path / "report" / "index.html").exists():
                    from cloche.use.report import write_report  # as below

                    write_report(path)
            else:
                if found is not None:  # what was measured when the run began is read, not measured again
                    recipe = recipe.but(train={k: found["train"][k] for k in MEASURED if getattr(recipe.train, k) == "auto"})
                facts["skipped"] = run.left_out(options.rewind)
                tell(story.opening(path.name, recipe, opened, facts))
                train_job(recipe, opened, task, nets, run, facts, first, options)
            group.done("finished")
        except UserError as fault:
            fault.goes_on = run.last_saved >= 0 and fault.name in ("stopped", "disk-full", "write-failed", "read-only")
            raise
        finally:
            run.close()
            torch.set_num_threads(threads)
    group.wait("finished")
    model = load(path, str(device), module=module, task=task if module is not None else None)
    tell(story.closing(model))
    return model


def _fitted(path: Path, options: Options) -> Any:
    """The preparation of the run to go on with: read, not fitted again. None for a new run, or where a change is allowed."""
    if options.again or options.allow_change or not (path / "facts.json").exists():
        return None
    return read_prepare(path)


def train_job(
    recipe: Recipe, opened: Data, task: Task, nets: Nets, run: Run, facts: dict[str, Any], first: Chunk, options: Options
) -> None:
    """The trial where the run is new, the loop, the one look at the test part, the finished folder with its report."""
    tell: Callable[[str], None] = (lambda text: None) if options.quiet else say
    with run.group.turn("judge"):
        frozen = judges(recipe, opened.store.labels, opened.device, tell)
    job = job_of(recipe, opened, task, nets, frozen, run.group)
    job.train = job.train.without(facts["skipped"])
    if not (run.path / "facts.json").exists():
        recipe, tried = choose_precision(recipe, job, first, facts["flops"])
        facts = {**facts, "tried": tried}
        run.begin(recipe.toml(), facts, opened.prepare.model_dump(mode="json"))
        job.precision = precision_of(recipe)
    else:  # what --allow-change let pass is written down too
        facts = {**facts, "tried": read_json(run.path / "facts.json").get("tried", {})}
        run.begin(recipe.toml(), facts, opened.prepare.model_dump(mode="json"))
    tell(story.machine(recipe, facts))
    progress = Progress(job.epochs, job.noun, options.quiet)
    place, clock = loop(job, run, progress)
    if not run.group.leads:  # the rest is the first one's
        return
    from cloche.use.report import draw_inside, extras, write_report  # matplotlib takes 0.6 s to load: not before the first step

    known = task.known(opened.part("train")) if hasattr(task, "known") else {}
    results = judged(task, job.nets, opened, job.precision, recipe.train.test_batch, known)
    results |= {
        "format": 1,
        "task": recipe.task.kind,
        "seed": recipe.train.seed,
        "steps": place.step,
        "best_step": run.best_step,
        "seconds": round(run.spent_s + time.perf_counter() - options.t0, 2),
        "speed": speed(job, clock, facts["flops"], options.t0),
        "baseline_of": known,
    }
    results["layers"] = ledger({k: job.nets[k] for k in job.trained}, task, first)
    trained = {k: job.nets[k].eval() for k in job.trained}
    model = Model(run.path, recipe, facts, results, opened.prepare, task, trained, opened.device, opened)
    results["extras"] = extras(model)
    weights = {f"{name}/{k}": t for name in job.trained for k, t in job.nets[name].state_dict().items()}
    run.finish(weights, results, story.card(run.path.name, recipe, facts, results))
    draw_inside(model)  # when the run is finished: a fault in a picture must not cost it
    write_report(run.path)


def judges(recipe: Recipe, labels: list[str], device: torch.device, tell: Callable[[str], None]) -> Nets:
    """The frozen net that `[task] judge` names: a run folder, or a shipped recipe, which is trained once and kept in the cache folder."""
    name = getattr(recipe.task, "judge", "")
    if not name:
        return {}
    path = Path(name)
    if name.startswith("recipe:"):
        path = cache_folder() / "judges" / f"{name.removeprefix('recipe:')}-{__version__}-{torch.__version__}"
        if not (path / "manifest.json").exists():
            tell(_("the judge {name} is trained first, once").format(name=name))
            train(name, options=Options(out=str(path), quiet=True, alone=True))
    judge = load(path, str(device))
    if judge.facts["kind"] != "pictures" or judge.recipe.task.kind != "classify" or judge.facts["labels"] != labels or len(labels) < 3:
        found = _("it tells {theirs} apart, the captions {ours}").format(theirs=listed(judge.facts["labels"], 12), ours=listed(labels, 12))
        raise RecipeError([Fault(f'task.judge = "{name}"', found, _("name a classifier of pictures with the same classes"))])
    return {"judge": Judge(judge)}


def choose_precision(recipe: Recipe, job: Job, chunk: Any, flops: float) -> tuple[Recipe, dict[str, float]]:
    """Number format and layout: tried where a step is work enough for it to pay; everything else keeps float32."""
    if recipe.train.matmul == "onednn" and not onednn_is_exact():
        told = _("on this machine oneDNN would round float32 products to bfloat16")
        raise RecipeError([Fault('train.matmul = "onednn"', told, 'train.matmul = "auto"')])
    chosen, tried = precision_of(recipe), {}
    if threads_for(flops * recipe.train.batch, 2) > 1:
        chosen, tried = trial(job.nets, job.task, chunk, Precision(recipe.train.precision, recipe.train.layout, recipe.train.matmul))
    return recipe.but(train={"precision": chosen.dtype, "layout": chosen.layout, "matmul": chosen.matmul}), tried


def speed(job: Job, clock: Clock, flops: float, t0: float) -> dict[str, float]:
    """Examples/s from the median of the last steps (the first build kernels, and may be `small`), and what share of the machine that is.

    On a GPU from all of them together: one alone only says how long it took to ask for it.
    """
    cpu = job.train.device.type == "cpu"
    steady = clock.steps_s[10:][-50:] if len(clock.steps_s) > 20 else clock.steps_s[1:] or clock.steps_s
    if not steady:
        return {}
    rate = min(job.config.batch, len(job.train)) / (statistics.median(steady) if cpu else statistics.fmean(steady))
    mine = torch.get_num_threads()
    torch.set_num_threads(max(mine, os.cpu_count() or 1) if cpu else mine)  # the machine's, not the run's
    limit = limit_of(job.precision.dtype, job.train.device)
    torch.set_num_threads(mine)
    total = sum(clock.steps_s)
    return {
        "examples_per_s": round(rate, 2),
        "flops_per_s": flops * rate,
        "limit_flops_per_s": limit,
        "share_of_limit": flops * rate / limit,
        "peak_memory_bytes": float(peak_memory(job.train.device)),
        "waiting_frac": clock.waiting_s / total,
        "cold_s": round(clock.first_step_at - t0, 3),
        "training_s": round(total, 3),
        "saving_s": round(clock.saving_s, 3),
    }


class Ended(BaseException):
    """A signal that ends the run at once. No `except` for the faults of data on its way may take it for one."""


@contextlib.contextmanager
def signals(run: Run):
    """SIGINT and SIGTERM ask the loop to save and end; the second of them ends at once. Outside the loop nothing waits to be saved."""
    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {}

    def asked(number: int, _frame: Any) -> None:
        if number == getattr(signal, "SIGHUP", None):  # a closed terminal does not end a run
            return
        if run.stop or not run.looping:
            raise Ended(number)
        run.stop = number

    try:
        for n in names:
            before[n] = signal.signal(getattr(signal, n), asked)
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield
    except Ended as fault:
        told = stopped(fault.args[0])
        told.goes_on = run.last_saved >= 0
        raise told from None
    finally:
        for n, handler in before.items():
            signal.signal(getattr(signal, n), handler)


def many(recipe: str, data: str | None, sets: dict[str, Any], options: Options, folds: int = 0, seeds: int = 0) -> dict[str, Any]:
    """--folds F or --seeds S: a parent folder of ordinary runs, and the mean ± sd of their figures."""
    if (folds and seeds) or (folds or seeds) < 2:
        asked = f"--folds {folds} --seeds {seeds}"
        raise UserError(_("--folds or --seeds needs a number from 2 on, and only one of them"), asked, _("for example --folds 5"))
    name, raw = find(recipe, data)
    parent = Path(options.out or f"runs/{name}-{'folds' if folds else 'seeds'}")
    results = []
    if folds and "fold" not in type(parse(change(raw, sets), name).data).model_fields:
        raise UserError(_("this data is cut in order, so there are no folds to rotate"), "", _("leave out --folds"))
    if folds:  # refused before anything is trained, not after the first fold
        last = parse(change(raw, {**sets, "data.test": 1 / folds, "data.fold": folds - 1}), name)
        open_data(last, torch.device("cpu"))
    for k in range(folds or seeds):
        mine = {**sets, "data.test": 1 / folds, "data.fold": k} if folds else {**sets, "train.seed": k}
        path = parent / (f"fold-{k}" if folds else f"seed-{k}")
        parsed = parse(change(raw, mine), name)
        results.append(train_recipe(parsed, path, options).results)
        options = options.model_copy(update={"t0": 0.0})
    return story.summary(parent, results, "fold" if folds else "seed")
