"""Which source tokens each token of an answer was read from: the attention of the decoder on the encoder as a map."""

from typing import Any

from matplotlib.figure import Figure
import numpy as np
import torch

from cloche.data.pairs import BOS, EOS
from cloche.use.draw import new, styled
from cloche.use.explain.step import example
from cloche.use.model import Model
from cloche.words import _, percent


@torch.no_grad()
def figures(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    """The map of the model's own answer: place by place the mean over blocks and heads, so that each row sums to 1."""
    name, chunk = example(model, given)
    source, length = chunk.data["source"], chunk.data["source_len"]
    said = model.task.written(model.net, chunk)[0]
    target = torch.tensor([[BOS, *said]], device=model.device)  # place u foretells token u + 1
    weights = model.net.attention(source, length, target).float().mean((1, 2))[0, :, : length[0]].cpu().numpy()  # (U, S)
    name_of = lambda token: model.prepare.opened.decode([token], skip_special_tokens=False)  # noqa: E731
    read, wrote = (list(map(name_of, ids)) for ids in (source[0, : length[0]].tolist(), [*said, EOS]))
    text = model.prepare.text(said)
    lines = [_("{input} → {text}").format(input=name, text=text)]
    for word, row in zip(wrote, weights, strict=True):
        best = ", ".join(f"{read[s]} {percent(float(row[s]), 0)}" for s in np.argsort(-row, kind="stable")[:3])
        lines.append(f"  {word:<12} ← {best}")
    found = {"input": name, "text": text, "source": read, "target": wrote, "attention": weights.tolist()}
    return found, lines, {_("where it looked for each token that it wrote"): draw(weights, read, wrote)}


@styled
def draw(weights: np.ndarray, source: list[str], target: list[str]) -> Figure:
    figure, axes = new(0.8 + 0.12 * len(target), _("source"), _("answer"))
    axes.imshow(weights, cmap="Greys", vmin=0, aspect="auto")
    source, target = ([text.replace(" ", "␣") for text in side] for side in (source, target))
    axes.set_xticks(range(len(source)), source, fontsize=6)
    for label in axes.get_xticklabels():
        label.set_rotation(90 if len(label.get_text()) > 2 else 0)
    axes.set_yticks(range(len(target)), target, fontsize=6)
    return figure
