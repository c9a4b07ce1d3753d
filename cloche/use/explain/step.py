"""`cloche explain RUN INPUT`: one training step on one input, in numbers and pictures, on a copy of the run's weights.

Float32, dropout off, normalisation by its running statistics, an optimizer without memory: the same numbers every time.
"""

import copy
import math
from pathlib import Path
import re
from typing import Any

from matplotlib.figure import Figure
import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.config import show
from cloche.data.chunk import Chunk
from cloche.errors import UserError
from cloche.files import durable_write
from cloche.training.objective import gradient_norm
from cloche.use.draw import png, styled
from cloche.use.explain.layers import Layer, columns, layers_of, watch
from cloche.use.model import Model, load
from cloche.words import _, _n, listed, number, percent

Found = tuple[dict[str, Any], str]


def explain_step(run: str | Model, given: Any = None, label: Any = None, at: str | None = None, out: str | None = None) -> Found:
    """One training step of a finished run on one input: what --json prints, and the text.

    Args:
        given: as `predict` takes it; None: the first validation example. label: the true class; else the data's, else the predicted one.
        at: "conv1:0,5,7", one number of a map as its products. out: the folder for pictures, else RUN/report.
    Raises: UserError for a class, a layer or a place that is not there.
    """
    model = run if isinstance(run, Model) else load(run)
    name, chunk = example(model, given)
    net, old, task = copy.deepcopy(model.net).requires_grad_(True), dict(model.net.named_parameters()), model.task
    with torch.no_grad():
        answer = task.answer({"net": net}, chunk)[0]
    true, why = truth(model, chunk, label, answer)
    optimizer, calls = model.recipe.optim.build(list(net.parameters())), watch(net)
    loss = task.loss({"net": net}, chunk, None)[0]  # forward pass and loss
    rows, logits = [row for row in layers_of(net, calls) if row.output.numel()], calls[-1].raw[0].tolist()
    loss.backward()
    was = {p: old[key] for key, p in net.named_parameters()}
    shown = [{"name": r.name, "activation": spread(r.output.detach()), "gradient_norm": norm(p.grad for p in r.parameters)} for r in rows]
    gradient_norm(list(net.parameters()), model.recipe.optim.clip)
    optimizer.step()
    for layer, row in zip(shown, rows, strict=True):
        moved, size = norm(p - was[p] for p in row.parameters), norm(was[p] for p in row.parameters)
        layer["update_ratio"] = moved / size if size else None
    with torch.no_grad():
        after = float(task.loss({"net": net}, chunk, None)[0])
    found = {"input": name, "label": true, "predicted": next(iter(answer.values())), "probabilities": answer.get("probabilities")}
    found |= {"loss": loss.item(), "loss_after": after, "layers": shown, "pictures": []}
    text = story(model, found, rows, logits, why)
    if at is not None:
        found["at"], more = products(rows, at, was)
        text += more
    if "image" in chunk.data and any(row.kind == "conv" for row in rows):
        seen, folder = model.prepare.pixels_of(chunk.data["image"][0]), Path(out) if out else model.path / "report"
        found["pictures"] = pictures(rows, seen, name, folder)
        text.append(_("pictures   {paths}").format(paths="\n           ".join(found["pictures"])))
    return found, "\n".join([*text, _("Nothing in {run} was changed: the step was made on a copy of its weights.").format(run=model.path)])


def spread(y: Tensor) -> dict[str, float]:
    return {"min": float(y.min()), "mean": float(y.mean()), "max": float(y.max()), "zeros": float((y == 0).float().mean())}


def norm(tensors: Any) -> float | None:
    """The norm of all numbers of some tensors together; None where there are none."""
    found = [float(t.detach().norm()) for t in tensors if t is not None]
    return math.hypot(*found) if found else None


def example(model: Model, given: Any) -> tuple[str, Chunk]:
    """The name of the input, and the input as a chunk of one row; with its label where it comes from the run's own data."""
    if given is not None:
        name = str(given) if isinstance(given, str | Path) else str(given)[:40]  # an array's text is long
        return name, model.chunk(model.prepare.gather([model.prepare.encode(given)]))
    data = model.data()
    part = "validation" if len(data.rows["validation"]) else data.judged
    return data.store.names[data.rows[part][0]], data.part(part).take(np.array([0]))


def truth(model: Model, chunk: Chunk, label: Any, answer: dict[str, Any]) -> tuple[Any, str]:
    """The true label in words and whose it is: --label, else the data's own, else the answer; the chunk holds it from now on."""
    labels, k = list(model.prepare.labels), model.facts["outputs"]
    if label is None and "label" in chunk.data:
        row = chunk.data["label"][0].tolist()
        return labels[row] if labels else row[0] if k == 1 else row, _("from the data")
    said, why = next(iter(answer.values())) if label is None else str(label), _("given")
    why = _("the predicted one: give another with --label") if label is None else why
    if labels:
        if said not in labels:
            do = _("its classes: {names}").format(names=listed(labels, 50))
            raise UserError(_('this run knows no class "{name}"').format(name=said), "", do)
        chunk.data["label"] = torch.tensor([labels.index(said)], device=model.device)
        return said, why
    try:
        numbers = [float(v) for v in (said if isinstance(said, list) else str(said).split(",")) if math.isfinite(float(v))]
        chunk.data["label"] = torch.tensor(numbers, device=model.device).reshape(1, k)
    except (ValueError, RuntimeError):
        what = _n("the true value of this run is a number", "the true value of this run is {n} numbers", k).format(n=k)
        raise UserError(what, str(label), _("for example --label {example}").format(example=",".join(["0.5"] * k))) from None
    return numbers if k > 1 else numbers[0], why


def brief(v: Any) -> str:
    if not isinstance(v, float):
        return ", ".join(map(brief, v)) if isinstance(v, list) else str(v)
    return number(v, 4) if v == 0 or 1e-3 <= abs(v) < 1e5 else f"{v:.1e}"


def story(model: Model, found: dict[str, Any], rows: list[Layer], logits: list[float], why: str) -> list[str]:
    """The step as lines of text."""
    optim, chances, loss, after = model.recipe.optim, found["probabilities"], found["loss"], found["loss_after"]
    answer, label = brief(found["predicted"]), brief(found["label"])
    forward = [["  " + _("layer"), _("output (B, …)"), _("min"), _("mean"), _("max"), _("zeros")]]
    update = [["  " + _("layer"), _("parameters"), _("|gradient|"), "|Δw| / |w|"]]
    for row, f in zip(rows, found["layers"], strict=True):
        *sizes, zeros = f["activation"].values()
        forward.append(["  " + row.name, ", ".join(map(str, row.output.shape[1:])), *map(brief, sizes), percent(zeros, 0)])
        if row.parameters:
            held = number(sum(p.numel() for p in row.parameters))
            update.append(["  " + row.name, held, brief(f["gradient_norm"]), brief(f["update_ratio"] or 0.0)])
    said, classes = _("the mean squared distance of {answer} from {label}").format(answer=answer, label=label), []
    if chances:
        z = dict(zip(model.prepare.labels, [0.0] * (len(chances) - len(logits)) + logits, strict=True))  # one logit for two: the first is 0
        most = list(chances)[:8]
        classes = [["  " + _("class"), *(k[:12] for k in most)], ["  " + _("logit"), *(brief(z[k]) for k in most)]]
        classes.append(["  " + _("probability"), *(percent(chances[k]) for k in most)])
        said = _("−log {p}, the surprise at the true class").format(p=brief(chances[label]))
    fell = _("it fell") if after < loss else _("it did not fall") if loss else _("nothing to learn: give the true answer with --label")
    return [
        _("{input}   answer: {answer}   true: {label} ({why})").format(input=found["input"], answer=answer, label=label, why=why),
        _("0 clear    every gradient is None: backward adds to what is there, so a step clears it first"),
        _("1 forward  through the layers, in float32, dropout off"),
        *columns(forward, 2),
        *columns(classes, 1),
        _("2 loss     {loss} = {said}").format(loss=brief(loss), said=said),
        _("3 backward from the loss to the first layer: how the loss changes with each weight"),
        _("4 update   {kind}, learning rate {lr}, without memory of earlier steps").format(kind=optim.kind, lr=show(optim.lr)),
        *columns(update, 1),
        _("  loss {before} → {after} on the same input: {fell}").format(before=brief(loss), after=brief(after), fell=fell),
    ]


def products(rows: list[Layer], at: str, was: dict[nn.Parameter, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """One number of a map as its products: the numbers for --json, and the stamp in four acts as text."""
    convs = {row.name: row for row in rows if isinstance(row.module, nn.Conv2d) and row.module.groups == 1}
    match = re.fullmatch(r"([\w.]+):(\d+),(\d+),(\d+)", at.replace(" ", ""))
    if not match:
        do = _("for example --at {layer}:0,5,7").format(layer=next(iter(convs), "conv1"))
        raise UserError(_("--at needs LAYER:CHANNEL,ROW,COLUMN"), at, do)
    name, (c, y, x) = match[1], (int(v) for v in match.groups()[1:])
    if name not in convs:
        do = _("its convolutions: {names}").format(names=listed(convs, 50) or _("none"))
        raise UserError(_('this net has no convolution "{name}"').format(name=name), "", do)
    row, m, (channels, h, w) = convs[name], convs[name].module, convs[name].raw.shape[1:]
    if c >= channels or y >= h or x >= w:
        do = _("channel 0…{c}, row 0…{y}, column 0…{x}").format(c=channels - 1, y=h - 1, x=w - 1)
        raise UserError(_("there is no such place in the maps of {name}").format(name=name), at, do)
    kernel, bias, k = was[m.weight][c], float(was[m.bias][c]) if m.bias is not None else 0.0, m.kernel_size[0]  # (C, k, k)
    patch = F.unfold(row.input.detach(), m.kernel_size, m.dilation, m.padding, m.stride)[0, :, y * w + x].view_as(kernel)
    each, top, left = patch * kernel, y * m.stride[0] - m.padding[0], x * m.stride[0] - m.padding[0]
    sums, value, final = each.double().sum((1, 2)), row.raw[0, c, y, x].item(), row.output[0, c, y, x].item()
    strongest, total = sums.abs().topk(min(3, len(each))).indices.sort().values.tolist(), float(sums.sum()) + bias
    place = _("  place             kernel {c} on rows {a}…{b}, columns {d}…{e} of its input (zeros outside)")
    lines = [_("{at}   one number of a map: a stamp in four acts").format(at=at)]
    lines.append(place.format(c=c, a=top, b=top + k - 1, d=left, e=left + k - 1))
    lines.append(_("  multiply and add  channel by channel: patch × kernel = products"))
    for i in strongest:
        for j in range(k):
            cells = ["".join(f"{number(v, 3):>8}" for v in t[i, j].tolist()) for t in (patch, kernel, each)]
            lines.append(f"  {_('channel {n}').format(n=i) if j == 0 else '':<12}{cells[0]}   ×{cells[1]}   ={cells[2]}")
    if len(each) > 3:
        rest = float(sums.sum() - sums[strongest].sum())
        lines.append(_("  {n} more channels add {sum}").format(n=len(each) - 3, sum=number(rest, 4)))
    values = {k: number(v, 5) for k, v in {"sum": total - bias, "bias": bias, "total": total, "value": value, "final": final}.items()}
    write = _("  write one number  {n} products add up to {sum}, plus the bias {bias} = {total}; the map: {value}, activated {final}")
    lines.append(write.format(n=number(each.numel()), **values))
    lines.append(_("  slide             by {s} to the next place: the same kernel at {n} places").format(s=m.stride[0], n=number(h * w)))
    found = {"layer": name, "channel": c, "row": y, "column": x, "bias": bias, "sum": total, "value": value}
    return found | {"patch": patch.tolist(), "kernel": kernel.tolist(), "products": each.tolist()}, lines


def pictures(rows: list[Layer], picture: np.ndarray, name: str, folder: Path) -> list[str]:
    """explain-NAME-maps.png: the first, middle and last convolution; explain-NAME-pool.png: before and after the first pooling."""
    convs, text = [row for row in rows if row.kind == "conv"], _("{name} · {n} of {all} maps of {h}×{w} · {what}")
    last, sheets = len(convs) - 1, {"maps": [], "pool": []}
    what = {last // 2: _("middle convolution: corners and parts"), last: _("last convolution: large shapes, evidence for a class")}
    what |= {0: _("first convolution: edges and strokes")}
    panels = [("maps", convs[i].name, what[i], convs[i].output, convs[i].output, 16) for i in sorted(what)]
    for row in [row for row in rows if row.kind == "pool"][:1]:
        kept = _("the strongest of each 2×2 is kept") if "Max" in type(row.module).__name__ else _("the mean of each 2×2 is kept")
        panels.append(("pool", _("before {pool}").format(pool=row.name), kept, row.input, row.input, 8))
        panels.append(("pool", _("after {pool}").format(pool=row.name), _("a quarter of the area"), row.output, row.input, 8))
    for kind, title, told, maps, by, n in panels:  # the channels that differ most from place to place
        keep = by[0].flatten(1).std(1).topk(min(n, by.shape[1])).indices.sort().values.tolist()
        told = text.format(name=title, n=len(keep), all=maps.shape[1], h=maps.shape[2], w=maps.shape[3], what=told)
        sheets[kind].append((told, maps[0].detach().numpy(), keep))
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)
    paths = {kind: folder / f"explain-{stem}-{kind}.png" for kind, panels in sheets.items() if panels}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        do = _("choose another with --out")
        raise UserError(_("cannot make the folder {path}").format(path=folder), fault.strerror or "", do, name="read-only") from None
    for kind, path in paths.items():
        durable_write(path, sheet(sheets[kind], picture, name))
    return [str(path) for path in paths.values()]


@styled
def sheet(panels: list[tuple[str, np.ndarray, list[int]]], picture: np.ndarray, name: str) -> bytes:
    """The input at the left; at the right one panel a layer: its maps on one scale, each with its channel's number."""
    down = [-(-len(keep) // 8) for _title, _maps, keep in panels]
    figure, high = Figure((10.4, sum(1.06 * n + 0.3 for n in down)), layout="constrained"), [1.06 * n + 0.3 for n in down]
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(1.7, 8.3), height_ratios=high)
    figure.add_subplot(grid[0, 0], title=name, anchor="NW").imshow(picture, cmap="gray", vmin=0, vmax=1)
    for i, (title, maps, keep) in enumerate(panels):
        axes = figure.add_subplot(grid[i, 1], title=title, anchor="NW")
        h, w, gap = *maps.shape[1:], max(1, maps.shape[1] // 16)
        canvas = np.full((down[i] * (h + gap) - gap, 8 * (w + gap) - gap), np.nan)
        for j, c in enumerate(keep):
            top, left = (j // 8) * (h + gap), (j % 8) * (w + gap)
            canvas[top : top + h, left : left + w] = maps[c]
            axes.text(left + 0.04 * w, top + 0.04 * h, str(c), color="white", fontsize=7, va="top")
        axes.imshow(canvas, cmap="magma", vmin=maps.min(), vmax=maps.max())
    for axes in figure.axes:
        axes.set_axis_off()
    return png(figure)
