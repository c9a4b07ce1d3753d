"""The one place where the tables of a recipe meet: data opened, facts gathered, nets and task joined, the job built."""

from collections.abc import Callable
from dataclasses import dataclass, field
import os
from pathlib import Path
import platform
from typing import Any

import numpy as np
import torch
from torch import nn

from cloche import __version__, rng
from cloche.config import Fault, NetConfig, RecipeError
from cloche.data.chunk import Part
from cloche.data.kinds import KINDS
from cloche.data.split import twins
from cloche.data.store import ARRAYS, BUILTIN, Store, open_store
from cloche.errors import UserError
from cloche.nets import NETS
from cloche.nets.parts import BatchNorm
from cloche.recipe import Recipe
from cloche.tasks import TASKS, Task
from cloche.training.job import Job
from cloche.training.parallel import Group
from cloche.training.precision import Precision
from cloche.words import _, listed


@dataclass
class Data:
    """An opened source."""

    store: Store
    rows: dict[str, np.ndarray]  # by part
    prepare: Any  # fitted on the training part
    device: torch.device
    carries: bool = False  # the net hands a state on, so that running text is read in lanes
    views: dict[str, tuple[Any, np.ndarray]] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        if name not in self.views:
            rows, ids = self.prepare.view(self.store, self.rows[name])
            self.views[name] = rows.to(self.device), ids
        rows, ids = self.views[name]
        return Part(name, rows, ids, self.prepare, self.device, self.device.type == "cuda", self.carries and rows.running)

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
    """Read, split, fit on the training part. prepare: a run's own, then nothing is fitted. foreign: not the run's data, and not split."""
    store = store or open_store(recipe.data, say)
    rows = {} if foreign else recipe.data.parts(store)
    fitted = prepare or KINDS[recipe.data.kind].prepare.fit(store, rows, recipe.data)
    return Data(store, rows, fitted, device, recipe.net.carries)


def device_of(asked: str) -> torch.device:
    """Raises: UserError when a device is asked for and absent: no run falls back by itself."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    device, n = torch.device(asked), torch.cuda.device_count()
    if asked == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes each has its own
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= n:
        what = _("train.device = {device}, but there is no such device here").format(device=asked)
        found = _("PyTorch {version} sees {n} CUDA devices").format(version=torch.__version__, n=n)
        do = _("leave train.device out to use what there is, or install the PyTorch build for your device")
        raise UserError(what, found, do, name="device")
    return device


def facts_of(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What was read from the data and the machine: facts.json."""
    store, label = data.store, data.store.label
    source = Path(recipe.data.source)
    return {
        "format": 1,
        "source": recipe.data.source if recipe.data.source in (*BUILTIN, ARRAYS) else str(source.resolve()),
        "fingerprint": store.fingerprint,
        "kind": store.kind,
        "labels": store.labels,
        "outputs": label.shape[1] if label.ndim == 2 else len(store.labels),
        "multi": label.ndim == 2 and bool(store.labels),
        "n": store.n,
        "parts": {name: len(rows) for name, rows in data.rows.items()},
        "twins": twins(store.group, data.rows),
        "left_out": [list(pair) for pair in store.left_out[:100]],
        "left_out_n": len(store.left_out),
        "notes": store.notes,
        "device": data.device.type,
        "torch": torch.__version__,
        "cloche": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def task_of(recipe: Recipe, prepare: Any, facts: dict[str, Any]) -> tuple[Recipe, Task]:
    """The recipe with the task's "auto" resolved, and the task. Raises: RecipeError when it is not for this kind of data."""
    kind, data = recipe.task.kind, recipe.data.kind
    if kind not in TASKS or data not in recipe.task.fits:
        fit = [k for k, c in TASKS.items() if data in c.fits]
        told = _("is for cloche.fit in Python") if kind not in TASKS else _("does not fit data of the kind {kind}").format(kind=data)
        raise RecipeError([Fault(f'task.kind = "{kind}"', told, ", ".join(fit), ("task.kind", fit[0]))])
    recipe = recipe.model_copy(update={"task": recipe.task.resolve(facts)})
    return recipe, recipe.task.build(prepare, facts)


def nets_of(recipe: Recipe, task: Task) -> dict[str, nn.Module]:
    """`[net]` and the nets that train along, weights drawn from the seed. Raises: RecipeError for one that does not fit task or data."""
    kind, given = recipe.net.kind, task.ports["net"][0].kind
    fit = [k for k, c in NETS.items() if task.face in c.faces and given in (c.reads or (given,))]
    if kind not in fit:
        told = _("does not fit the task {task} on data of the kind {kind}").format(task=recipe.task.kind, kind=recipe.data.kind)
        raise RecipeError([Fault(f'net.kind = "{kind}"', told, ", ".join(fit), ("net.kind", fit[0]))])
    small = getattr(getattr(recipe.data, "augment", None), "small", 0)
    if small and not recipe.net.any_side:
        told, others = _("a net of the kind {kind} takes pictures of one side only").format(kind=kind), [k for k in fit if NETS[k].any_side]
        do = _("leave it out, or take {nets}").format(nets=listed(others))
        raise RecipeError([Fault(f"data.augment.small = {small}", told, do, ("data.augment.small", "0"))])
    along = {k: v for k in type(recipe.net).model_fields if isinstance(v := getattr(recipe.net, k), NetConfig)}
    outside = torch.get_rng_state()
    torch.manual_seed(rng.integer("weights", recipe.train.seed))
    try:
        nets = {"net": recipe.net.build(*task.ports["net"], task.face)}
        nets |= {name: config.build(*task.ports[name], config.faces[0]) for name, config in along.items()}
    except (ValueError, RuntimeError) as fault:  # RuntimeError: a net larger than the memory
        do = _("make the net smaller") if isinstance(fault, RuntimeError) else ""
        raise RecipeError([Fault("net", str(fault).rpartition("Allocator: ")[2], do)]) from None
    finally:
        torch.set_rng_state(outside)
    if recipe.train.batch < 2 * recipe.train.chunks and any(isinstance(m, BatchNorm) for n in nets.values() for m in n.modules()):
        told = _("batch normalisation needs at least two rows in each of the {n} chunks").format(n=recipe.train.chunks)
        raise RecipeError([Fault(f"train.batch = {recipe.train.batch}", told, f"train.batch = {2 * recipe.train.chunks}")])
    return nets


def job_of(recipe: Recipe, data: Data, task: Task, nets: dict[str, nn.Module], frozen: dict[str, nn.Module], group: Group) -> Job:
    """The loop's job; precision and layout as the recipe says, fp32 and plain while they are still "auto". frozen: nets that only judge."""
    if recipe.train.patience and not len(data.rows["validation"]):
        told = _("there is no validation part to wait for")
        way = "data.validation = 0.1" if hasattr(recipe.data, "validation") else _("leave it out")
        raise RecipeError([Fault(f"train.patience = {recipe.train.patience}", told, way)])
    train = data.part("train")
    order = train.order(recipe.train.batch, recipe.train.seed)
    bounds, _per = train.bounds(len(order.ids(0, 0)[0]), recipe.train.chunks, recipe.train.batch)
    if train.carried and group.size > 1 and len(bounds) <= recipe.train.chunks:  # a process that is always idle has no state to save
        told = _("{n} chunks need at least two lanes each").format(n=recipe.train.chunks)
        raise RecipeError([Fault(f"train.batch = {recipe.train.batch}", told, _("a larger batch, or fewer processes"))])
    return Job(
        nets={k: n.to(data.device) for k, n in (nets | frozen).items()},
        trained=tuple(nets),
        task=task,
        train=train,
        validation=data.part("validation") if len(data.rows["validation"]) else None,
        order=order,
        optim=recipe.optim,
        config=recipe.train,
        precision=precision_of(recipe),
        noun=KINDS[data.store.kind].noun,
        group=group,
    )


def precision_of(recipe: Recipe) -> Precision:
    asked = (recipe.train.precision, recipe.train.layout, recipe.train.matmul)
    return Precision(*(plain if found == "auto" else found for found, plain in zip(asked, ("fp32", "plain", "default"), strict=True)))
