"""A finished run, loaded: what it answers, and how good it is on other data. Nothing that is loaded can run code."""

from dataclasses import dataclass
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cloche import files, trust
from cloche.build import Data, device_of, nets_of, open_data, precision_of, task_of
from cloche.config import nearest
from cloche.data.chunk import Chunk
from cloche.data.kinds import KINDS
from cloche.data.read.builtin import BUILTIN
from cloche.data.read.examples import TEST
from cloche.data.store import kind_of
from cloche.errors import FAILED, UserError
from cloche.recipe import Recipe, parse, shipped
from cloche.tasks import Task
from cloche.tasks.metrics import HIGHER, Nets
from cloche.training.contract import Results, checked, read_facts
from cloche.training.evaluate import evaluate as measure
from cloche.training.evaluate import judge
from cloche.training.precision import Precision
from cloche.training.run import FORMAT, KIND, SEALED
from cloche.words import _, listed


@dataclass
class Model:
    """A trained run, ready to use.

    path: its folder. nets: what was trained, in evaluation mode, "net" first. prepare: the one preparation.
    """

    path: Path
    recipe: Recipe
    facts: dict[str, Any]
    results: dict[str, Any]
    prepare: Any
    task: Task
    nets: dict[str, nn.Module]
    device: torch.device
    opened: Data | None = None  # the run's own data, once it was read

    @property
    def net(self) -> nn.Module:
        return self.nets["net"]

    def predict(self, inputs: list[Any], batch: int = 256) -> list[dict[str, Any]]:
        """The answer for each input: a path, a file's bytes or an array of a picture; numbers for a row of columns."""
        if self.task.face == "denoises":
            do = _("cloche generate {run} PROMPT").format(run=self.path)
            raise UserError(_("{run} draws pictures, it answers no input").format(run=self.path), "", do)
        precision, answers = precision_of(self.recipe), []
        for i in range(0, len(inputs), batch):
            chunk = self.chunk(self.prepare.gather([self.prepare.encode(given) for given in inputs[i : i + batch]]))
            with torch.inference_mode(), precision.autocast(self.device):
                answers += self.task.answer(self.nets, precision.place(chunk))
        return answers

    def chunk(self, data: dict[str, Tensor]) -> Chunk:
        """Raw rows, as `gather` and a store give them, prepared as for evaluation."""
        n = len(next(iter(data.values())))
        ids = torch.arange(n)
        return self.prepare.device(Chunk(data, ids, ids, torch.ones(n), torch.tensor(0), train=False).to(self.device))

    def data(self, source: str | None = None) -> Data:
        """The run's own data, or another source with this run's preparation and labels, all of it the test part."""
        if source is None and self.opened is not None:
            return self.opened
        path = source or self.facts["source"]
        what, do = _("the data of this run is not at {path} any more, or has changed since"), _("put it back, or give data of your own")
        gone = UserError(what.format(path=path), "", do)
        if source is None and path not in BUILTIN and not Path(path).exists():
            raise gone
        if source is not None and (kind := kind_of(source)) != self.facts["kind"]:
            found = _("{wanted} expected, {found} found").format(wanted=self.facts["kind"], found=kind)
            do = _("give data of that kind, or train on this")
            raise UserError(_("{path} is of another kind than this run's data").format(path=source), found, do)
        mine = self.recipe.but(data={"source": path})
        data = open_data(mine, self.device, prepare=self.prepare, foreign=True)
        if data.store.fingerprint == self.facts["fingerprint"]:  # also under another path: what was trained on is no test
            self.opened = open_data(mine, self.device, prepare=self.prepare, store=data.store)
            return self.opened
        if source is None:
            raise gone
        return self._as_test(data)

    def _as_test(self, data: Data) -> Data:
        """Labels of another source in this run's numbering; its own test part where it has one, else everything."""
        store, labels = data.store, list(self.prepare.labels)
        if strange := [name for name in store.labels if name not in labels]:
            what = _("this data has classes that the run does not know: {names}").format(names=listed(strange))
            raise UserError(what, _("it knows {names}").format(names=listed(labels, 12)))
        if labels and store.labels and not self.facts["multi"]:
            store.label = np.array([labels.index(name) for name in store.labels], np.int64)[store.label]
            store.fields["label"] = torch.from_numpy(store.label).to(self.device)
        none, official = np.empty(0, np.int64), np.flatnonzero(store.part == TEST)
        data.rows = {"train": none, "validation": none, "test": official if len(official) else np.arange(store.n)}
        return data

    def evaluate(self, data: str | None = None) -> dict[str, Any]:
        """The figures on the run's own judged part, or on other data: {"part", "metrics", "interval", "baseline", "n", …}."""
        if data is None:
            return self.results
        precision, batch = precision_of(self.recipe), self.recipe.train.test_batch
        return judged(self.task, self.nets, self.data(data), precision, batch, self.results["baseline_of"])


class Judge(nn.Module):
    """Another run's classifier, for pictures as a person sees them: (B, C, h, w) in 0…1 → logits (B, K)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.net, self.prepare = model.net, model.prepare

    def forward(self, pictures: Tensor) -> Tensor:
        n, _c, h, w = pictures.shape
        size = torch.tensor([h, w], device=pictures.device).expand(n, 2)
        return self.net(self.prepare.inputs({"image": 255 * pictures.permute(0, 2, 3, 1), "size": size}))


def judged(task: Task, nets: Nets, data: Data, precision: Precision, batch: int, known: dict[str, Any]) -> dict[str, Any]:
    """What is told of the part that a final figure comes from: figures, interval, baselines, per class, samples, the worst examples."""
    part = data.part(data.judged)
    sums, rows = measure(nets, task, part, precision, batch)
    more, samples = judge(nets, task, part, precision, batch)
    sums |= more
    figures = task.figures(sums)
    name = task.headline if task.headline in figures else task.choose[0]
    train = data.part("train") if len(data.rows["train"]) else None
    simpler = task.baselines(known, part, train) if name == task.headline and hasattr(task, "baselines") else {}
    baselines = {k: f.value for k, f in simpler.items() if math.isfinite(f.value)}
    best = max(baselines, key=lambda k: baselines[k] * (1 if name in HIGHER else -1), default="")
    out: dict[str, Any] = {
        "part": data.judged,
        "headline": name,
        "metrics": {k: f.value for k, f in figures.items()},
        "interval": [figures[name].low, figures[name].high],
        "baseline": {"value": baselines[best], "answer": best} if best else None,
        "baselines": baselines,
        "n": figures[name].n,
        "samples": samples,
    }
    if hasattr(task, "table"):
        out["per_class"] = {k: v.tolist() for k, v in task.table(sums).items()}
    if "confusion" in sums:
        out["confusion"] = sums["confusion"].long().tolist()
    worst = np.argsort(-rows["loss"], kind="stable")[:24]
    out["worst"] = [{k: rows[k][i].item() for k in rows} | {"name": part.store.name(int(rows["ids"][i]))} for i in worst]
    return out


def load(run: str | Path, device: str = "cpu", module: nn.Module | None = None, task: Task | None = None) -> Model:
    """A finished run folder → Model.

    Args:
        module, task: what `cloche.fit` was given, for a run that it left: their code is not in the folder.
    Raises: UserError when the folder is not a run, is damaged, is of a newer format, or is not finished.
    """
    path = Path(run)
    recipe, facts, prepare = read(path)
    if (recipe.net.kind == "module" and module is None) or (recipe.task.kind == "own" and task is None):
        what = _("{path} was trained on your own module {name}, whose code is not in the folder").format(path=path, name=recipe.net.name)
        raise UserError(what, "", _("in Python: cloche.load({path!r}, module=YourModule()).predict(rows)").format(path=str(path)))
    weights, _more = files.read_tensors(path / "model.safetensors")
    with trust.believing(path / "prepare.json"):
        if task is None:
            recipe, task = task_of(recipe, prepare, facts)
        if module is None:
            with torch.device("meta"):  # no memory for a net that the weights are not of
                like = {f"{name}/{k}": t.shape for name, net in nets_of(recipe, task).items() for k, t in net.state_dict().items()}
            if like != {k: t.shape for k, t in weights.items()}:
                raise files.damaged(path / "model.safetensors", _("its tensors are not those of the net in recipe.toml"))
        nets = {"net": module} if module is not None else nets_of(recipe, task)
    where = device_of(device)
    for name, net in nets.items():
        try:
            net.load_state_dict({k.removeprefix(f"{name}/"): t for k, t in weights.items() if k.startswith(f"{name}/")})
        except RuntimeError as fault:
            what, found = _("the weights in {path} do not fit this net").format(path=path), str(fault).splitlines()[-1].strip()
            raise UserError(what, found, _("give the module that was trained"), code=FAILED) from None
        net.to(where).eval()
        if module is None:  # a person's own stays trainable
            net.requires_grad_(False)
    precision_of(recipe).apply(nets)
    return Model(path, recipe, facts, checked(Results, path / "results.json", facts), prepare, task, nets, where)


def read(path: Path) -> tuple[Recipe, dict[str, Any], Any]:
    """The recipe, facts and preparation of a finished run, each file checked against the manifest."""
    if path.exists() and not path.is_dir():
        raise UserError(_("{path} is a file, not a run folder").format(path=path), "", _("Give a folder that cloche train left."))
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else [])
        found = _('the nearest name is "{near}"').format(near=near) if near else ""
        do = _("train it first: cloche train {name}").format(name=path if str(path) in shipped() else "RECIPE")
        raise UserError(_("there is no run folder {path}").format(path=path), found, do)
    if (path / "facts.json").exists() and not (path / "manifest.json").exists():
        do = _("type the command that began it: it goes on where it was")
        raise UserError(_("the run {path} is not finished").format(path=path), "", do)
    try:
        files.check_manifest(path, KIND, newest_format=FORMAT, names=SEALED)
    except UserError as fault:
        fault.do = fault.do or _("Give a folder that cloche train left, or put back from a copy what lacks.")
        raise
    with trust.believing(path / "recipe.toml"):
        recipe = parse(trust.read_toml(path / "recipe.toml"))
    return recipe, read_facts(path), read_prepare(path)


def read_prepare(path: Path) -> Any:
    """The preparation in a run folder, finished or not. Raises: UserError "damaged" when it is none."""
    stored = files.read_json(path / "prepare.json")
    try:
        return KINDS[stored["kind"]].prepare.model_validate_json(json.dumps(stored))
    except (KeyError, TypeError, ValueError):
        what = _("damaged: {path}").format(path=path / "prepare.json")
        raise UserError(what, _("it is no preparation"), _("start anew with --again"), code=FAILED, name="damaged") from None


def evaluate(run: str | Path, data: str | None = None) -> dict[str, Any]:
    """`load(run).evaluate(data)`."""
    return load(run).evaluate(data)
