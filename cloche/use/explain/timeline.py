"""The denoising timeline: for a prompt, what each step holds and, under it, the picture that the net believes in."""

import math
from typing import Any

from matplotlib.figure import Figure
import numpy as np
import torch
from torch import Tensor

from cloche.use.draw import styled
from cloche.use.explain.step import example
from cloche.use.model import Model
from cloche.words import _, number, percent

SAMPLES, COLUMNS = 3, 8


@torch.no_grad()
def figures(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    prompt, held = str(given) if given is not None else model.prepare.text(example(model, None)[1])[0], []
    chunk = model.chunk(model.prepare.gather([model.prepare.encode(prompt)] * SAMPLES))
    denoise = model.task.denoiser(model.nets, chunk)

    def watched(x: Tensor, level: Tensor) -> Tensor:
        held.append((float(level[0]), x, denoise(x, level)))
        return held[-1][2]

    end, levels = model.task.sample(watched, chunk.ids), [level for level, _x, _x0 in held]
    shown = [held[i] for i in np.unique(np.linspace(0, len(held) - 1, COLUMNS - 1).astype(int))] + [(np.nan, end, end)]
    told = _('"{prompt}": {n} steps, log of signal to noise from {a} to {b}')
    line = told.format(prompt=prompt, n=len(held), a=number(levels[0], 1), b=number(levels[-1], 1))
    figure = draw([(level, torch.stack(pair, 1).flatten(0, 1)) for level, *pair in shown], model.prepare.pictures.pixels_of)
    title = _("from noise to {prompt}: share of noise, picture so far, what the net takes it for")
    return {"prompt": prompt, "levels": levels}, [line], {title.format(prompt=prompt): figure}


@styled
def draw(steps: list[tuple[float, Tensor]], pixels_of: Any) -> Figure:
    """steps: level (not a number at the end), and pictures (2·SAMPLES, C, h, w): what is held, what is believed, of each sample in turn."""
    figure = Figure((7.2, 1.8 * SAMPLES + 0.3), layout="constrained")
    for i, axes in enumerate(figure.subplots(2 * SAMPLES, len(steps), subplot_kw={"xticks": [], "yticks": [], "frame_on": False}).T.flat):
        (level, pictures), row = steps[i // (2 * SAMPLES)], i % (2 * SAMPLES)
        axes.imshow(pixels_of(pictures[row]), cmap="gray", vmin=0, vmax=1)
        axes.set_title("" if row else _("picture") if np.isnan(level) else percent(1 / (1 + math.exp(level)), 0))
        axes.set_ylabel("" if i > row else _("guess") if row % 2 else _("so far"))
    return figure
