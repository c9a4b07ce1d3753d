"""What recurrent cells do on one input: their gates over time, and how far back a gradient reaches through each kind of cell.

The gradient: |∂h(T)/∂x(t)| against T − t, relative to 0, of the run's own cells on the input, of fresh ones of all three kinds on noise.
"""

from typing import Any

from matplotlib.figure import Figure
import numpy as np
import torch
from torch import Tensor

from cloche.data.chunk import Chunk
from cloche.nets.rnn import CORES, Cells
from cloche.use.draw import curves, styled
from cloche.use.explain.step import example
from cloche.use.model import Model
from cloche.words import _, number

STEPS, MOST = 40, 48  # steps of noise; units of a state that are drawn, and whose gradients are taken
NAMES = {"input": _("input gate"), "forget": _("forget gate"), "output": _("output gate"), "reset": _("reset gate")}
NAMES |= {"update": _("update gate"), "candidate": _("candidate"), "cell": _("cell state"), "state": _("state h")}


@torch.inference_mode(False)
def figures(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    """The cells of the top layer, and how much of its last state still hangs on each step."""
    x, cells = frames(model.net, example(model, given)[1]), model.net.cells
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        gates = {k: v[0] for k, v in cells.gates(x)[-1].items()}  # (T, C) each, of the top layer
        torch.manual_seed(0)
        noise, fresh = torch.randn(1, STEPS, x.shape[2]), {k: Cells(k, x.shape[2], cells.width) for k in CORES}
    reach = {_("{kind}, fresh").format(kind=k): gradient(c, noise) for k, c in fresh.items()}
    reach[_("{kind}, trained").format(kind=cells.kind)] = gradient(cells, x)
    left = {k: next((d for d in range(len(norms)) if max(norms[d:]) < 0.01), None) for k, norms in reach.items()}
    told = [f"{k} {f'> {len(reach[k]) - 1}' if d is None else d}" for k, d in left.items()]
    lines = [_("step by step, the mean over the units of the top layer")]
    lines += [f"  {NAMES[k]:<15}" + " ".join(number(m, 2) for m in v.mean(1)[:20]) for k, v in gates.items()]
    lines += [_("steps back after which less than a hundredth of the gradient is left: {told}").format(told=" · ".join(told))]
    drawn = {k: (range(len(norms)), np.where(np.array(norms) > 1e-12, norms, np.nan)) for k, norms in reach.items()}
    titles = _("gates over time: dark 0, light 1; states red below zero, blue above"), _("how much of the gradient reaches so far back")
    looks = dict(zip(titles, (maps(gates), curves(drawn, _("steps back"), "")), strict=True))
    return {"gates": {k: v.mean(1).tolist() for k, v in gates.items()}, "gradient": reach, "reach": left}, lines, looks


def frames(net: Any, chunk: Chunk) -> Tensor:
    """(1, T, F) what the first layer reads at each step; clones, for a tensor of inference mode has no gradient."""
    name = next(k for k in ("past", "image", "columns", "audio", "tokens") if k in chunk.data)
    lengths = [chunk.data[k].clone() for k in (f"{name}_len",) if k in chunk.data]
    with torch.no_grad():
        return net.frames(chunk.data[name].clone()[:, : int(lengths[0]) if lengths else None], *(lengths if name == "audio" else ()))


def gradient(cells: Cells, x: Tensor) -> list[float]:
    """|∂h(T)/∂x(T − d)| for d = 0, 1, …, relative to d = 0; at most MOST entries of h(T)."""
    x, total = x.clone().requires_grad_(), 0.0
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN has no backward pass in evaluation mode
        last = cells(x)[0][0, -1, : min(MOST, cells.width)]
        for h in last:
            total = total + torch.autograd.grad(h, x, retain_graph=True)[0][0].square().sum(1)  # (T,)
    norms = total.sqrt().flip(0)
    return (norms / norms[0].clamp(min=1e-30)).tolist()


@styled
def maps(gates: dict[str, Tensor]) -> Figure:
    """A panel a gate, time to the right, downward the units whose state moves most."""
    keep = gates["state"].std(0).topk(min(MOST, gates["state"].shape[1])).indices
    figure = Figure((4.0 + 0.9 * len(gates), 2.6), layout="constrained")
    for i, (name, v) in enumerate(gates.items()):
        axes, signed = (
            figure.add_subplot(1, len(gates), i + 1, title=NAMES[name], xlabel=_("step"), yticks=[], ylabel="" if i else _("units")),
            bool(v.min() < 0),
        )
        most = v.abs().quantile(0.98).item() if signed else 1  # one unit that counts far must not pale the others
        axes.imshow(v[:, keep].T.cpu().numpy(), aspect="auto", cmap="RdBu" if signed else "magma", vmin=-most * signed, vmax=most)
        axes.set_xticks(range(0, len(v), -(-len(v) // 8)))
    return figure
