"""The lines that a person reads before and after training, and the run's model card."""

import math
from pathlib import Path
import shlex
import statistics
from typing import Any

from torch import nn

from cloche.build import Data, nouns, parameters_of
from cloche.config import show
from cloche.data.read.folder import shown
from cloche.data.split import twins
from cloche.recipe import Recipe
from cloche.tasks import Task
from cloche.tasks.metrics import Figure
from cloche.training.loop import told
from cloche.use.model import Model
from cloche.words import _, _n, duration, listed, number, percent

NAMES = {"accuracy": _("accuracy"), "mse": _("mean squared error"), "loss": _("loss")}


def opening(name: str, recipe: Recipe, data: Data, net: nn.Module, task: Task) -> str:
    store, lines = data.store, []
    what = nouns(store.kind)
    head = (
        _("{n} {what} in {k} classes").format(n=number(store.n), what=what, k=len(store.labels))
        if store.labels
        else _("{n} {what}").format(n=number(store.n), what=what)
    )
    if "image" in store.fields:
        _rows, h, w, _channels = store.fields["image"].shape
        head += _(", {h}×{w} → {side}×{side}×{channels}").format(h=h, w=w, side=recipe.data.pixels, channels=recipe.data.channels)
    lines.append(("", head + _(". Nothing is downloaded.")))
    if store.labels and len(store.labels) <= 12:
        counts = [
            int((store.label == k).sum()) if store.label.ndim == 1 else int(store.label[:, k].sum()) for k in range(len(store.labels))
        ]
        lines.append((_("classes"), " · ".join(f"{shown(label)} {number(n)}" for label, n in zip(store.labels, counts, strict=True))))
    if store.left_out:
        first = f"{store.left_out[0][0]} ({store.left_out[0][1]})"
        more = _(" and {n} more").format(n=len(store.left_out) - 1) if len(store.left_out) > 1 else ""
        lines.append(
            (
                _("left out"),
                _n("{n} unreadable: {first}", "{n} unreadable: {first}{more}", len(store.left_out)).format(
                    n=number(len(store.left_out)), first=first, more=more
                ),
            )
        )
    if store.notes.get("turned"):
        lines.append((_("turned"), _("{n} upright by their EXIF mark").format(n=number(store.notes["turned"]))))
    if same := twins(store.digest, data.rows):
        lines.append(
            (
                _("twins"),
                _n(
                    "{n} example of the test part is in another part too", "{n} examples of the test part are in other parts too", same
                ).format(n=number(same)),
            )
        )
    parts = " · ".join(f"{part_name(k)} {number(len(rows))}" for k, rows in data.rows.items() if len(rows))
    lines.append((_("split"), parts + (_(", alike in each class, twins together") if store.labels and not store.part.any() else "")))
    optim, length = recipe.optim, recipe.train
    many = (
        _n("{n} epoch", "{n} epochs", length.epochs).format(n=length.epochs)
        if length.epochs
        else _n("{n} step", "{n} steps", length.steps or 0).format(n=length.steps)
    )
    lines.append(
        (
            _("net"),
            _("{kind}, {n} parameters · {optim}, lr {lr} · {length}").format(
                kind=recipe.net.kind, n=number(parameters_of(net)), optim=optim.kind, lr=show(optim.lr), length=many
            ),
        )
    )
    return "\n".join(f"{shown(name) if i == 0 else '  ' + key:<10} {text}" for i, (key, text) in enumerate(lines))


def part_name(part: str) -> str:
    return {"train": _("train"), "validation": _("validation"), "test": _("test")}[part]


def machine(recipe: Recipe, facts: dict[str, Any]) -> str:
    tried = facts.get("tried") or {}
    what = {"fp32": "fp32", "bf16": "bf16"}[recipe.train.precision] + (
        _(" and channels-last") if recipe.train.layout == "channels_last" else ""
    )
    text = f"{facts['device']} · " + _n("{n} thread", "{n} threads", facts["threads"]).format(n=facts["threads"]) + f" · {what}"
    plain, mine = tried.get("fp32 plain"), tried.get(f"{recipe.train.precision} {recipe.train.layout}")
    if plain and mine and plain > 1.05 * mine:
        text += _(": {ratio}× plain fp32 here").format(ratio=number(plain / mine, 1))
    return f"{'  ' + _('machine'):<10} {text}"


def finished(path: Path) -> str:
    return _("{path} is finished; this is its result. To train anew: --again").format(path=path)


def closing(model: Model) -> str:
    r, name = model.results, model.task.choose[0] if model.task else "loss"
    figure = Figure(r["metrics"][name], *r["interval"], n=r["n"])
    text = f"{NAMES.get(name, name)} {told(name, figure)}"
    if figure.low is not None:
        low, high = (number(100 * v, 1) if name == "accuracy" else number(v, 4) for v in (figure.low, figure.high))
        text += _("  (95 % interval {low}–{high}, n = {n}, seed {seed})").format(low=low, high=high, n=number(r["n"]), seed=r["seed"])
    lines = [(part_name(r["part"]), text)]
    if r.get("baseline"):
        b = r["baseline"]
        line = _('always answering "{answer}" would get {value}').format(answer=shown(b["answer"]), value=told(name, Figure(b["value"])))
        hard = hardest(r, model.facts["labels"])
        lines.append(("", line + (f"      {hard}" if hard else "")))
    s = r["speed"]
    if s:
        lines.append(
            (
                _("speed"),
                _("{share} of what this machine can multiply ({used} of {limit} GFLOP/s) · waiting for data {wait}").format(
                    share=percent(s["share_of_limit"], 0),
                    used=number(s["flops_per_s"] / 1e9, 0 if s["flops_per_s"] > 1e10 else 1),
                    limit=number(s["limit_flops_per_s"] / 1e9),
                    wait=percent(s["waiting_frac"], 0),
                ),
            )
        )
    out = [f"{key:<10} {text}" for key, text in lines]
    head, run = _("{run} in {time}").format(run=shown(model.path), time=duration(r["seconds"])), shown(shlex.quote(str(model.path)))
    sample = "my.png" if model.facts["kind"] == "pictures" else '"' + " ".join(["0.5"] * math.prod(model.prepare.shape)) + '"'
    ways = (
        (_("look"), model.path / "report" / "index.html"),
        (_("inside"), f"cloche explain {run}"),
        (_("try"), f"cloche predict {run} {sample}"),
    )
    out += [f"{'' if i else head:<{len(head)}}   {key:<6} {way}" for i, (key, way) in enumerate(ways)]
    return "\n".join(out)


def hardest(results: dict[str, Any], labels: list[str]) -> str:
    """ "hardest: 8, read as 1 in 3 of 35", from the confusion matrix."""
    matrix = results.get("confusion")
    if not matrix:
        return ""
    pairs = [(row[p], t, p, sum(row)) for t, row in enumerate(matrix) for p in range(len(row)) if p != t and row[p]]
    if not pairs:
        return _("none was wrong")
    n, true, predicted, total = max(pairs)
    return _("hardest: {true}, read as {predicted} in {n} of {total}").format(
        true=shown(labels[true]), predicted=shown(labels[predicted]), n=n, total=total
    )


def summary(parent: Path, results: list[dict[str, Any]], unit: str) -> dict[str, Any]:
    """Mean ± sd over folds or seeds, and each one."""
    names = [k for k in results[0]["metrics"] if all(k in r["metrics"] for r in results)]
    mean = {k: statistics.fmean(r["metrics"][k] for r in results) for k in names}
    sd = {k: statistics.stdev(r["metrics"][k] for r in results) for k in names}
    return {
        "run": str(parent),
        "by": unit,
        "metrics": mean,
        "sd": sd,
        "each": [r["metrics"] for r in results],
        "n": sum(r["n"] for r in results) if unit == "fold" else results[0]["n"],
        "seconds": sum(r["seconds"] for r in results),
    }


def card(name: str, recipe: Recipe, facts: dict[str, Any], results: dict[str, Any]) -> str:
    """The model card, README.md of a run."""
    name, low, high = shown(name), *results["interval"]
    lines = [
        _("Trained by cloche {version} with PyTorch {torch}.").format(version=facts["cloche"], torch=facts["torch"]),
        _("Data: {source}, {n} examples, fingerprint {fingerprint}.").format(
            source=recipe.data.source, n=facts["n"], fingerprint=facts["fingerprint"]
        ),
        _("Net: {kind}, {n} parameters. Answers: {answers}.").format(
            kind=recipe.net.kind, n=facts["parameters"], answers=listed(facts["labels"], 12) or _("a number")
        ),
        _("Measured on the part {part}, n = {n}, seed {seed}.").format(
            part=part_name(results["part"]), n=results["n"], seed=results["seed"]
        ),
        "" if low is None else _("95 % interval of the first figure: {low}–{high}.").format(low=number(low, 4), high=number(high, 4)),
    ]
    rows = "\n".join(f"| {k} | {number(v, 4)} |" for k, v in results["metrics"].items())
    return f"# {name}\n\n" + "\n\n".join(filter(None, lines)) + f"\n\n| | |\n|---|---|\n{rows}\n"


def plain(model: Model, results: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `--json` prints for train and evaluate."""
    r = model.results | (results or {})
    keys = ("part", "metrics", "interval", "baseline", "n", "per_class", "confusion", "seed", "steps", "seconds", "speed")
    return {"run": str(model.path), "task": model.recipe.task.kind, **{k: r[k] for k in keys if k in r}}


def figures_text(model: Model, results: dict[str, Any]) -> str:
    """The figures, then precision, recall and F1 of each class, then the confusion matrix."""
    lines = [f"{part_name(results['part'])} · n = {number(results['n'])}"]
    lines += [f"  {k:<20} {number(v, 4)}" for k, v in results["metrics"].items()]
    if results.get("baseline"):
        b = results["baseline"]
        lines.append(
            "  " + _('always answering "{answer}" would get {value}').format(answer=shown(b["answer"]), value=number(b["value"], 4))
        )
    table, labels = results.get("per_class"), [shown(label) for label in model.facts["labels"]]
    if table:
        wide = max(10, *(len(label) for label in labels))
        lines.append(f"\n  {_('class'):<{wide}} {_('precision'):>10} {_('recall'):>8} {_('F1'):>8} {_('examples'):>9}")
        for i, label in enumerate(labels):
            p, r, f = (number(table[k][i], 3) for k in ("precision", "recall", "f1"))
            lines.append(f"  {label:<{wide}} {p:>10} {r:>8} {f:>8} {number(table['support'][i]):>9}")
        never = [label for label, n in zip(labels, table["predicted"], strict=True) if n == 0]
        if never:
            lines.append("  " + _("never predicted, so precision and F1 count as 0: {names}").format(names=listed(never)))
    matrix = results.get("confusion")
    if matrix and len(matrix) <= 20:
        wide = max(5, *(len(label) for label in labels))
        lines.append("\n  " + _("rows are the true class, columns the answer"))
        lines.append("  " + " " * wide + "".join(f" {label[:6]:>6}" for label in labels))
        lines += [f"  {labels[t]:<{wide}}" + "".join(f" {number(n) if n else '·':>6}" for n in row) for t, row in enumerate(matrix)]
    return "\n".join(lines)


def answers_text(answers: list[dict[str, Any]]) -> str:
    """One line an input: the label with the likeliest three, or the value."""
    lines = []
    for a in answers:
        numbers = a.get("values") or ([a["value"]] if "value" in a else [])
        said = shown(a.get("label") or ", ".join(a.get("labels", []))) or " ".join(number(v, 4) for v in numbers) or "–"
        likely = " · ".join(f"{shown(k)} {percent(p)}" for k, p in list(a.get("probabilities", {}).items())[:3])
        lines.append(f"{shown(a['input'])}   {said}   {likely}".rstrip())
    return "\n".join(lines)


def summary_text(found: dict[str, Any]) -> str:
    """--folds and --seeds: each run's first figure, then mean ± sd."""
    name = next(iter(found["metrics"]))
    show_one = percent if name == "accuracy" else (lambda v: number(v, 4))
    each = " · ".join(show_one(m[name]) for m in found["each"])
    return _("{name} {mean} ± {sd}   (n = {n})   {each}   {run}").format(
        name=NAMES.get(name, name),
        mean=show_one(found["metrics"][name]),
        sd=show_one(found["sd"][name]),
        n=number(found["n"]),
        each=each,
        run=found["run"],
    )
