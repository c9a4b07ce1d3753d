"""`cloche explain`: the layers of a recipe or run, and one training step of a run on one input."""

from itertools import zip_longest
from pathlib import Path
import re
from typing import Any

from cloche.errors import UserError
from cloche.recipe import shipped
from cloche.use.explain.inside import inside
from cloche.use.explain.step import explain_step, write_all
from cloche.use.layers import Found, explain_layers
from cloche.use.model import load
from cloche.words import _

Text, Sets = str | None, dict[str, Any] | None


def explain(
    what: str, given: Any = None, *, label: Any = None, at: Text = None, out: Text = None, data: Text = None, sets: Sets = None
) -> Found:
    """Of a recipe (a name, a .toml, a path to data) the layers; of a run one training step on `given`, or without it both.

    Returns: what --json prints, and the text. The other arguments: see `explain_step`; data and sets belong to a recipe.
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
    stepped = model.recipe.task.kind in ("classify", "regress")
    if not stepped and (label is not None or at is not None):
        raise UserError(_("--label and --at belong to classifiers and regression"), model.recipe.task.kind, _("leave them out"))
    found, lines, figures = inside(model, given)
    for title, figure in figures.items():
        figure.suptitle(title[:1].upper() + title[1:], fontsize=8, x=0.01, ha="left")
    stems = ["-".join(["explain", *re.findall(r"\w+", title)[:4]]) for title in figures]
    paths = write_all(dict(zip(stems, figures.values(), strict=True)), model, out) if figures else []
    text = "\n".join([*lines, *(_("picture    {path}").format(path=path) for path in paths)])
    found |= {"pictures": paths}
    if stepped:  # of these tasks only recurrent nets have pictures of their own
        step, told = explain_step(model, given, label, at, out)
        found, text = {**found, **step, "pictures": step["pictures"] + paths}, "\n\n".join(filter(None, (told, text)))
    if given is not None:
        return found, text
    layers, table = explain_layers(model)
    rows = [{**a, **b} for a, b in zip_longest(layers["layers"], found.get("layers", []), fillvalue={})]
    return {**layers, **found, "layers": rows}, f"{table}\n\n{text}"
