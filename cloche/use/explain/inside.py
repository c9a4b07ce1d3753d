"""What can be seen inside a trained net on one input: each family has its own pictures, one file a family beside this one."""

from typing import Any

from matplotlib.figure import Figure

from cloche.use.explain.alignment import figures as alignment
from cloche.use.explain.gates import figures as gates
from cloche.use.explain.outlook import figures as outlook
from cloche.use.explain.spectrogram import figures as spectrogram
from cloche.use.explain.timeline import figures as timeline
from cloche.use.explain.tokens import figures as tokens
from cloche.use.model import Model

# (task, net) → what draws it; "" stands for any
INSIDE: dict[tuple[str, str], Any] = {
    ("forecast", ""): outlook,
    ("", "rnn"): gates,
    ("", "lstm"): gates,
    ("", "gru"): gates,
    ("transcribe", ""): spectrogram,
    ("language", ""): tokens,
    ("translate", ""): alignment,
    ("diffusion", ""): timeline,
}


def inside(model: Model, given: Any | None) -> tuple[dict[str, Any], list[str], dict[str, Figure]]:
    """What --json prints, the text, the figures by title; of `given`, or of a first example of the run's own data."""
    task, net = model.recipe.task.kind, model.recipe.net.kind
    found: dict[str, Any] = {}
    lines: list[str] = []
    drawn: dict[str, Figure] = {}
    for key, look in INSIDE.items():
        if key in ((task, net), (task, ""), ("", net)):
            more, text, figures = look(model, given)
            found, lines, drawn = found | more, lines + text, drawn | figures
    return found, lines, drawn
