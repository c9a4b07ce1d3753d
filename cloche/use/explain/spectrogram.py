"""A clip as the net hears it, and under it which letter the net takes each moment for: peaks, and between them the blank."""

from itertools import groupby
from typing import Any

from matplotlib.figure import Figure
import numpy as np
import torch

from cloche.data.audio import HOP_S
from cloche.use.draw import DIM, HUES, INK, new, styled
from cloche.use.explain.step import example
from cloche.use.model import Model
from cloche.words import _, number, percent


@styled
@torch.no_grad()
def figures(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    """The letters of the best path, each where it is likeliest in its run of steps."""
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
    for (t, k), letter in zip(peaks, said, strict=True):
        axes.plot(x, p[:, k], color=HUES[k % len(HUES)], lw=1.3)
        axes.text(x[t], 1.04, letter["letter"], color=INK, ha="center")
    axes.set_yticks([0, 1, 1.2, 2.6], ["0 %", "100 %", "0 Hz", f"{number(model.prepare.rate / 2)} Hz"])
    axes.set(xlim=(0, len(p) * step_s), ylim=(-0.03, 2.6))
    return {"input": name, "text": text, "letters": said}, lines, {_("what the net hears"): figure}
