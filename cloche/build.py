"""The one place where the tables of a recipe meet: data opened, facts gathered, nets and task joined, the job built."""

from collections.abc import Callable
from dataclasses import dataclass
import math
from pathlib import Path
import platform
from typing import Any

import numpy as np
import torch
from torch import nn

from cloche import __version__, rng
from cloche.config import Fault, Port, RecipeError
from cloche.data.chunk import Part
from cloche.data.order import Shuffled
from cloche.data.prepare import PREPARES
from cloche.data.split import check_classes, split, twins
from cloche.data.store import Store, open_store
from cloche.errors import UserError
from cloche.nets import NETS
from cloche.nets.parts import BatchNorm
from cloche.recipe import Recipe
from cloche.tasks import Task
from cloche.training.loop import Job
from cloche.training.precision import Precision
from cloche.words import _


@dataclass
class Data:
    """An opened source: the store, the rows of each part, and the preparation fitted on the training part."""

    store: Store
    rows: dict[str, np.ndarray]
    prepare: Any
    device: torch.device

    def part(self, name: str) -> Part:
        return Part(name, self.store, self.rows[name], self.prepare, self.device, fill=self.device.type == "cuda")

    def labels_of(self, name: str) -> np.ndarray:
        return self.store.label[self.rows[name]]

    @property
    def judged(self) -> str:
        """The part that a final figure comes from: test, else validation, else train."""
        return next(name for name in ("test", "validation", "train") if len(self.rows[name]))


def open_data(
    recipe: Recipe,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    prepare: Any = None,
    store: Store | None = None,
    foreign: bool = False,
) -> Data:
    """Read, split, fit on the training part.

    Args:
        prepare: a run's own, then nothing is fitted. foreign: the source is not the run's: it is not split either.
    """
    config = recipe.data
    store = store or open_store(config, say)
    if prepare is not None and foreign:
        return Data(store.to(device), {}, prepare, device)
    rows = split(store.digest, store.label, store.part, config.validation, config.test, config.fold)
    check_classes(store.label, store.labels, rows)
    fitted = prepare or PREPARES[config.kind].fit(store, rows["train"], config)
    return Data(store.to(device), rows, fitted, device)


def device_of(asked: str) -> torch.device:
    """Raises: UserError when a device is asked for and absent: no run falls back by itself."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(asked)
    there = {"cpu": True, "cuda": torch.cuda.is_available()}[device.type]
    if device.type == "cuda" and there and (device.index or 0) >= torch.cuda.device_count():
        there = False
    if not there:
        raise UserError(
            _("train.device = {device}, but there is no such device here").format(device=asked),
            _("PyTorch {version} sees {n} CUDA devices").format(version=torch.__version__, n=torch.cuda.device_count()),
            _("leave train.device out to use what there is, or install the PyTorch build for your device"),
            name="device",
        )
    return device


def facts_of(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What was read from the data and the machine: facts.json."""
    store, label = data.store, data.store.label
    source = Path(recipe.data.source)
    return {
        "format": 1,
        "source": str(source.resolve()) if store.from_files else recipe.data.source,
        "fingerprint": store.fingerprint,
        "kind": store.kind,
        "labels": store.labels,
        "outputs": label.shape[1] if label.ndim == 2 else len(store.labels),
        "multi": label.ndim == 2 and bool(store.labels),
        "n": store.n,
        "parts": {name: len(rows) for name, rows in data.rows.items()},
        "twins": twins(store.digest, data.rows),
        "left_out": [list(pair) for pair in store.left_out[:100]],
        "left_out_n": len(store.left_out),
        "notes": store.notes,
        "device": data.device.type,
        "torch": torch.__version__,
        "cloche": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def task_of(recipe: Recipe, facts: dict[str, Any]) -> tuple[Recipe, Task]:
    """The recipe with the task's "auto" resolved, and the task."""
    if recipe.task.kind == "own":
        raise RecipeError([Fault('task.kind = "own"', _("is for cloche.fit in Python"), '"classify"')])
    recipe = recipe.model_copy(update={"task": recipe.task.resolve(facts["outputs"], facts["multi"])})
    if recipe.task.kind == "classify" and not facts["labels"]:
        raise RecipeError(
            [Fault('task.kind = "classify"', _("the labels of this data are numbers"), '"regress"', ("task.kind", "regress"))]
        )
    if recipe.task.kind == "regress" and facts["labels"]:
        raise RecipeError(
            [Fault('task.kind = "regress"', _("the labels of this data are classes"), '"classify"', ("task.kind", "classify"))]
        )
    if recipe.task.kind == "classify" and (recipe.task.loss == "bce") != (facts["multi"] or facts["outputs"] == 2):
        fits = "bce" if facts["multi"] else "cross_entropy"
        if recipe.task.loss == "bce" or facts["multi"]:  # two classes may choose
            told = _("bce is for two classes or several labels at once, cross_entropy for one class of many")
            raise RecipeError([Fault(f'task.loss = "{recipe.task.loss}"', told, f'"{fits}"', ("task.loss", fits))])
    if facts["labels"] and len(facts["labels"]) < 2:
        raise UserError(_("only one class: {name}").format(name=facts["labels"][0]), "", _("a classifier needs at least two"))
    return recipe, recipe.task.build(tuple(facts["labels"]), facts["outputs"], facts["multi"])


def net_of(recipe: Recipe, inputs: Port, task: Task) -> nn.Module:
    """Build `[net]` with weights drawn from the recipe's seed.

    Raises: RecipeError when the net can't be called as the task calls it, or its keys are impossible for this data.
    """
    if recipe.net.kind not in NETS or task.face not in recipe.net.faces:
        fit = ", ".join(k for k, c in NETS.items() if task.face in c.faces)
        raise RecipeError([Fault(f'net.kind = "{recipe.net.kind}"', _("does not fit the task {task}").format(task=recipe.task.kind), fit)])
    outside = torch.get_rng_state()
    torch.manual_seed(rng.integer("weights", recipe.train.seed))
    try:
        net = recipe.net.build(inputs, task.outputs)
    except (ValueError, RuntimeError) as fault:  # RuntimeError: a net larger than the memory
        raise RecipeError(
            [Fault("net", str(fault).rpartition("Allocator: ")[2], _("make the net smaller") * isinstance(fault, RuntimeError))]
        ) from None
    finally:
        torch.set_rng_state(outside)
    if recipe.train.batch < 2 * recipe.train.chunks and any(isinstance(m, BatchNorm) for m in net.modules()):
        told = _("batch normalisation needs at least two rows in each of the {n} chunks").format(n=recipe.train.chunks)
        raise RecipeError([Fault(f"train.batch = {recipe.train.batch}", told, f"train.batch = {2 * recipe.train.chunks}")])
    return net


def job_of(recipe: Recipe, data: Data, task: Task, net: nn.Module) -> Job:
    """The loop's job; precision and layout as the recipe says, fp32 and plain while they are still "auto"."""
    if recipe.train.patience and not len(data.rows["validation"]):
        told = _("there is no validation part to wait for")
        raise RecipeError([Fault(f"train.patience = {recipe.train.patience}", told, "data.validation = 0.1")])
    order = Shuffled(len(data.rows["train"]), recipe.train.batch, recipe.train.seed)
    return Job(
        nets={"net": net.to(data.device)},
        trained=("net",),
        task=task,
        train=data.part("train"),
        validation=data.part("validation") if len(data.rows["validation"]) else None,
        order=order,
        optim=recipe.optim,
        config=recipe.train,
        precision=precision_of(recipe),
        noun=nouns(data.store.kind),
    )


def precision_of(recipe: Recipe) -> Precision:
    return Precision(*(v if v != "auto" else plain for v, plain in ((recipe.train.precision, "fp32"), (recipe.train.layout, "plain"))))


def nouns(kind: str) -> str:
    return {"pictures": _("pictures"), "columns": _("rows")}.get(kind, _("examples"))


def parameters_of(net: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in net.parameters())
