"""`cloche explain`: the layers of a recipe or run, and one training step of a run on one input."""

from pathlib import Path
from typing import Any

from cloche.errors import UserError
from cloche.recipe import shipped
from cloche.use.explain.layers import Found, explain_layers
from cloche.use.explain.step import explain_step
from cloche.use.model import load
from cloche.words import _

Text, Sets = str | None, dict[str, Any] | None


def explain(
    what: str, given: Any = None, *, label: Any = None, at: Text = None, out: Text = None, data: Text = None, sets: Sets = None
) -> Found:
    """The layers of a recipe (a name, a .toml, a path to data); of a run one training step on `given`, or without it both.

    Returns: what --json prints, and the text. The other arguments: see `explain_layers` and `explain_step`.
    Raises: UserError also where an argument has no meaning for `what`.
    """
    what = str(what)
    if what in shipped() or not (Path(what) / "facts.json").exists():
        if any(v is not None for v in (given, label, at, out)):
            name = Path(what).name.removesuffix(".toml").removeprefix("recipe:")
            do = _("cloche train {what}, then cloche explain runs/{name} INPUT").format(what=what, name=name)
            raise UserError(_("{what} is no run: INPUT, --label, --at and --out need trained weights").format(what=what), "", do)
        return explain_layers(what, data, sets)
    if data is not None or sets:
        raise UserError(_("{what} is a finished run: --data and --set belong to a recipe").format(what=what), "", _("leave them out"))
    model = load(what)
    step, text = explain_step(model, given, label, at, out)
    if given is not None:
        return step, text
    layers, table = explain_layers(model)
    rows = [{**a, **b} for a, b in zip(layers["layers"], step["layers"], strict=False)]
    return {**layers, **step, "layers": rows}, f"{table}\n\n{text}"
