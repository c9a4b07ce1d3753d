"""The lines that a person reads before and after training, and the run's model card."""

import math
from pathlib import Path
import shlex
import statistics
from typing import Any

import numpy as np

from cloche.build import Data
from cloche.config import Port, show
from cloche.data.kinds import KINDS
from cloche.data.read.builtin import BUILTIN
from cloche.data.read.folder import shown
from cloche.recipe import Recipe
from cloche.tasks.metrics import NAMES, told
from cloche.use.model import Model
from cloche.words import _, _n, duration, listed, number, percent, size


def opening(name: str, recipe: Recipe, data: Data, facts: dict[str, Any]) -> str:
    store, labels = data.store, data.store.labels
    head = _("{n} {what} in {k} classes") if labels else _("{n} {what}")
    head = head.format(n=number(store.n), what=KINDS[store.kind].noun, k=len(labels))
    if "image" in store.fields:
        _rows, h, w, _channels = store.fields["image"].shape
        head += _(", {h}×{w} → {side}×{side}×{channels}").format(h=h, w=w, side=recipe.data.pixels, channels=recipe.data.channels)
    lines = [("", head + _(". Nothing is downloaded."))]
    if labels and len(labels) <= 12:
        counts = np.bincount(store.label, minlength=len(labels)) if store.label.ndim == 1 else store.label.sum(0)
        lines.append((_("classes"), " · ".join(f"{shown(label)} {number(n)}" for label, n in zip(labels, counts, strict=True))))
    if store.left_out:
        files = listed((f"{file} ({why})" for file, why in store.left_out), 1)
        lines.append((_("left out"), _("{n} unreadable: {files}").format(n=number(len(store.left_out)), files=files)))
    if store.notes.get("turned"):
        lines.append((_("turned"), _("{n} upright by their EXIF mark").format(n=number(store.notes["turned"]))))
    if same := facts["twins"]:
        text = _n("{n} example of the test part is in another part too", "{n} examples of the test part are in other parts too", same)
        lines.append((_("twins"), text.format(n=number(same))))
    parts = " · ".join(f"{part_name(k)} {number(len(rows))}" for k, rows in data.rows.items() if len(rows))
    lines.append((_("split"), parts + (_(", alike in each class, twins together") if labels and not store.part.any() else "")))
    length = recipe.train.epochs or recipe.train.steps or 0
    many = _n("{n} epoch", "{n} epochs", length) if recipe.train.epochs else _n("{n} step", "{n} steps", length)
    given = {"kind": recipe.net.kind, "n": number(facts["parameters"]), "optim": recipe.optim.kind, "lr": show(recipe.optim.lr)}
    text = _("{kind}, {n} parameters · {optim}, lr {lr} · {length}")
    lines.append((_("net"), text.format(length=many.format(n=number(length)), **given)))
    return "\n".join(f"{shown(name) if i == 0 else '  ' + key:<10} {text}" for i, (key, text) in enumerate(lines))


def part_name(part: str) -> str:
    return {"train": _("train"), "validation": _("validation"), "test": _("test")}[part]


def machine(recipe: Recipe, facts: dict[str, Any]) -> str:
    tried = facts.get("tried") or {}
    what = recipe.train.precision + (_(" and channels-last") if recipe.train.layout == "channels_last" else "")
    text = f"{facts['device']} · " + _n("{n} thread", "{n} threads", facts["threads"]).format(n=facts["threads"]) + f" · {what}"
    what += _(", products by oneDNN") if recipe.train.matmul == "onednn" else ""
    plain, mine = tried.get("fp32 plain default"), tried.get(f"{recipe.train.precision} {recipe.train.layout} {recipe.train.matmul}")
    if plain and mine and plain > 1.05 * mine:
        text += _(": {ratio}× plain fp32 here").format(ratio=number(plain / mine, 1))
    return f"{'  ' + _('machine'):<10} {text}"


def finished(path: Path) -> str:
    return _("{path} is finished; this is its result. To train anew: --again").format(path=path)


def closing(model: Model) -> str:
    r, name = model.results, model.results["headline"]
    text = f"{NAMES.get(name, name)} {told(name, r['metrics'][name])}"
    if r["interval"][0] is not None:
        low, high = (told(name, v).removesuffix("\u00a0%") for v in r["interval"])
        text += _("  (95 % interval {low}–{high}, n = {n}, seed {seed})").format(low=low, high=high, n=number(r["n"]), seed=r["seed"])
    lines = [(part_name(r["part"]), text)]
    if r["baselines"]:
        lines.append(("", f"{beside(r)}      {hardest(r, model.facts['labels'])}".rstrip()))
    if s := r["speed"]:
        text = _("{share} of what this machine can multiply ({used} of {limit} GFLOP/s) · waiting for data {wait}")
        lines.append((_("speed"), text.format(**speed(s))))
        lines += [("", _("at most {memory} of memory").format(memory=size(s["peak_memory_bytes"])))] if s.get("peak_memory_bytes") else []
    out = [f"{key:<10} {text}" for key, text in lines]
    head, run = _("{run} in {time}").format(run=shown(model.path), time=duration(r["seconds"])), shown(shlex.quote(str(model.path)))
    given = sample(model.facts["kind"], model.prepare.port, model.recipe.data.source)
    verb = "generate" if model.task.face in ("continues", "denoises") else "predict"
    ways = (
        (_("look"), model.path / "report" / "index.html"),
        (_("inside"), f"cloche explain {run}"),
        (_("try"), f"cloche {verb} {run} {given}"),
    )
    out += [f"{'' if i else head:<{len(head)}}   {key:<6} {way}" for i, (key, way) in enumerate(ways)]
    return "\n".join(out)


def speed(s: dict[str, float]) -> dict[str, str]:
    used, limit = s["flops_per_s"] / 1e9, s["limit_flops_per_s"] / 1e9
    shares = {"share": percent(s["share_of_limit"], 0), "wait": percent(s["waiting_frac"], 0)}
    return shares | {"used": number(used, 0 if used > 10 else 1), "limit": number(limit)}


def sample(kind: str, port: Port, source: str) -> str:
    """An input to try a command with; words of our own mean nothing to a person's data."""
    given = KINDS[kind].sample or f'"{" ".join(["0.5"] * math.prod(port.shape))}"'
    return '"…"' if KINDS[kind].sample.startswith('"') and source not in BUILTIN else given


def beside(results: dict[str, Any]) -> str:
    """What simpler answers would get: all of them, on one line."""
    return " · ".join(f"{shown(k)}: {told(results['headline'], v)}" for k, v in results["baselines"].items())


def hardest(results: dict[str, Any], labels: list[str]) -> str:
    """ "hardest: 8, read as 1 in 3 of 35", from the confusion matrix."""
    matrix = results.get("confusion")
    if not matrix:
        return ""
    errors = ((n, t, p, sum(row)) for t, row in enumerate(matrix) for p, n in enumerate(row) if p != t)
    n, true, predicted, total = max(errors, default=(0, 0, 0, 0))
    said = _("hardest: {true}, read as {predicted} in {n} of {total}") if n else _("none was wrong")
    return said.format(true=shown(labels[true]), predicted=shown(labels[predicted]), n=n, total=total)


def summary(parent: Path, results: list[dict[str, Any]], unit: str) -> dict[str, Any]:
    """Mean ± sd over folds or seeds, and each one."""
    values = {k: [r["metrics"][k] for r in results] for k in results[0]["metrics"] if all(k in r["metrics"] for r in results)}
    return {
        "run": str(parent),
        "by": unit,
        "headline": results[0]["headline"],
        "metrics": {k: statistics.fmean(v) for k, v in values.items()},
        "sd": {k: statistics.stdev(v) for k, v in values.items()},
        "each": [r["metrics"] for r in results],
        "n": sum(r["n"] for r in results) if unit == "fold" else results[0]["n"],
        "seconds": sum(r["seconds"] for r in results),
    }


def card(name: str, recipe: Recipe, facts: dict[str, Any], results: dict[str, Any]) -> str:
    """The model card, README.md of a run."""
    name_of, (low, high) = NAMES.get(results["headline"], ""), results["interval"]
    lines = [
        _("Trained by cloche {cloche} with PyTorch {torch}."),
        _("Data: {source}, {n} examples, fingerprint {fingerprint}."),
        _("Net: {kind}, {parameters} parameters. Task: {task}."),
        _("Answers: {answers}.") if facts["labels"] else "",
        _("Measured on the part {part}, n = {judged}, seed {seed}."),
        "" if low is None else _("95 % interval of {name}: {low}–{high}.").format(name=name_of, low=number(low, 4), high=number(high, 4)),
    ]
    given = facts | {"source": recipe.data.source, "kind": recipe.net.kind, "task": recipe.task.kind}
    given |= {"answers": listed(facts["labels"], 12), "part": part_name(results["part"]), "judged": results["n"], "seed": results["seed"]}
    said = "\n\n".join(line.format(**given) for line in lines if line)
    rows = "\n".join(f"| {k} | {number(v, 4)} |" for k, v in results["metrics"].items())
    return f"# {shown(name)}\n\n{said}\n\n| | |\n|---|---|\n{rows}\n"


def plain(model: Model, results: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `--json` prints for train and evaluate."""
    r = model.results | (results or {})
    keys = "part headline metrics interval baseline baselines n per_class confusion seed steps seconds speed".split()
    return {"run": str(model.path), "task": model.recipe.task.kind, **{k: r[k] for k in keys if k in r}}


def columns(cells: list[list[str]], left: int) -> list[str]:
    """Rows of text with aligned columns, the first `left` of them to the left, the others to the right."""
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{c:{'<' if i < left else '>'}{wide[i]}}" for i, c in enumerate(row)).rstrip() for row in cells]


def class_table(table: dict[str, Any], labels: list[str]) -> list[list[str]]:
    """The head, then a row for each class."""
    shares = zip(*(map(percent, table[k]) for k in ("precision", "recall", "f1")), strict=True)
    rows = [[label, *three, number(n)] for label, three, n in zip(labels, shares, table["support"], strict=True)]
    return [[_("class"), _("precision"), _("recall"), _("F1"), _("examples")], *rows]


def figures_text(model: Model, results: dict[str, Any]) -> str:
    """The figures, then precision, recall and F1 of each class, then the confusion matrix."""
    lines = [f"{part_name(results['part'])} · n = {number(results['n'])}"]
    lines += [f"  {k:<20} {number(v, 4)}" for k, v in results["metrics"].items()]
    lines += [f"  {shown(k)}: {number(v, 4)}" for k, v in results["baselines"].items()]
    labels = [shown(label) for label in model.facts["labels"]]
    if table := results.get("per_class"):
        lines += ["", *("  " + line for line in columns(class_table(table, labels), 1))]
        if never := [label for label, n in zip(labels, table["predicted"], strict=True) if n == 0]:
            lines.append("  " + _("never predicted, so precision and F1 count as 0: {names}").format(names=listed(never)))
    matrix = results.get("confusion")
    if matrix and len(matrix) <= 20:
        rows = [[label, *(number(n) if n else "·" for n in row)] for label, row in zip(labels, matrix, strict=True)]
        lines += ["", "  " + _("rows are the true class, columns the answer")]
        lines += ["  " + line for line in columns([["", *(label[:6] for label in labels)], *rows], 1)]
    return "\n".join(lines)


def answers_text(answers: list[dict[str, Any]]) -> str:
    """One line an input: the label with the likeliest three, the value, the text, or the likeliest next tokens."""
    lines = []
    for a in answers:
        numbers = a.get("values") or ([a["value"]] if "value" in a else [])
        said = shown(a.get("label") or a.get("text") or ", ".join(a.get("labels", []))) or " ".join(map(plainly, numbers))
        likely = " · ".join(f"{shown(k)} {percent(p)}" for k, p in list(a.get("probabilities", {}).items())[: 3 if said else 5])
        lines.append(f"{shown(a['input'])}   {said or ('…' if likely else '–')}   {likely}".rstrip())
    return "\n".join(lines)


def plainly(value: Any) -> str:
    """A number; of several columns one each."""
    return "/".join(map(plainly, value)) if isinstance(value, list) else number(value, 4)


def summary_text(found: dict[str, Any]) -> str:
    """--folds and --seeds: each run's first figure, then mean ± sd."""
    name = found["headline"]
    each = " · ".join(told(name, m[name]) for m in found["each"])
    mean, sd = told(name, found["metrics"][name]), told(name, found["sd"][name])
    text = _("{name} {mean} ± {sd}   (n = {n})   {each}   {run}")
    return text.format(name=NAMES.get(name, name), mean=mean, sd=sd, n=number(found["n"]), each=each, run=found["run"])
