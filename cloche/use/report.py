"""`cloche report`: RUN/report/index.html, one page that needs no network, written from the run folder alone.

What needs the net or the rows is computed by `extras` when training ends, and waits in results.json. The words of the page stand in
report.html as _("…"); text that comes from the data or the recipe is escaped on its way in.
"""

from base64 import b64decode, b64encode
from dataclasses import replace
from html import escape
import math
from pathlib import Path
import re
import shlex
from statistics import fmean
from string import Template
import tomllib
from typing import Any

import numpy as np
import torch
from torch import nn

from cloche import files, trust
from cloche.build import Data, precision_of
from cloche.data.chunk import Chunk
from cloche.tasks.classify import Classify
from cloche.tasks.metrics import NAMES, SHARES, given, told
from cloche.tasks.regress import Regress
from cloche.training.precision import Precision
from cloche.training.run import Results, checked, read_events
from cloche.use import draw, story
from cloche.use.explain.inside import inside
from cloche.use.model import Model, read
from cloche.words import _, _n, duration, language, listed, number, percent

INSIDE = Path("report", "inside.json")  # of a run


@torch.inference_mode()
def extras(model: Model) -> dict[str, Any]:
    """What the page needs of the net and the rows, compact enough for results.json.

    Returns: counts, training examples of each class; wrong, the worst of the wrong answers, with pictures; plane, the answers over the
        range of one or two columns.
    """
    data, task, results, precision = model.data(), model.task, model.results, precision_of(model.recipe)
    store, known, worst = data.store, isinstance(task, Classify | Regress), results["worst"] if isinstance(task, Classify | Regress) else []
    out: dict[str, Any] = {"wrong": []}
    if store.labels:
        train = store.label[data.rows["train"]]
        out["counts"] = (train.sum(0) if train.ndim == 2 else np.bincount(train, minlength=len(store.labels))).astype(int).tolist()
    ids = np.array([w["ids"] for w in worst], np.int64)
    images = replace(data.part("test"), ids=ids).take(np.arange(len(ids))).data.get("image", [None] * len(ids)) if worst else []
    for w, true, x in zip(worst, store.label[ids].reshape(len(ids), -1) if worst else (), images, strict=True):
        if known and len(true) == 1 and true[0] != w["predicted"]:
            image = "" if x is None else b64encode(draw.picture(data.prepare.pixels_of(x))).decode()
            out["wrong"].append({**w, "true": round(float(true[0]), 5), "image": image})
    shape, judged = tuple(store.fields["columns"].shape[1:]) if known and "columns" in store.fields else (), data.rows[results["part"]]
    if shape == (1,) or (shape == (2,) and store.label.ndim == 1):
        out["plane"] = _plane(data, model.net, task, precision, judged[:: -(-len(judged) // 500)])
    return out


@torch.inference_mode()
def draw_inside(model: Model) -> None:
    """What can be seen inside the net on a first example, as SVG by its title; the page takes it from there."""
    (model.path / INSIDE).parent.mkdir(exist_ok=True)
    files.write_json(model.path / INSIDE, {title: draw.svg(f) for title, f in inside(model, None)[2].items()})


def _plane(data: Data, net: nn.Module, task: Any, precision: Precision, ids: np.ndarray) -> dict[str, Any]:
    """Answers on an even grid over the range of the columns, and at the rows `ids`."""
    columns, label = data.store.fields["columns"].float().cpu().numpy(), data.store.label[ids]
    low, high = columns.min(0), columns.max(0)
    margin, many = 0.06 * (high - low), 120 if len(low) == 2 else 200
    ends = [np.linspace(a, b, many) for a, b in zip(low - margin, high + margin, strict=True)]
    x = torch.from_numpy(np.concatenate([np.stack(np.meshgrid(*ends), -1).reshape(-1, len(ends)), columns[ids]]).astype(np.float32))
    at = torch.arange(len(x))
    chunk = data.prepare.device(Chunk({"columns": x}, at, at, torch.ones(len(x)), at[0], False).to(data.device))
    with precision.autocast(data.device):
        y = net(given(chunk)).float()
    y = (task.probabilities(y) if isinstance(task, Classify) else y.reshape(len(y), -1)).nan_to_num().cpu().numpy()
    y, mine = y[: -len(ids)], y[-len(ids) :]
    out = {"box": [round(float(v), 5) for e in ends for v in (e[0], e[-1])], "x": np.round(columns[ids], 4).T.tolist()}
    if len(ends) == 2:  # a byte each: a list of numbers takes ten times the room
        planes = {"best": y.argmax(1), "sure": np.round(255 * y.max(1))}
        coded = {k: b64encode(v.astype(np.uint8).tobytes()).decode() for k, v in planes.items()}
        return out | coded | {"label": label.tolist(), "answer": mine.argmax(1).tolist()}
    target = label if label.ndim == 2 else np.eye(y.shape[1])[label]
    return out | {"lines": np.round(y.T[:8], 5).tolist(), "label": np.round(target.T[:8], 5).tolist()}


def verdict(epochs: list[dict[str, Any]], results: dict[str, Any] | None = None) -> tuple[str, str]:
    """How well a run is fitted, and the numbers that say so: the first of these rules that holds.

    T and V: training and validation loss by epoch, late T and V their means over the last fifth of the epochs, f of them.
    too short: under 3 epochs. unstable: a loss is not finite, or late T is above its lowest mean of f by 20 % and by 2 % of the first T.
    rising: so is late V, by 10 % and 2 %, while T fell: stopped early enough if V at the weights kept is not half of the way up, else
    overfitting. gap: at the weights kept V, without a validation part the test loss, is more than 2 T, and than T plus a tenth of the
    first T: overfitting. underfitting: late T, and late V if there is one, are lower than f epochs before by 1 % and by 5 % of their
    whole fall; or the score is not two thirds of the way from the baseline to perfect. Else well fitted.
    """
    r, f = results or {}, max(1, len(epochs) // 5)
    t, v = ([e[k] for e in epochs if k in e] for k in ("train_loss", "validation_loss"))
    if len(t) < 3 or not all(map(math.isfinite, t + v)):
        return (_("too short to judge"), _("fewer than 3 epochs")) if len(t) < 3 else (_("unstable"), _("a loss was not a finite number"))
    tm, vm = ([fmean(a[i : i + f]) for i in range(len(a) - f + 1)] for a in (t, v))
    low, kept = int(np.argmin(v or t)), next((i for i, e in enumerate(epochs) if e["step"] == r.get("best_step")), len(t) - 1)
    held = v[kept] if v else r.get("metrics", {}).get("loss") if r.get("part") == "test" else None
    fell = [1 - m[-1] / m[-1 - f] for m in (tm, vm) if m and m[-1 - f] - m[-1] > max(0.01 * m[-1 - f], 0.05 * (m[0] - m[-1]))]
    known = r.get("headline") in ("accuracy", "mse")  # baselines in the unit of the loss, or of what the log tells
    base, score = (
        (r.get("baseline") or {}).get("value") if known else None,
        max(epochs[-1].get(k, -1.0) for k in ("train_right", "validation_accuracy")),
    )
    way = 1.0 if base is None else (score - base) / (1 - base) if score >= 0 and base < 1 else 1 - tm[-1] / base if base else 1.0
    whose = _("the validation loss") if v else _("the test loss (there is no validation part)")
    rose = lambda a, m, part: m[-1] - min(m) > max(part * abs(min(m)), 0.02 * abs(a[0]))  # noqa: E731
    if rose(t, tm, 0.2):
        kind, text = _("unstable"), _("the training loss was {least} after epoch {at} and {t} at the end: try a lower optim.lr")
    elif v and rose(v, vm, 0.1) and tm[-1] < t[low]:
        kind = _("stopped early enough") if v[kept] < (v[low] + vm[-1]) / 2 else _("overfitting")
        text = _("the validation loss was lowest after epoch {e} ({low}) and rose to {v} in the last fifth of the run, while the training "
                 "loss went on falling from {was} to {t}; the weights kept are those of epoch {kept}, where it was {held}")  # fmt: skip
    elif held is not None and held > max(2 * t[kept], t[kept] + 0.1 * t[0]):
        kind, text = _("overfitting"), _("at the weights kept (epoch {kept}) {whose} is {held}, the training loss only {tk}")
    elif len(fell) == 2:
        kind, text = _("underfitting"), _("the training loss still fell by {a} in the last fifth of the run, the validation loss by {b}")
    elif fell and not v:
        kind, text = _("underfitting"), _("the training loss still fell by {a} in the last fifth of the run (there is no validation part)")
    elif way < 2 / 3:
        kind, text = _("underfitting"), _("learning levelled off {way} of the way from the baseline to perfect; a larger net may do better")
    elif held is None:
        kind, text = _("well fitted"), _("the training loss levelled off at {tk}; there is nothing to compare it with")
    else:
        kind = _("well fitted")
        text = _("at the weights kept (epoch {kept}) the training loss is {tk}, {whose} {held}: neither a wide gap nor a late rise")
    say = {"low": (v or t)[low], "least": min(t), "was": t[low], "t": tm[-1], "v": (vm or tm)[-1], "held": held or 0.0, "tk": t[kept]}
    share = {"way": max(way, 0.0), "a": [*fell, 0.0][0], "b": [0.0, *fell][-1]}
    at = {"e": low + 1, "at": int(np.argmin(t)) + 1, "kept": kept + 1, "whose": whose}
    return kind, text.format(**at, **{k: short(n) for k, n in say.items()}, **{k: percent(n, 0) for k, n in share.items()})


def short(value: float) -> str:
    """Three significant digits."""
    return number(value, min(8, max(0, 2 - math.floor(math.log10(abs(value)))))) if value and math.isfinite(value) else f"{value:g}"


def report(run: str | Path) -> Path:
    """Write a finished run's page again. Returns: its path. Raises: UserError when there is no finished, undamaged run."""
    _recipe, facts, _prepare = read(Path(run))
    checked(Results, Path(run) / "results.json", facts)
    with trust.believing(Path(run)):
        return write_report(Path(run))


def write_report(path: Path) -> Path:
    """RUN/report/index.html from what lies in RUN."""
    recipe, events, out = (path / "recipe.toml").read_text(encoding="utf-8"), read_events(path), files.inside(path, "report/index.html")
    facts, r = (files.read_json(path / f"{name}.json") for name in ("facts", "results"))
    labels, epochs = facts["labels"], [e for e in events if e["kind"] == "epoch"]
    drawn = files.inside(path, INSIDE.as_posix())
    figures = files.read_json(drawn, limit_bytes=64 << 20).items() if drawn.exists() else ()
    words = _words(path, tomllib.loads(recipe), facts, r) | dict(zip(("verdict", "evidence"), verdict(epochs, r), strict=True))
    words["cores"] = _n("{n} thread", "{n} threads", facts["threads"]).format(n=facts["threads"])
    values = {k: escape(str(v)) for k, v in words.items()} | {"recipe": escape(recipe), "course": _course(epochs, events, r)}
    values |= _field(r["extras"].get("plane", {}), labels) | _tables(r, labels)
    values |= {"confusion": _confusion(r.get("confusion") or [], labels), "wrong": _wrong(r["extras"]["wrong"], labels)}
    values["samples"] = _samples(r["samples"])
    frame = '<figure><figcaption class="line">{title}</figcaption>{figure}</figure>'
    values["inside"] = "".join(frame.format(title=escape(title), figure=figure) for title, figure in figures)
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = re.sub(r"<!--if (\w+)-->(.*?)<!--/if-->", lambda m: m[2] if values[m[1]] else "", page, flags=re.DOTALL)
    page = re.sub(r'_\("([^"]*)"\)', lambda m: escape(_(m[1])).replace("$", "$$"), page)
    out.parent.mkdir(exist_ok=True)
    files.durable_write(out, Template(page).substitute(values).encode(errors="backslashreplace"))
    return out


def _words(path: Path, recipe: dict[str, Any], facts: dict[str, Any], r: dict[str, Any]) -> dict[str, Any]:
    """The words and numbers of the page that differ between runs, as text."""
    name, (low, high), base, net, s = r["headline"], r["interval"], r.get("baseline"), recipe["net"], r.get("speed")
    labels, left, show, parts = facts["labels"], facts["left_out"], lambda v: told(name, v), facts["parts"]
    measured = _("{name} on the {part} part")
    ended = {"low": "", "high": ""} if low is None else {"low": show(low), "high": show(high)}
    value = lambda k, v: told(k, v) if k in SHARES else short(v)  # noqa: E731
    others = [f"{NAMES.get(k, k.replace('_', ' '))} {value(k, v)}" for k, v in r["metrics"].items() if k != name]
    speed = {"speed": ""} if not s else {
        "speed": number(s["examples_per_s"]), "share": percent(s["share_of_limit"], 0), "wait": percent(s["waiting_frac"], 0),
        "limit": number(s["limit_flops_per_s"] / 1e9)}  # fmt: skip
    return {
        **recipe["train"], **facts, **ended, **speed, "lang": language(), "title": path.resolve().name, "path": shlex.quote(str(path)),
        "score": show(r["metrics"][name]), "measured": measured.format(name=NAMES.get(name, name), part=story.part_name(r["part"])),
        "baseline": story.beside(r), "others": " · ".join(others),
        "scale": "1" if name in SHARES and low is not None else "", "p": r["metrics"][name], "a": low, "b": high,
        "c": base["value"] if base else 0, "n": number(r["n"]), "hardest": story.hardest(r, labels), "all": number(facts["n"]),
        "parameters": number(facts["parameters"]), "task": recipe["task"]["kind"], "net": net.get("name", net["kind"]),
        "module": net.get("name", ""), "command": not net.get("name") or "",
        "parts": " + ".join(f"{story.part_name(k)} {number(n)}" for k, n in parts.items() if n),
        "classes": f"{len(labels)}: {listed(labels, 24)}" if labels else "",
        "left": f"{len(left)}: {listed((f'{file} ({why})' for file, why in left), 5)}" if left else "",
        "time": duration(r["seconds"]), "steps": number(r["steps"]), "best": number(r["best_step"]),
    }  # fmt: skip


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"  # noqa: E731
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>' if rows else ""


def _tables(r: dict[str, Any], labels: list[str]) -> dict[str, str]:
    """The layers and the classes."""
    unit, per = ("MFLOP", 1e6) if sum(w["flops"] for w in r["layers"]) > 1e6 else ("kFLOP", 1e3)
    shown = lambda w: (number(w["params"]), number(w["flops"] / per, 1), number(w["bytes"] / 1e3, 1), w["sees"])  # noqa: E731
    rows = [[w["name"], w["does"], ", ".join(map(str, w["output"])), *shown(w)] for w in r["layers"]]
    layers = _table([_("layer"), _("does"), _("output (B, …)"), _("parameters"), unit, "kB", _("sees")], rows, "names")
    found = r.get("per_class") or {"precision": [], "recall": [], "f1": [], "support": []}
    t = [map(percent, found[k]) for k in ("precision", "recall", "f1")]
    t += [map(number, n) for n in (found["support"], r["extras"].get("counts", []))]
    head = [_("class"), _("precision"), _("recall"), _("F1"), _("examples"), _("trained on")]
    return {"layers": layers, "per_class": _table(head, [list(row) for row in zip(labels, *t, strict=False)])}


def _confusion(matrix: list[list[int]], labels: list[str]) -> str:
    """A table of up to 60 classes, with numbers up to 20; beyond that the 30 errors that happen most often."""
    k, body, head = len(labels), "", "".join(f"<th><span>{escape(name)}</span></th>" for name in labels)
    if k > 60 or not matrix:
        pairs = sorted(((n, t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) if n and t != p), reverse=True)[:30]
        return _table([_("true"), _("answered"), _("examples")], [[labels[t], labels[p], number(n)] for n, t, p in pairs])
    for t, row in enumerate(matrix):
        body += f"<tr><th>{escape(labels[t])}</th>"
        for p, n in enumerate(row):
            shade = f' class="{"right" if t == p else "wrong"}" style="--s:{(n / sum(row)) ** 0.6:.2f}"' if n else ""
            body += f'<td{shade} title="{escape(f"{labels[t]} → {labels[p]}: {n}")}">{number(n) if n and k <= 20 else ""}</td>'
        body += "</tr>"
    kind = ("many " if k > 20 else "") + ("short" if max(map(len, labels)) <= 3 else "")
    return f'<div class="scroll"><table class="confusion {kind}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _wrong(wrong: list[dict[str, Any]], labels: list[str]) -> str:
    """Pictures with what is true and what was answered; a table where there are none."""
    name = lambda v: labels[int(v)] if labels else short(v)  # noqa: E731
    if not any(w["image"] for w in wrong):
        return _table([_("example"), _("true"), _("answered")], [[w["name"], name(w["true"]), name(w["predicted"])] for w in wrong[:12]])
    tiles, said = "", _("true {true}, answered\u00a0{answer} ({share})")
    for w in wrong:
        text = said.format(true=name(w["true"]), answer=name(w["predicted"]), share=percent(w["probability"], 0))
        image = f'<img alt="{escape(w["name"])}" title="{escape(w["name"])}" src="data:image/png;base64,{escape(w["image"])}">'
        tiles += f"<li>{image}{escape(text)}</li>"
    return f'<ul class="tiles">{tiles}</ul>'


def _samples(samples: list[dict[str, Any]]) -> str:
    """What was asked, what ought to come out, and what came out."""
    said = [s["answer"]["text"] for s in samples]
    rows = [[s["name"], s["true"], text, "" if s["true"] == text else "✗"] for s, text in zip(samples, said, strict=True)]
    return _table([_("example"), _("true"), _("answered"), ""], rows, "names")


def _course(epochs: list[dict[str, Any]], events: list[dict[str, Any]], r: dict[str, Any]) -> str:
    """Loss and accuracy by epoch; the loss of single steps faint behind."""
    steps, at, x = [e for e in events if e["kind"] == "step"], [0, *(e["step"] for e in epochs)], range(1, len(epochs) + 1)
    few = max(1, len(steps) // 400)  # so many lines of the log become one point
    thin = [(g[-1]["step"], fmean(e["loss"] for e in g)) for g in (steps[i : i + few] for i in range(0, len(steps), few))]
    faint = (np.interp([step for step, _loss in thin], at, range(len(at))), [loss for _step, loss in thin]) if thin else None
    kept = next((i for i in x if at[i] == r["best_step"] != r["steps"]), None)
    more = {_("loss"): ("train_loss", "validation_loss", {"faint": faint})}
    more[_("accuracy")] = ("train_right", "validation_accuracy", {"level": (r.get("baseline") or {}).get("value")})
    figures = []
    for title, (train, validation, how) in more.items():
        names = {_("train"): train, _("validation"): validation}
        lines = {name: (x, [e[k] for e in epochs]) for name, k in names.items() if all(k in e for e in epochs)}
        figures += ["<figure>" + draw.svg(draw.curves(lines, _("epoch"), title, kept=kept, **how)) + "</figure>"] if lines else []
    return "".join(figures)


def _field(plane: dict[str, Any], labels: list[str]) -> dict[str, str]:
    """The fitted curve of one column, or the decision surface of two."""
    x, names, out = np.array(plane.get("x")), labels or [_("answer")], {"curve": "", "surface": ""}
    if "lines" in plane:
        lines = {name: (np.linspace(*plane["box"], len(y)), y) for name, y in zip(names, plane["lines"], strict=False)}
        out["curve"] = draw.svg(draw.curves(lines, "x", "", dots=[(x[0], y) for y in plane["label"]]))
    elif plane:
        best, sure = (np.frombuffer(b64decode(plane[k]), np.uint8).reshape(120, 120) for k in ("best", "sure"))
        label, said = (np.array(plane[k]) for k in ("label", "answer"))
        out["surface"] = draw.svg(draw.surface(best, sure / 255, plane["box"], x.T, label, said, names))
    return out
