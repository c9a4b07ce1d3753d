"""`cloche explain RECIPE`: what each layer does, gives, holds, costs and sees, found by watching one forward pass of any nn.Module.

Operations are those that PyTorch's own counter sees: matrix products and convolutions, a multiply and an add being two.
"""

from collections.abc import Iterator
import copy
from dataclasses import dataclass, field
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cloche import rng
from cloche.build import facts_of, nets_of, open_data, task_of
from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.recipe import change, find, parse
from cloche.tasks import Task
from cloche.tasks.metrics import Nets
from cloche.training.speed import counter
from cloche.use.model import Model
from cloche.use.story import columns, sample
from cloche.words import _, _n, number, percent, size

SAID = {"stride": (1, _("stride {n}")), "padding": (0, _("pad {n}")), "dilation": (1, _("dilation {n}")), "groups": (1, _("groups {n}"))}
PASSED = (nn.Flatten, nn.Unflatten, nn.Identity)
Found = tuple[dict[str, Any], str]  # what --json prints, and the text


@dataclass
class Layer:
    """A call of a module; in a row of the ledger with what is folded into it: activation, normalisation, dropout."""

    module: nn.Module
    input: Tensor
    raw: Tensor  # (B, …) as the module gave it
    flops: int  # its own, not its children's
    name: str = ""
    kind: str = ""  # "conv" | "pool" | "dense" | the name of its class
    does: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    output: Tensor | None = None  # (B, …) after what is folded into it


def watch(net: nn.Module, counted: FlopCounterMode | None = None) -> list[Layer]:
    """The list that every later call of a module is added to, in the order in which they end. For a copy: its hooks stay."""
    calls: list[Layer] = []
    running: list[tuple[int, int]] = []  # of each module being called: the operations and the calls before it
    total = counted.get_total_flops if counted else int

    def after(module: nn.Module, given: Any, out: Any) -> None:
        count, n = running.pop()
        calls.append(Layer(module, tensor_of(given or out), tensor_of(out), total() - count - sum(c.flops for c in calls[n:])))

    for m in net.modules():
        m.register_forward_pre_hook(lambda _module, _given: running.append((total(), len(calls))))
        m.register_forward_hook(after)
    return calls


def tensor_of(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def layers_of(net: nn.Module, calls: list[Layer]) -> list[Layer]:
    """The calls as rows. A parameter counts once, where it is used first; those that no call of their own module uses come last."""
    rows, ahead, left = [], [], {id(p): p for p in net.parameters()}
    names = {m: type(m).__name__ if name in ("", "net") else name.removeprefix("net.") for name, m in net.named_modules()}
    for c in calls:
        kind, does = told(c.module, c.input, c.raw)
        own = [left.pop(id(p)) for p in c.module.parameters(recurse=False) if id(p) in left]
        if kind == "dropout":
            ahead += does
        elif kind == "fold" and rows:
            row = rows[-1]
            row.does, row.parameters, row.flops, row.output = row.does + does, row.parameters + own, row.flops + c.flops, c.raw
        elif kind or own or c.flops:
            c.kind = kind if kind in ("conv", "pool", "dense") else type(c.module).__name__
            c.name, c.does, c.parameters, c.output, ahead = names[c.module], ahead + does, own, c.raw, []
            rows.append(c)
    for row in rows[-1:]:  # a dropout with no layer behind it
        row.does = row.does + ahead
    if left and rows:
        nothing = rows[-1].raw[:, :0]
        rows.append(Layer(net, nothing, nothing, 0, _("other"), "other", [_("not called by itself")], list(left.values()), nothing))
    return rows


def told(m: Any, x: Tensor, y: Tensor) -> tuple[str, list[str]]:
    """("conv", ["3→32", "3×3", "pad 1"]): the kind of a module ("" where it is passed over) and what it does."""
    name, conv = type(m).__name__, isinstance(m, nn.modules.conv._ConvNd)
    if isinstance(m, nn.Linear):
        return "dense", [f"{number(m.in_features)}→{number(m.out_features)}"]
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return "dropout", [_("dropout {share}").format(share="½" if m.p == 0.5 else f"{m.p:g}")] if m.p else []
    if conv or ("Pool" in name and hasattr(m, "kernel_size")):
        kernel, found = times(each(m.kernel_size, y)), {k: each(getattr(m, k, plain), y) for k, (plain, _text) in SAID.items()}
        first = f"{number(m.in_channels)}→{number(m.out_channels)}, " if conv else (_("max") if "Max" in name else _("average")) + " "
        shown = [k for k, v in found.items() if set(v) != {SAID[k][0]} or (k == "stride" and not conv)]
        return "conv" if conv else "pool", [first + kernel, *(SAID[k][1].format(n=times(dict.fromkeys(found[k]))) for k in shown)]
    if isinstance(m, PASSED) or next(m.children(), None) is not None:
        return "", [name]
    plain = next(m.parameters(), None) is None and x.shape == y.shape
    return "fold" if plain or "Norm" in name or type(m).__module__ == nn.ReLU.__module__ else "other", [name]


def each(value: Any, maps: Tensor) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * (maps.ndim - 2)


def times(sides: Any) -> str:
    return "×".join(map(str, sides))


def sees(rows: list[Layer], x: Tensor) -> Iterator[str]:
    """How much of x a number of each row depends on, along the longest path: k − 1 more a kernel, times the strides before it."""
    fields = {x.shape[2:]: ((1,) * (x.ndim - 2), (1,) * (x.ndim - 2))}  # (h, w) of maps → what they see, the strides so far
    for row in rows:
        (seen, stride), out = fields.get(row.input.shape[2:], ((), ())), row.output.shape[2:]
        if seen and row.kind in ("conv", "pool") and not isinstance(row.module, nn.modules.conv._ConvTransposeNd):
            k, s, d = (each(getattr(row.module, name, 1), row.raw) for name in ("kernel_size", "stride", "dilation"))
            seen = tuple(a + (b - 1) * c * j for a, b, c, j in zip(seen, k, d, stride, strict=True))
            fields[out] = max(fields.get(out, ((), ())), (seen, tuple(j * b for j, b in zip(stride, s, strict=True))))
            yield times(seen)
        else:  # a dense layer or a pooling to one place sees all; of anything else it is not known, nor of what follows
            fields[out] = ((), ())
            yield _("all") if (row.kind == "dense" and row.input.ndim == 2) or ("Pool" in row.kind and set(out) == {1}) else "–"


def ledger(nets: Nets, task: Task, chunk: Chunk) -> list[dict[str, Any]]:
    """The rows of what is trained, from the first row of a chunk; "output" is without B, "bytes" are the output's in float32."""
    net, one = nn.ModuleDict(copy.deepcopy(nets)).eval(), chunk.head(1)
    with torch.no_grad(), rng.apart(chunk.weight.device), counter() as counted:
        calls = watch(net, counted)
        task.loss(dict(net.items()), one, None)
    rows = layers_of(net, calls)
    x = next((t for t in one.data.values() if t.ndim == 4), calls[0].input)
    return [
        {"name": row.name, "kind": row.kind, "does": ", ".join(row.does), "output": list(row.output.shape[1:])}
        | {"params": sum(p.numel() for p in row.parameters), "flops": row.flops, "bytes": 4 * row.output.numel(), "sees": seen}
        for row, seen in zip(rows, sees(rows, x), strict=True)
    ]


def explain_layers(what: str | Model, data: str | None = None, sets: dict[str, Any] | None = None) -> Found:
    """The layers of a recipe or a loaded run: what --json prints, and the table with what follows from it."""
    first = ""
    if isinstance(what, Model):
        rows, port, run, recipe = what.results["layers"], what.prepare.port, what.path, what.recipe
    else:
        name, raw = find(what, data)
        recipe = parse(change(raw, sets or {}), name)
        opened = open_data(recipe, torch.device("cpu"))
        recipe, task = task_of(recipe, opened.prepare, facts_of(recipe, opened))
        port, run = opened.prepare.port, Path("runs") / name
        rows = ledger(nets_of(recipe, task), task, opened.part("train").take(np.array([0])))
        if not (run / "manifest.json").exists():
            first = f"cloche train {what}\n       "
    total = {k: sum(r[k] for r in rows) for k in ("params", "flops", "bytes")}
    held = _("a picture; weights {size}") if port.kind == "image" else _("a row; weights {size}")
    whole = {"name": _("total"), "does": held.format(size=size(4 * total["params"])), "output": [], "sees": "", **total}
    lines = columns(layer_table([*rows, whole]), 3) + sentences(rows, total, port)
    after = _("Next:  {command}     what happens inside on an input of your own")
    given = sample(recipe.data.kind, port, recipe.data.source)
    lines.append(after.format(command=f"{first}cloche explain {run} {given}"))
    found = [{("output_shape" if k == "output" else k): v for k, v in row.items()} for row in rows]
    return {"layers": found, "params": total["params"], "flops": total["flops"]}, "\n".join(lines)


def layer_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The head, then a row for each layer, in units that suit the largest."""
    work, per = ("MFLOP", 1e6) if max(r["flops"] for r in rows) >= 1e6 else ("kFLOP", 1e3)
    unit, byte = ("kB", 1e3) if max(r["bytes"] for r in rows) >= 10_000 else ("B", 1)
    cells = [[r["name"], r["does"], ", ".join(map(str, r["output"])), number(r["params"])] for r in rows]
    costs = [[number(r["flops"] / per, 1) if r["flops"] else "–", number(r["bytes"] / byte), r["sees"]] for r in rows]
    head = [_("layer"), _("does"), _("output (B, …)"), _("parameters"), work, unit, _("sees")]
    return [head, *(a + b for a, b in zip(cells, costs, strict=True))]


def sentences(rows: list[dict[str, Any]], total: dict[str, int], port: Port) -> list[str]:
    """Where the parameters are, where the work is, and what a convolution saves by using one kernel at every place."""
    share = lambda part, k: percent(part / max(total[k], 1), 1 if part > 0.995 * total[k] else 0)  # noqa: E731
    most, text = max(rows, key=lambda r: r["params"]), _("{name} holds {held} of the parameters and does {work} of the work")
    text = text.format(name=most["name"], held=share(most["params"], "params"), work=share(most["flops"], "flops"))
    some, work = [], 0  # the layers that do four fifths of the other work
    for row in sorted((r for r in rows if r is not most), key=lambda r: -r["flops"]):
        if work < 0.8 * (total["flops"] - most["flops"]):
            some, work = [*some, row], work + row["flops"]
    if work > most["flops"]:
        names = _(" and ").join(", ".join(r["name"] for r in rows if r in some).rsplit(", ", 1))
        text += _n(": {names} does {share}", ": {names} do {share}", len(some)).format(names=names, share=share(work, "flops"))
    if rows[0]["kind"] != "conv":
        return [text + "."]
    more = _("{name} uses its {weights} weights at {places} places; fully connected, the same map would need {dense}.")
    places, dense = math.prod(rows[0]["output"][1:]), math.prod(port.shape) * math.prod(rows[0]["output"])
    weights = rows[0]["flops"] // (2 * places)
    return [text + ".", more.format(name=rows[0]["name"], weights=number(weights), places=number(places), dense=number(dense))]
