"""A finished run, loaded: what it answers, and how good it is on other data. Nothing that is loaded can run code."""

from dataclasses import dataclass
import json
from pathlib import Path
import tomllib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cloche import files
from cloche.build import Data, device_of, net_of, open_data, precision_of, task_of
from cloche.config import nearest
from cloche.data.chunk import Chunk
from cloche.data.prepare import PREPARES
from cloche.data.read.examples import TEST
from cloche.data.store import kind_of
from cloche.errors import FAILED, UserError
from cloche.recipe import Recipe, parse, shipped
from cloche.tasks import Task
from cloche.tasks.metrics import Sums
from cloche.training.evaluate import evaluate as measure
from cloche.training.run import FORMAT, KIND
from cloche.words import _, listed


@dataclass
class Model:
    """A trained run, ready to use.

    path: its folder. net: the trained module, in evaluation mode. prepare: the one preparation. labels: class names.
    """

    path: Path
    recipe: Recipe
    facts: dict[str, Any]
    results: dict[str, Any]
    prepare: Any
    task: Task
    net: nn.Module
    device: torch.device

    def predict(self, inputs: list[Any], batch: int = 256) -> list[dict[str, Any]]:
        """The answer for each input: a path, a file's bytes or an array of a picture; numbers for a row of columns."""
        encoded = [self.prepare.encode(given) for given in inputs]
        return [a for i in range(0, len(encoded), batch) for a in self._answer(encoded[i : i + batch])]

    @torch.inference_mode()
    def _answer(self, encoded: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        precision, chunk = precision_of(self.recipe), self.chunk(self.prepare.gather(encoded))
        with precision.autocast(self.device):
            return self.task.answer({"net": self.net}, precision.place(chunk))

    def chunk(self, data: dict[str, Tensor]) -> Chunk:
        """Raw rows, prepared as for evaluation."""
        n = len(next(iter(data.values())))
        ids = torch.arange(n)
        return self.prepare.device(Chunk(data, ids, ids, torch.ones(n), torch.tensor(0), train=False).to(self.device))

    def data(self, source: str | None = None) -> Data:
        """The run's own data, or another source with this run's preparation and labels, all of it the test part."""
        if source is not None and (kind := kind_of(source)) != self.facts["kind"]:
            raise UserError(
                _("{path} is of another kind than this run's data").format(path=source),
                _("{wanted} expected, {found} found").format(wanted=self.facts["kind"], found=kind),
                _("give data of that kind, or train on this"),
            )
        config = self.recipe.data.model_copy(update={"source": source or self.facts["source"]})
        mine = self.recipe.model_copy(update={"data": config})
        data = open_data(mine, self.device, prepare=self.prepare, foreign=True)
        if data.store.fingerprint == self.facts["fingerprint"]:  # also under another path: what was trained on is no test
            return open_data(mine, self.device, prepare=self.prepare, store=data.store)
        if source is None:
            raise UserError(
                _("the data at {path} has changed since this run").format(path=config.source),
                "",
                _("name it as other data: --data {path}").format(path=config.source),
            )
        return self._as_test(data)

    def _as_test(self, data: Data) -> Data:
        """Labels of another source in this run's numbering; its own test part where it has one, else everything."""
        store, labels = data.store, list(self.prepare.labels)
        strange = [name for name in store.labels if name not in labels]
        if strange:
            raise UserError(
                _("this data has classes that the run does not know: {names}").format(names=listed(strange)),
                _("it knows {names}").format(names=listed(labels, 12)),
            )
        if labels and not self.facts["multi"]:
            store.label = np.array([labels.index(name) for name in store.labels], np.int64)[store.label]
            store.fields["label"] = torch.from_numpy(store.label).to(self.device)
        official = np.flatnonzero(store.part == TEST)
        data.rows = {
            "train": np.empty(0, np.int64),
            "validation": np.empty(0, np.int64),
            "test": official if len(official) else np.arange(store.n),
        }
        return data

    def evaluate(self, data: str | None = None) -> dict[str, Any]:
        """The figures on the run's own judged part, or on other data: {"part", "metrics", "interval", "baseline", "n", …}."""
        if data is None:
            return self.results
        opened = self.data(data)
        sums, rows = measure(
            {"net": self.net}, self.task, opened.part(opened.judged), precision_of(self.recipe), self.recipe.train.test_batch
        )
        return judged(self.task, sums, rows, opened, opened.judged, self.results["baseline_of"])


def judged(task: Task, sums: Sums, rows: dict[str, np.ndarray], data: Data, part: str, common: dict[str, Any]) -> dict[str, Any]:
    """What is told of a measured part: figures, interval, baseline, per class, the most wrong examples."""
    figures = task.figures(sums)
    name = task.choose[0]
    baseline, answer = task.baseline(data.labels_of(part), np.array(common["label"])) if hasattr(task, "baseline") else (None, "")
    out: dict[str, Any] = {
        "part": part,
        "metrics": {k: f.value for k, f in figures.items()},
        "interval": [figures[name].low, figures[name].high],
        "baseline": {"value": baseline.value, "answer": answer} if baseline else None,
        "n": figures[name].n,
    }
    if hasattr(task, "table"):
        out["per_class"] = {k: v.tolist() for k, v in task.table(sums).items()}
    if "confusion" in sums:
        out["confusion"] = sums["confusion"].long().tolist()
    worst = np.argsort(-rows["loss"], kind="stable")[:24]
    out["worst"] = [{k: rows[k][i].item() for k in rows} | {"name": data.store.names[rows["ids"][i]]} for i in worst]
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
        raise UserError(
            _("{path} was trained on your own module {name}, whose code is not in the folder").format(path=path, name=recipe.net.name),
            "",
            _("in Python: cloche.load({path!r}, module=YourModule()).predict(rows)").format(path=str(path)),
        )
    if task is None:
        recipe, task = task_of(recipe, facts)
    net = module if module is not None else net_of(recipe, prepare.port, task)
    weights, _more = files.read_tensors(path / "model.safetensors")
    try:
        net.load_state_dict({k.removeprefix("net/"): t for k, t in weights.items()})
    except RuntimeError as fault:
        raise UserError(
            _("the weights in {path} do not fit this net").format(path=path),
            str(fault).splitlines()[-1].strip(),
            _("give the module that was trained"),
            code=FAILED,
        ) from None
    where = device_of(device)
    net = net.to(where).eval()
    if module is None:  # a person's own stays trainable
        net.requires_grad_(False)
    precision_of(recipe).apply({"net": net})
    return Model(path, recipe, facts, files.read_json(path / "results.json"), prepare, task, net, where)


def read(path: Path) -> tuple[Recipe, dict[str, Any], Any]:
    """The recipe, facts and preparation of a finished run, each file checked against the manifest."""
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = nearest(path.name, beside)
        if path.exists():
            raise UserError(_("{path} is a file, not a run folder").format(path=path), "", _("Give a folder that cloche train left."))
        do = (
            _("train it first: cloche train {name}").format(name=path)
            if str(path) in shipped()
            else _("runs are in runs/; train one with cloche train RECIPE")
        )
        raise UserError(
            _("there is no run folder {path}").format(path=path), _('the nearest name is "{near}"').format(near=near) if near else "", do
        )
    if (path / "facts.json").exists() and not (path / "manifest.json").exists():
        raise UserError(
            _("the run {path} is not finished").format(path=path), "", _("type the command that began it: it goes on where it was")
        )
    try:
        files.check_manifest(path, KIND, newest_format=FORMAT)
    except UserError as fault:
        fault.do = fault.do or _("Give a folder that cloche train left, or put back from a copy what lacks.")
        raise
    recipe = parse(tomllib.loads((path / "recipe.toml").read_text(encoding="utf-8")))
    facts = files.read_json(path / "facts.json")
    prepare = read_prepare(path)
    return recipe, facts, prepare


def read_prepare(path: Path) -> Any:
    """The preparation in a run folder, finished or not. Raises: UserError "damaged" when it is none."""
    stored = files.read_json(path / "prepare.json")
    kind = stored.get("kind") if isinstance(stored, dict) else None
    try:
        return PREPARES[kind].model_validate_json(json.dumps(stored))
    except (KeyError, ValueError):
        what = _("damaged: {path}").format(path=path / "prepare.json")
        raise UserError(what, _("it is no preparation"), _("start anew with --again"), code=FAILED, name="damaged") from None


def evaluate(run: str | Path, data: str | None = None) -> dict[str, Any]:
    """`load(run).evaluate(data)`."""
    return load(run).evaluate(data)
