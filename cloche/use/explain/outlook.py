"""What a forecast looks like beside what came: the series, and the net's answer from the first, middle and last test origin."""

from typing import Any

from matplotlib.figure import Figure
import numpy as np
import torch

from cloche.use.draw import DIM, HUES, INK, new, styled
from cloche.use.model import Model
from cloche.words import _, number


@styled
def figures(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    """Of `given`, what follows it; else of the judged part. The first column only."""
    if given is None:
        data = model.data()
        part = data.part(data.judged)
        chunk = part.take(np.unique([0, len(part) // 2, len(part) - 1]))
        starts = part.ids[np.unique([0, len(part) // 2, len(part) - 1])]
    else:
        chunk = model.chunk(model.prepare.gather([model.prepare.encode(given)]))
        starts = np.array([chunk.data["history"].shape[1]])
    with torch.inference_mode():
        found = model.prepare.undo(model.net(chunk.data["past"]).float(), chunk)[..., 0].cpu().numpy()  # (B, horizon)
    figure, axes = new(2.4, "", "")
    for i, start in enumerate(starts):
        history = chunk.data["history"][i, :, 0].cpu().numpy()
        axes.plot(np.arange(start - len(history), start), history, color=DIM, lw=1)
        if "truth" in chunk.data:
            axes.plot(
                np.arange(start, start + found.shape[1]),
                chunk.data["truth"][i, :, 0].cpu().numpy(),
                color=INK,
                lw=1.2,
                label=None if i else _("what came"),
            )
    for i, start in enumerate(starts):
        at = np.arange(start, start + found.shape[1])
        axes.plot(at, found[i], color=HUES[1], lw=1.6, label=_("forecast") if i == 0 else None)
        axes.axvline(start - 0.5, color=DIM, lw=0.7, ls=(0, (1, 2)))
    axes.legend(loc="upper left")
    if given is None:
        names = model.data().store.names
        axes.xaxis.set_major_formatter(lambda v, _at: names[int(v)] if 0 <= v < len(names) else "")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    title = _("what it foretells") if given is not None else _("what it foretells from three points in time, beside what came")
    lines = [_("forecast   {values}").format(values=" ".join(number(v, 1) for v in found[-1]))]
    return {"forecast": found[-1].tolist()}, lines, {title: figure}
