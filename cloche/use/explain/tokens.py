"""What each token of a text cost the net, in bits; and, of a transformer, which earlier tokens each of its heads looks at."""

from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import numpy as np
import torch

from cloche.nets.gpt import Gpt
from cloche.use.draw import DIM, HUES, INK, new, styled
from cloche.use.explain.step import example
from cloche.use.model import Model
from cloche.words import _, number

TOLD, LOOKED, ACROSS = 400, 24, 64  # tokens whose cost is told, and whose attention is drawn; letters of a line


@torch.no_grad()
def figures(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    """Of `given`, as the beginning of a paragraph, else of the first window of the judged part."""
    name, chunk = example(model, given)
    chunk = replace(chunk, data={k: chunk.data[k][:, : TOLD + 1] for k in ("tokens", "bytes")})
    tokens, bits = chunk.data["tokens"], model.task.bits(model.task.losses(model.nets, chunk)[0], chunk)[0]
    size, n = int(chunk.data["bytes"].sum()), int((chunk.data["bytes"] > 0).sum())
    shown, costs = lambda t: "<unk>" if t == model.task.unknown else model.prepare.decode([t]).decode(errors="replace"), bits[:n].tolist()
    texts = list(map(shown, tokens[0, : n + 1].tolist()))
    rate, each = sum(costs) / max(size, 1), list(map(list, zip(texts[1:], costs, strict=True)))
    lines = [_("{rate} bits a byte over {n} tokens; the dearest:").format(rate=number(rate, 3), n=number(n))]
    lines += [f"  {number(cost, 1):>6}  {text!r}" for text, cost in sorted(each, key=lambda pair: -pair[1])[:8]]
    found: dict[str, Any] = {"input": name, "bits_per_byte": rate, "tokens": each}
    drawn = {_("what each token cost: the darker, the less expected"): paper(texts[1:], costs)}
    if isinstance(model.net, Gpt):
        looks = model.net.attention(tokens[:, : min(n, LOOKED) + 1]).float()[0]  # (layers, H, T, T)
        place = torch.arange(looks.shape[-1], device=looks.device)
        found["looks_back"] = ((place[:, None] - place) * looks).sum(-1).mean(-1).tolist()  # (layers, H) tokens
        back = _("how many tokens back each head looks, layer by layer: {back}")
        lines.append(back.format(back="; ".join(" ".join(number(v, 1) for v in row) for row in found["looks_back"])))
        drawn[_("where each head looks, from the token on the left to earlier ones")] = heads(
            looks.cpu().numpy(), [text.strip() for text in texts[: looks.shape[-1]]]
        )
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
