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
from cloche.training.optim import inner_of
from cloche.use.draw import png, styled
from cloche.use.layers import Found, Layer, layers_of, watch
from cloche.use.model import Model, load
from cloche.use.story import columns
from cloche.words import _, _n, listed, number, percent


def explain_step(run: str | Model, given: Any = None, label: Any = None, at: str | None = None, out: str | None = None) -> Found:
    """One training step of a finished run on one input: what --json prints, and the text.

    given: as `predict` takes it. label: the true class. at: "conv1:0,5,7", one number of a map as its products. out: where pictures go.
    """
    model = run if isinstance(run, Model) else load(run)
    name, chunk = example(model, given)
    net, task, optim = copy.deepcopy(model.net).requires_grad_(True), model.task, model.recipe.optim
    was = dict(zip(net.parameters(), model.net.parameters(), strict=True))
    with torch.no_grad():
        answer = task.answer({"net": net}, chunk)[0]
    true, why = truth(model, chunk, label, answer)
    optimizer, calls = optim.build(list(was), inner_of([net])), watch(net)
    loss = task.loss({"net": net}, chunk, None)[0]  # forward pass and loss
    rows, logits = [row for row in layers_of(net, calls) if row.output.numel()], calls[-1].raw[0].tolist()
    loss.backward()
    layers = [{"name": row.name, "activation": activation(row), "gradient_norm": norm(p.grad for p in row.parameters)} for row in rows]
    one, acts = products(rows, at) if at is not None else ({}, [])
    gradient_norm(list(was), optim.clip)  # which clips them
    optimizer.step()
    for row, told in zip(rows, layers, strict=True):
        size = norm(was[p] for p in row.parameters)
        told["update_ratio"] = norm(p - was[p] for p in row.parameters) / size if size else None
    with torch.no_grad():
        after = task.loss({"net": net}, chunk, None)[0]
    found = {"input": name, "label": true, "predicted": next(iter(answer.values())), "probabilities": answer.get("probabilities")}
    found |= {"loss": loss.item(), "loss_after": after.item(), "layers": layers, "pictures": []} | ({"at": one} if one else {})
    text = story(model, found, rows, logits, why) + acts
    if "image" in chunk.data and any(row.kind == "conv" for row in rows):
        sheets = pictures(rows, model.prepare.pixels_of(chunk.data["image"][0]), name)
        found["pictures"] = write_all(sheets, model, out)
        text += [_("picture    {path}").format(path=path) for path in found["pictures"]]
    return found, "\n".join([*text, _("Nothing in {run} was changed: the step was made on a copy of its weights.").format(run=model.path)])


def activation(row: Layer) -> dict[str, float]:
    y = row.output.detach()
    return {"min": y.min().item(), "mean": y.mean().item(), "max": y.max().item(), "zeros": (y == 0).float().mean().item()}


def norm(tensors: Any) -> float | None:
    """The norm of all numbers of some tensors together; None where there are none."""
    found = [float(t.detach().norm()) for t in tensors if t is not None]
    return math.hypot(*found) if found else None


def example(model: Model, given: Any) -> tuple[str, Chunk]:
    """The name of the input, and the input as a chunk of one row; with its label where it comes from the run's own data."""
    if given is not None:
        return str(given)[: None if isinstance(given, str | Path) else 40], model.chunk(model.prepare.gather([model.prepare.encode(given)]))
    data = model.data()
    part = data.part("validation" if len(data.rows["validation"]) else data.judged)
    return part.store.name(int(part.ids[0])), part.take(np.array([0]))


def truth(model: Model, chunk: Chunk, label: Any, answer: dict[str, Any]) -> tuple[Any, str]:
    """The true label in words and whose it is: --label, else the data's own, else the answer; the chunk holds it from now on."""
    labels, k, why = list(model.prepare.labels), model.facts["outputs"], _("given")
    if label is None and "label" in chunk.data:
        label, why = chunk.data["label"][0].tolist(), _("from the data")
        label = labels[label] if labels else label
    elif label is None:
        label, why = next(iter(answer.values())), _("the predicted one: give another with --label")
    if labels:
        if str(label) not in labels:
            do = _("its classes: {names}").format(names=listed(labels, 50))
            raise UserError(_('this run knows no class "{name}"').format(name=label), "", do)
        chunk.data["label"] = torch.tensor([labels.index(str(label))], device=model.device)
        return str(label), why
    try:
        numbers = [float(v) for v in (label if isinstance(label, list) else str(label).split(","))]
    except ValueError:
        numbers = []
    if len(numbers) != k or not all(map(math.isfinite, numbers)):
        what = _n("the true value of this run is a number", "the true value of this run is {n} numbers", k).format(n=k)
        raise UserError(what, str(label), _("for example --label {example}").format(example=",".join(["0.5"] * k)))
    chunk.data["label"] = torch.tensor([numbers], device=model.device)
    return numbers if k > 1 else numbers[0], why


def brief(v: Any) -> str:
    if not isinstance(v, float):
        return ", ".join(map(brief, v)) if isinstance(v, list) else "–" if v is None else str(v)
    return number(v, 4) if v == 0 or 1e-3 <= abs(v) < 1e5 else f"{v:.1e}".replace(".", _("."))


def story(model: Model, found: dict[str, Any], rows: list[Layer], logits: list[float], why: str) -> list[str]:
    """The step as lines of text."""
    optim, chances, loss, after = model.recipe.optim, found["probabilities"], found["loss"], found["loss_after"]
    answer, label, classes = brief(found["predicted"]), brief(found["label"]), []
    said = _("the mean squared distance of {answer} from {label}").format(answer=answer, label=label)
    if chances:
        z = dict(zip(model.prepare.labels, [0.0] * (len(chances) - len(logits)) + logits, strict=True))  # one logit for two: the first is 0
        head = [_("class"), _("logit"), _("probability")]
        classes = columns([head, *([k, brief(z[k]), percent(p)] for k, p in list(chances.items())[:8])], 1)
        said = _("−log {p}, the surprise at the true class").format(p=brief(chances[label]))
        if s := getattr(model.task, "smoothing", 0):
            said = _("{most} × {said}, and {s} × the mean surprise at all classes").format(most=f"{1 - s:g}", said=said, s=f"{s:g}")
    table = [[_("layer"), _("output (B, …)"), _("min"), _("mean"), _("max"), _("zeros"), _("|gradient|"), "|Δw| / |w|"]]
    for row, f in zip(rows, found["layers"], strict=True):
        *sizes, zeros = f["activation"].values()
        sizes = [", ".join(map(str, row.output.shape[1:])), *map(brief, sizes), percent(zeros, 0)]
        table.append([row.name, *sizes, brief(f["gradient_norm"]), brief(f["update_ratio"])])
    fell = _("it fell") if after < loss else _("it did not fall") if loss else _("nothing to learn: give the true answer with --label")
    return [
        _("{input}   answer: {answer}   true: {label} ({why})").format(input=found["input"], answer=answer, label=label, why=why),
        *("  " + line for line in classes),
        _("0 clear    every gradient is None: backward adds to what is there, so a step clears it first"),
        _("1 forward  through the layers, in float32, dropout off"),
        _("2 loss     {loss} = {said}").format(loss=brief(loss), said=said),
        _("3 backward from the loss to the first layer: how the loss changes with each weight"),
        _("4 update   {kind}, learning rate {lr}, without memory of earlier steps").format(kind=optim.kind, lr=show(optim.lr)),
        *("  " + line for line in columns(table, 2)),
        _("  loss {before} → {after} on the same input: {fell}").format(before=brief(loss), after=brief(after), fell=fell),
    ]


def products(rows: list[Layer], at: str) -> tuple[dict[str, Any], list[str]]:
    """One number of a map as its products: the numbers for --json, and the stamp in four acts as text."""
    convs = {row.name: row for row in rows if isinstance(row.module, nn.Conv2d) and row.module.groups == 1}
    match = re.fullmatch(r"([\w.]+):(\d+),(\d+),(\d+)", at.replace(" ", ""))
    if not match:
        do = _("for example --at {layer}:0,5,7").format(layer=next(iter(convs), "conv1"))
        raise UserError(_("--at needs LAYER:CHANNEL,ROW,COLUMN"), at, do)
    name, (c, y, x) = match[1], map(int, match.groups()[1:])
    if name not in convs:
        do = _("its convolutions: {names}").format(names=listed(convs, 50) or _("none"))
        raise UserError(_('this net has no convolution "{name}"').format(name=name), "", do)
    row, m, (channels, h, w) = convs[name], convs[name].module, convs[name].raw.shape[1:]
    if c >= channels or y >= h or x >= w:
        do = _("channel 0…{c}, row 0…{y}, column 0…{x}").format(c=channels - 1, y=h - 1, x=w - 1)
        raise UserError(_("there is no such place in the maps of {name}").format(name=name), at, do)
    kernel, bias = m.weight[c].detach(), m.bias[c].item() if m.bias is not None else 0.0  # (C, k, k)
    patch = F.unfold(row.input.detach(), m.kernel_size, m.dilation, m.padding, m.stride)[0, :, y * w + x].view_as(kernel)
    each, s = patch * kernel, m.stride[0]
    sums = each.double().sum((1, 2))  # (C,)
    total, strongest = sums.sum().item(), sums.abs().topk(min(3, len(sums))).indices.sort().values
    place = _("  place             kernel {c} from row {y}, column {x} of its input on (zeros outside)")
    lines = [
        _("{at}   one number of a map: a stamp in four acts").format(at=at),
        place.format(c=c, y=y * s - m.padding[0], x=x * s - m.padding[1]),
        _("  multiply and add  channel by channel: patch × kernel = products"),
    ]
    channel = _("channel {n}")
    for i in strongest.tolist():
        for three in zip(patch[i].tolist(), kernel[i].tolist(), each[i].tolist(), strict=True):  # a row of each
            cells = ["".join(f"{number(v, 3):>8}" for v in values) for values in three]
            lines.append(f"  {channel.format(n=i):<12}{cells[0]}   ×{cells[1]}   ={cells[2]}")
    if len(sums) > 3:
        rest = number(total - sums[strongest].sum().item(), 4)
        lines.append(_("  {n} more channels add {sum}").format(n=len(sums) - 3, sum=rest))
    write = _("  write one number  {n} products add up to {sum}, plus the bias {bias} = {total}; after the activation {final}")
    numbers = {"sum": total, "bias": bias, "total": total + bias, "final": row.output[0, c, y, x].item()}
    lines.append(write.format(n=number(each.numel()), **{key: number(v, 5) for key, v in numbers.items()}))
    lines.append(_("  slide             by {s} to the next place: the same kernel at {n} places").format(s=s, n=number(h * w)))
    found = {"layer": name, "channel": c, "row": y, "column": x, "bias": bias, "sum": total + bias, "value": row.raw[0, c, y, x].item()}
    return found | {"patch": patch.tolist(), "kernel": kernel.tolist(), "products": each.tolist()}, lines


def pictures(rows: list[Layer], picture: np.ndarray, name: str) -> dict[str, Figure]:
    """explain-NAME-maps: the first, middle and last convolution; explain-NAME-pool: before and after the first pooling."""
    convs, stem = [row for row in rows if row.kind == "conv"], "explain-" + re.sub(r"[^\w.-]+", "-", Path(name).stem)
    some = [convs[i] for i in sorted({0, (len(convs) - 1) // 2, len(convs) - 1})]
    sheets = {f"{stem}-maps": sheet({row.name: (row.output, row.output) for row in some}, picture)}
    if pool := next((row for row in rows if row.kind == "pool"), None):
        sides = {_("before {pool}"): pool.input, _("after {pool}"): pool.output}
        sheets[f"{stem}-pool"] = sheet({k.format(pool=pool.name): (maps, pool.input) for k, maps in sides.items()}, picture)
    return sheets


def write_all(figures: dict[str, Figure], model: Model, out: str | None) -> list[str]:
    """PNG files by their stem in a folder that is made where it lacks: their paths. Raises: UserError "read-only"."""
    folder = Path(out) if out else model.path / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        what, do = _("cannot make the folder {path}").format(path=folder), _("choose another with --out")
        raise UserError(what, fault.strerror or "", do, name="read-only") from None
    paths = [folder / f"{stem}.png" for stem in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        durable_write(path, png(figure))
    return list(map(str, paths))


@styled
def sheet(panels: dict[str, tuple[Tensor, Tensor]], picture: np.ndarray) -> Figure:
    """The input; a panel a row: up to 8 maps (1, C, h, w) on one scale, those of the second tensor that differ most from place to place."""
    across = 1 + min(8, max(maps.shape[1] for maps, _by in panels.values()))
    figure = Figure((10.4, 10.4 / across * len(panels) + 0.3), layout="constrained")
    grid = figure.subplots(len(panels), across, squeeze=False)
    grid[0, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
    text = _("{name} · {n} of {all} maps of {h}×{w}")
    for line, (title, (maps, by)) in zip(grid, panels.items(), strict=True):
        keep = by[0].flatten(1).std(1).topk(min(8, by.shape[1])).indices.sort().values.tolist()
        channels, h, w = maps.shape[1:]
        line[1].set_title(text.format(name=title, n=len(keep), all=channels, h=h, w=w))
        for axes, c in zip(line[1:], keep, strict=False):
            axes.imshow(maps[0, c].detach().cpu().numpy(), cmap="magma", vmin=maps.min().item(), vmax=maps.max().item())
            axes.text(0, 0, str(c), color="white", fontsize=7, va="top")
    for axes in figure.axes:
        axes.set_axis_off()
    return figure
