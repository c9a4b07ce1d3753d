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

from cloche import files, folders, trust
from cloche.build import Data, precision_of
from cloche.tasks.classify import Classify
from cloche.tasks.metrics import NAMES, SHARES, given, told
from cloche.tasks.regress import Regress
from cloche.training.contract import Results, checked
from cloche.training.run import read_events
from cloche.use import draw, story
from cloche.use.explain.inside import inside
from cloche.use.layers import layer_table
from cloche.use.model import Model, read
from cloche.words import _, _n, duration, language, listed, number, percent

INSIDE = Path("report", "inside.json")  # of a run


@torch.inference_mode()
def extras(model: Model) -> dict[str, Any]:
    """For results.json: the counts of classes, the worst of the wrong answers, the answers over the range of one or two columns."""
    data, task, store = model.data(), model.task, model.data().store
    out: dict[str, Any] = {"wrong": []}
    if store.labels:
        train = store.label[data.rows["train"]]
        out["counts"] = (train.sum(0) if train.ndim == 2 else np.bincount(train, minlength=len(store.labels))).astype(int).tolist()
    if not isinstance(task, Classify | Regress):
        return out
    worst = model.results["worst"]
    ids = np.array([w["ids"] for w in worst], np.int64)
    images = replace(data.part("test"), ids=ids).take(np.arange(len(ids))).data.get("image", [None] * len(ids))
    for w, true, x in zip(worst, store.label[ids].reshape(len(ids), -1), images, strict=True):
        if len(true) == 1 and true[0] != w["predicted"]:
            image = "" if x is None else b64encode(draw.picture(data.prepare.pixels_of(x))).decode()
            out["wrong"].append({**w, "true": round(float(true[0]), 5), "image": image})
    shape = store.fields["columns"].shape[1:] if "columns" in store.fields else ()
    if shape == (1,) or (shape == (2,) and store.label.ndim == 1):
        rows = data.rows[model.results["part"]]
        out["plane"] = _plane(model, data, rows[:: -(-len(rows) // 500)])
    return out


@torch.inference_mode()
def draw_inside(model: Model) -> None:
    """What can be seen inside the net on a first example, as SVG by its title; the page takes it from there."""
    folders.make_folder((model.path / INSIDE).parent)
    files.write_json(model.path / INSIDE, {title: draw.svg(f) for title, f in inside(model, None)[2].items()})


def _plane(model: Model, data: Data, ids: np.ndarray) -> dict[str, Any]:
    """Answers on an even grid over the range of the columns, and at the rows `ids`."""
    columns, label = data.store.fields["columns"].float().cpu().numpy(), data.store.label[ids]
    low, high = columns.min(0), columns.max(0)
    margin, many = 0.06 * (high - low), 120 if len(low) == 2 else 200
    ends = [np.linspace(a, b, many) for a, b in zip(low - margin, high + margin, strict=True)]
    x = torch.from_numpy(np.concatenate([np.stack(np.meshgrid(*ends), -1).reshape(-1, len(ends)), columns[ids]]).astype(np.float32))
    with precision_of(model.recipe).autocast(data.device):
        y = model.net(given(model.chunk({"columns": x}))).float()
    y = (model.task.probabilities(y) if isinstance(model.task, Classify) else y.reshape(len(y), -1)).nan_to_num().cpu().numpy()
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
    base = (r.get("baseline") or {}).get("value") if known else None
    score = max(epochs[-1].get(k, -1.0) for k in ("train_right", "validation_accuracy"))
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
    words = _words(path, tomllib.loads(recipe), facts, r) | dict(zip(("verdict", "evidence"), verdict(epochs, r), strict=True))
    drawn = files.inside(path, INSIDE.as_posix())
    drawn = files.read_json(drawn, limit_bytes=64 << 20) if drawn.exists() else {}
    frame = '<figure><figcaption class="line">{title}</figcaption>{figure}</figure>'
    pairs = [(s["name"], s["true"], s["answer"]["text"]) for s in r["samples"]]
    samples = [[name, true, said, "" if true == said else "✗"] for name, true, said in pairs]
    values = {k: escape(str(v)) for k, v in words.items()}
    values |= {
        "recipe": escape(recipe),
        "layers": _table(layer_table(r["layers"]), "names"),
        "per_class": _classes(r["per_class"], r["extras"]["counts"], labels) if "per_class" in r else "",
        "samples": _table([[_("example"), _("true"), _("answered"), ""], *samples], "names"),
        "wrong": _wrong(r["extras"]["wrong"], labels),
        "inside": "".join(frame.format(title=escape(title), figure=figure) for title, figure in drawn.items()),
    }  # first what a damaged folder fails at, then what takes time to draw
    values |= {"course": _course(epochs, events, r), "confusion": _confusion(r.get("confusion") or [], labels)}
    values |= _field(r["extras"].get("plane", {}), labels)
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = re.sub(r"<!--if (\w+)-->(.*?)<!--/if-->", lambda m: m[2] if values[m[1]] else "", page, flags=re.DOTALL)
    page = re.sub(r'_\("([^"]*)"\)', lambda m: escape(_(m[1])).replace("$", "$$"), page)
    folders.make_folder(out.parent)
    files.durable_write(out, Template(page).substitute(values).encode(errors="backslashreplace"))
    return out


def _words(path: Path, recipe: dict[str, Any], facts: dict[str, Any], r: dict[str, Any]) -> dict[str, Any]:
    """The words and numbers of the page that differ between runs, as text."""
    name, (low, high), net = r["headline"], r["interval"], recipe["net"]
    labels, left = facts["labels"], facts["left_out"]
    ends = {"low": "", "high": ""} if low is None else {"low": told(name, low), "high": told(name, high)}
    others = {k: told(k, v) if k in SHARES else short(v) for k, v in r["metrics"].items() if k != name}
    speed = {"speed": number(s["examples_per_s"]), **story.speed(s)} if (s := r["speed"]) else {"speed": ""}
    return {
        **recipe["train"], **facts, **ends, **speed, "lang": language(), "title": path.resolve().name, "path": shlex.quote(str(path)),
        "score": told(name, r["metrics"][name]),
        "measured": _("{name} on the {part} part").format(name=NAMES.get(name, name), part=story.part_name(r["part"])),
        "baseline": story.beside(r), "others": " · ".join(f"{NAMES.get(k, k.replace('_', ' '))} {v}" for k, v in others.items()),
        "scale": "1" if name in SHARES and low is not None else "", "p": r["metrics"][name], "a": low, "b": high,
        "c": (r.get("baseline") or {"value": 0})["value"], "n": number(r["n"]), "hardest": story.hardest(r, labels),
        "all": number(facts["n"]),
        "parameters": number(facts["parameters"]), "task": recipe["task"]["kind"], "net": net.get("name", net["kind"]),
        "module": net.get("name", ""), "command": not net.get("name") or "",
        "parts": " + ".join(f"{story.part_name(k)} {number(n)}" for k, n in facts["parts"].items() if n),
        "classes": f"{len(labels)}: {listed(labels, 24)}" if labels else "",
        "left": f"{len(left)}: {listed((f'{file} ({why})' for file, why in left), 5)}" if left else "",
        "time": duration(r["seconds"]), "steps": number(r["steps"]), "best": number(r["best_step"]),
        "cores": _n("{n} thread", "{n} threads", facts["threads"]).format(n=facts["threads"]),
    }  # fmt: skip


def _table(rows: list[list[str]], kind: str = "") -> str:
    """The first row is the head; nothing where there is no other."""
    head, *body = ("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    head, text = head.replace("td>", "th>"), "".join(body)
    return f'<div class="scroll"><table class="{kind}"><thead>{head}</thead><tbody>{text}</tbody></table></div>' if body else ""


def _classes(table: dict[str, Any], counts: list[int], labels: list[str]) -> str:
    head, *rows = story.class_table(table, labels)
    return _table([[*head, _("trained on")], *([*row, number(n)] for row, n in zip(rows, counts, strict=True))])


def _confusion(matrix: list[list[int]], labels: list[str]) -> str:
    """A table of up to 60 classes, with numbers up to 20; beyond that the 30 errors that happen most often."""
    k, body, head = len(labels), "", "".join(f"<th><span>{escape(name)}</span></th>" for name in labels)
    if k > 60 or not matrix:
        errors = sorted(((n, t, p) for t, row in enumerate(matrix) for p, n in enumerate(row) if n and t != p), reverse=True)[:30]
        return _table([[_("true"), _("answered"), _("examples")], *([labels[t], labels[p], number(n)] for n, t, p in errors)])
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
    answers = [(name(w["true"]), name(w["predicted"])) for w in wrong]
    if not any(w["image"] for w in wrong):
        rows = [[w["name"], *pair] for w, pair in zip(wrong[:12], answers, strict=False)]
        return _table([[_("example"), _("true"), _("answered")], *rows])
    tiles, said = "", _("true {true}, answered\u00a0{answer} ({share})")
    for w, (true, answer) in zip(wrong, answers, strict=True):
        text = said.format(true=true, answer=answer, share=percent(w["probability"], 0))
        image = f'<img alt="{escape(w["name"])}" title="{escape(w["name"])}" src="data:image/png;base64,{escape(w["image"])}">'
        tiles += f"<li>{image}{escape(text)}</li>"
    return f'<ul class="tiles">{tiles}</ul>'


def _course(epochs: list[dict[str, Any]], events: list[dict[str, Any]], r: dict[str, Any]) -> str:
    """Loss and accuracy by epoch; the loss of up to 400 single steps faint behind."""
    steps, at, x = [e for e in events if e["kind"] == "step"], [0, *(e["step"] for e in epochs)], range(1, len(epochs) + 1)
    thin = steps[:: -(-len(steps) // 400) or 1]
    faint = (np.interp([e["step"] for e in thin], at, range(len(at))), [e["loss"] for e in thin]) if thin else None
    kept = next((i for i in x if at[i] == r["best_step"] != r["steps"]), None)
    level, figures = (r.get("baseline") or {}).get("value"), []
    loss = (_("loss"), ("train_loss", "validation_loss"), {"faint": faint})
    right = (_("accuracy"), ("train_right", "validation_accuracy"), {"level": level})
    for title, keys, how in (loss, right):
        named = zip((_("train"), _("validation")), keys, strict=True)
        lines = {name: (x, [e[k] for e in epochs]) for name, k in named if all(k in e for e in epochs)}
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
