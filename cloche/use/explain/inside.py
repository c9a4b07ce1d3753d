"""What can be seen inside a trained net on one input: each family has its own pictures.

Each function takes a model and an input, or None for a first example of the run's own data.
"""

from dataclasses import replace
from itertools import groupby
import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import numpy as np
import torch
from torch import Tensor

from cloche.data.audio import HOP_S
from cloche.data.chunk import Chunk
from cloche.data.pairs import BOS, EOS
from cloche.nets.gpt import Gpt
from cloche.nets.rnn import CORES, Cells
from cloche.use.draw import DIM, HUES, INK, curves, new, styled
from cloche.use.explain.step import example
from cloche.use.model import Model
from cloche.words import _, number, percent

Seen = tuple[dict[str, Any], list[str], dict[str, Figure]]  # what --json prints, the lines of text, the figures by title

STEPS, MOST = 40, 48  # steps of noise; units of a state that are drawn, and whose gradients are taken
GATES = {"input": _("input gate"), "forget": _("forget gate"), "output": _("output gate"), "reset": _("reset gate")}
GATES |= {"update": _("update gate"), "candidate": _("candidate"), "cell": _("cell state"), "state": _("state h")}


@torch.inference_mode(False)
def gates(model: Model, given: Any) -> Seen:
    """The top layer's gates; |∂h(T)/∂x(t)| against T − t, of the run's own cells on the input and of fresh ones on noise."""
    x, cells = frames(model.net, example(model, given)[1]), model.net.cells
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = {k: v[0] for k, v in cells.gates(x)[-1].items()}  # (T, C) each, of the top layer
        torch.manual_seed(0)
        noise, fresh = torch.randn(1, STEPS, x.shape[2]), {k: Cells(k, x.shape[2], cells.width) for k in CORES}
    reach = {_("{kind}, fresh").format(kind=k): gradient(c, noise) for k, c in fresh.items()}
    reach[_("{kind}, trained").format(kind=cells.kind)] = gradient(cells, x)
    left = {k: next((d for d in range(len(norms)) if max(norms[d:]) < 0.01), None) for k, norms in reach.items()}
    told = " · ".join(f"{k} {f'> {len(reach[k]) - 1}' if d is None else d}" for k, d in left.items())
    lines = [_("step by step, the mean over the units of the top layer")]
    lines += [f"  {GATES[k]:<15}" + " ".join(number(m, 2) for m in v.mean(1)[:20]) for k, v in found.items()]
    lines += [_("steps back after which less than a hundredth of the gradient is left: {told}").format(told=told)]
    far = {k: (range(len(norms)), np.where(np.array(norms) > 1e-12, norms, np.nan)) for k, norms in reach.items()}
    drawn = {
        _("gates over time: dark 0, light 1; states red below zero, blue above"): gate_maps(found),
        _("how much of the gradient reaches so far back"): curves(far, _("steps back"), ""),
    }
    return {"gates": {k: v.mean(1).tolist() for k, v in found.items()}, "gradient": reach, "reach": left}, lines, drawn


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
        for h in cells(x)[0][0, -1, :MOST]:
            total = total + torch.autograd.grad(h, x, retain_graph=True)[0][0].square().sum(1)  # (T,)
    norms = total.sqrt().flip(0)
    return (norms / norms[0].clamp(min=1e-30)).tolist()


@styled
def gate_maps(found: dict[str, Tensor]) -> Figure:
    """A panel a gate, time to the right, downward the units whose state moves most."""
    keep = found["state"].std(0).topk(min(MOST, found["state"].shape[1])).indices
    figure = Figure((4.0 + 0.9 * len(found), 2.6), layout="constrained")
    for axes, (name, v) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        signed = bool(v.min() < 0)
        most = v.abs().quantile(0.98).item() if signed else 1  # one unit that counts far must not pale the others
        axes.imshow(v[:, keep].T.cpu().numpy(), aspect="auto", cmap="RdBu" if signed else "magma", vmin=-most * signed, vmax=most)
        axes.set(title=GATES[name], xlabel=_("step"), yticks=[], xticks=range(0, len(v), -(-len(v) // 8)))
    figure.axes[0].set_ylabel(_("units"))
    return figure


@styled
@torch.inference_mode()
def outlook(model: Model, given: Any) -> Seen:
    """Of `given`, what follows it; else of the judged part. The first column only."""
    if given is None:
        data = model.data()
        part, names = data.part(data.judged), data.store.names
        some = np.unique([0, len(part) // 2, len(part) - 1])
        chunk, starts, title = part.take(some), part.ids[some], _("what it foretells from three points in time, beside what came")
    else:
        chunk, names, title = example(model, given)[1], [], _("what it foretells")
        starts = [chunk.data["history"].shape[1]]
    found = model.prepare.undo(model.net(chunk.data["past"]).float(), chunk)[..., 0].cpu().numpy()  # (B, horizon)
    past, came = (chunk.data[k][..., 0].cpu().numpy() if k in chunk.data else [] for k in ("history", "truth"))
    figure, axes = new(2.4)
    for i, start in enumerate(starts):
        at = np.arange(start, start + found.shape[1])
        axes.plot(np.arange(start - len(past[i]), start), past[i], color=DIM, lw=1)
        if len(came):
            axes.plot(at, came[i], color=INK, lw=1.2, label=None if i else _("what came"))
        axes.plot(at, found[i], color=HUES[1], lw=1.6, zorder=3, label=None if i else _("forecast"))
        axes.axvline(start - 0.5, color=DIM, lw=0.7, ls=(0, (1, 2)))
    axes.legend(loc="upper left")
    if names:
        axes.xaxis.set_major_formatter(lambda v, _at: names[int(v)] if 0 <= v < len(names) else "")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    lines = [_("forecast   {values}").format(values=" ".join(number(v, 1) for v in found[-1]))]
    return {"forecast": found[-1].tolist()}, lines, {title: figure}


@styled
@torch.no_grad()
def spectrogram(model: Model, given: Any) -> Seen:
    """The letters of the best path, each where it is likeliest in its run of steps; between them the blank, dotted."""
    name, chunk = example(model, given)
    audio, n = chunk.data["audio"], chunk.data["audio_len"]
    logits, length = model.net(audio, n)
    p, step_s = logits[0, : length[0]].float().softmax(-1).cpu().numpy(), HOP_S * audio.shape[1] / logits.shape[1]  # (T', K)
    runs = [(k, list(run)) for k, run in groupby(range(len(p)), lambda t: int(p[t].argmax())) if k]
    peaks = [(max(run, key=p[:, k].__getitem__), k) for k, run in runs]
    said = [{"letter": model.task.text([k]), "seconds": round((t + 0.5) * step_s, 3), "probability": float(p[t, k])} for t, k in peaks]
    text = "".join(letter["letter"] for letter in said)
    lines = [_('{input}: "{text}"').format(input=name, text=text)]
    lines += [f"  {number(s['seconds'], 2):>6} s  {s['letter']}  {percent(s['probability']):>7}" for s in said]
    heard = audio[0, : n[0]].cpu().numpy() * model.prepare.std + model.prepare.mean  # (T, M)
    figure, axes = new(3.2, _("seconds"))
    axes.imshow(heard.T, extent=(0, len(heard) * HOP_S, 1.2, 2.6), origin="lower", aspect="auto", cmap="Greys")
    x = (np.arange(len(p)) + 0.5) * step_s
    axes.plot(x, p[:, 0], color=DIM, lw=0.8, ls=(0, (1, 2)))
    for t, k in peaks:
        axes.plot(x, p[:, k], color=HUES[k % len(HUES)], lw=1.3)
        axes.text(x[t], 1.04, model.task.text([k]), color=INK, ha="center")
    axes.set_yticks([0, 1, 1.2, 2.6], ["0 %", "100 %", "0 Hz", f"{number(model.prepare.rate / 2)} Hz"])
    axes.set(xlim=(0, len(p) * step_s), ylim=(-0.03, 2.6))
    return {"input": name, "text": text, "letters": said}, lines, {_("what the net hears"): figure}


TOLD, LOOKED, ACROSS = 400, 24, 64  # tokens whose cost is told, and whose attention is drawn; letters of a line


@torch.no_grad()
def tokens(model: Model, given: Any) -> Seen:
    """Of `given`, as the beginning of a paragraph, else of the first window of the judged part."""
    name, chunk = example(model, given)
    chunk = replace(chunk, data={k: chunk.data[k][:, : TOLD + 1] for k in ("tokens", "bytes")})
    ids, size, n = chunk.data["tokens"], int(chunk.data["bytes"].sum()), int((chunk.data["bytes"] > 0).sum())
    costs = model.task.bits(model.task.losses(model.nets, chunk)[0], chunk)[0, :n].tolist()
    read = ids[0, : n + 1].tolist()
    texts = ["<unk>" if t == model.task.unknown else model.prepare.decode([t]).decode(errors="replace") for t in read]
    rate, each = sum(costs) / max(size, 1), list(map(list, zip(texts[1:], costs, strict=True)))
    lines = [_("{rate} bits a byte over {n} tokens; the dearest:").format(rate=number(rate, 3), n=number(n))]
    lines += [f"  {number(cost, 1):>6}  {text!r}" for text, cost in sorted(each, key=lambda pair: -pair[1])[:8]]
    found: dict[str, Any] = {"input": name, "bits_per_byte": rate, "tokens": each}
    drawn = {_("what each token cost: the darker, the less expected"): paper(texts[1:], costs)}
    if isinstance(model.net, Gpt):
        looks = model.net.attention(ids[:, : min(n, LOOKED) + 1]).float()[0]  # (layers, H, T, T)
        place = torch.arange(looks.shape[-1], device=looks.device)
        found["looks_back"] = ((place[:, None] - place) * looks).sum(-1).mean(-1).tolist()  # (layers, H) tokens
        back = "; ".join(" ".join(number(v, 1) for v in row) for row in found["looks_back"])
        lines.append(_("how many tokens back each head looks, layer by layer: {back}").format(back=back))
        title = _("where each head looks, from the token on the left to earlier ones")
        drawn[title] = heads(looks.cpu().numpy(), [text.strip() for text in texts[: len(place)]])
    return found, lines, drawn


@styled
def paper(texts: list[str], costs: list[float]) -> Figure:
    """The text with each token on a ground that is the darker the more it cost: full at 12 bits and more."""
    places, row, column = [], 0, 0
    for text in texts:
        row, column = (row + 1, 0) if column and column + len(text) > ACROSS else (row, column)
        places.append((row, column))
        row, column = (row + text.count("\n"), 0) if "\n" in text else (row, column + len(text))
    figure, axes = new(0.44 + 0.14 * row)
    for (y, x), text, cost in zip(places, texts, costs, strict=True):
        said = text.rstrip("\n") or "¶"
        axes.add_patch(Rectangle((x, y), len(said), 0.92, color=HUES[1], alpha=min(cost / 12, 1) * 0.8, lw=0))
        axes.text(x, y + 0.7, said, family="monospace", fontsize=6, color=DIM if "\n" in text else INK)
    axes.set(xlim=(0, ACROSS), ylim=(row + 1, 0))
    axes.axis("off")
    return figure


@styled
def heads(looks: np.ndarray, texts: list[str]) -> Figure:
    """(layers, H, T, T) as small maps, from the token on the left to the one below; the darker the more."""
    figure = Figure((4.0, 0.2 + 4.0 * looks.shape[0] / looks.shape[1]), layout="constrained")
    for (layer, head), axes in np.ndenumerate(figure.subplots(*looks.shape[:2], squeeze=False)):
        axes.imshow(np.sqrt(looks[layer, head]), cmap="Greys", vmin=0, vmax=1)  # the root: small shares are seen too
        axes.set_title(_("layer {layer} · head {head}").format(layer=layer + 1, head=head + 1), fontsize=5, color=DIM, pad=2)
        axes.tick_params(length=0, labelsize=min(5, 60 / len(texts)))
        axes.set(xticks=[], yticks=range(len(texts) * (head == 0)), yticklabels=texts * (head == 0))
    return figure


@styled
@torch.no_grad()
def alignment(model: Model, given: Any) -> Seen:
    """The map of the model's own answer: place by place the mean over blocks and heads, so that each row sums to 1."""
    name, chunk = example(model, given)
    source, length = chunk.data["source"], chunk.data["source_len"]
    said = model.task.written(model.net, chunk)[0]
    target = torch.tensor([[BOS, *said]], device=model.device)  # place u foretells token u + 1
    weights = model.net.attention(source, length, target).float().mean((1, 2))[0, :, : length[0]].cpu().numpy()  # (U, S)
    sides = source[0, : length[0]].tolist(), [*said, EOS]
    read, wrote = ([model.prepare.opened.decode([token], skip_special_tokens=False) for token in side] for side in sides)
    text = model.prepare.text(said)
    lines = [_("{input} → {text}").format(input=name, text=text)]
    for word, row in zip(wrote, weights, strict=True):
        best = ", ".join(f"{read[s]} {percent(float(row[s]), 0)}" for s in np.argsort(-row, kind="stable")[:3])
        lines.append(f"  {word:<12} ← {best}")
    figure, axes = new(0.8 + 0.12 * len(wrote), _("source"), _("answer"))
    axes.imshow(weights, cmap="Greys", vmin=0, aspect="auto")
    across, down = ([token.replace(" ", "␣") for token in side] for side in (read, wrote))
    axes.set_xticks(range(len(read)), across, fontsize=6, rotation=90 if max(map(len, across)) > 2 else 0)
    axes.set_yticks(range(len(wrote)), down, fontsize=6)
    found = {"input": name, "text": text, "source": read, "target": wrote, "attention": weights.tolist()}
    return found, lines, {_("where it looked for each token that it wrote"): figure}


SAMPLES, COLUMNS = 3, 8


@styled
@torch.no_grad()
def timeline(model: Model, given: Any) -> Seen:
    """For a prompt, SAMPLES pictures from noise to the end."""
    prompt, held = str(given) if given is not None else model.prepare.text(example(model, None)[1])[0], []
    chunk = model.chunk(model.prepare.gather([model.prepare.encode(prompt)] * SAMPLES))
    denoise = model.task.denoiser(model.nets, chunk)

    def watched(x: Tensor, level: Tensor) -> Tensor:
        held.append((float(level[0]), x, denoise(x, level)))
        return held[-1][2]

    end = model.task.sample(watched, chunk.ids)
    levels, some = [level for level, _x, _x0 in held], np.unique(np.linspace(0, len(held) - 1, COLUMNS - 1).astype(int))
    figure = Figure((7.2, 1.8 * SAMPLES + 0.3), layout="constrained")
    grid = figure.subplots(2 * SAMPLES, len(some) + 1, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for column, (level, *pair) in zip(grid.T, [*(held[i] for i in some), (None, end, end)], strict=True):
        column[0].set_title(_("picture") if level is None else percent(1 / (1 + math.exp(level)), 0))
        for axes, picture in zip(column, torch.stack(pair, 1).flatten(0, 1), strict=True):  # of each sample what is held, what is believed
            axes.imshow(model.prepare.pictures.pixels_of(picture), cmap="gray", vmin=0, vmax=1)
    for row, axes in enumerate(grid[:, 0]):
        axes.set_ylabel(_("guess") if row % 2 else _("so far"))
    told = _('"{prompt}": {n} steps, log of signal to noise from {a} to {b}')
    line = told.format(prompt=prompt, n=len(held), a=number(levels[0], 1), b=number(levels[-1], 1))
    title = _("from noise to {prompt}: share of noise, picture so far, what the net takes it for").format(prompt=prompt)
    return {"prompt": prompt, "levels": levels}, [line], {title: figure}


OF_NET = dict.fromkeys(CORES, gates)
OF_TASK = {"forecast": outlook, "transcribe": spectrogram, "language": tokens, "translate": alignment, "diffusion": timeline}


def inside(model: Model, given: Any) -> Seen:
    """All that there is to see of this net and this task."""
    found, lines, drawn = {}, [], {}
    for look in filter(None, (OF_TASK.get(model.recipe.task.kind), OF_NET.get(model.recipe.net.kind))):
        more, text, figures = look(model, given)
        found, lines, drawn = found | more, lines + text, drawn | figures
    return found, lines, drawn
