"""`cloche.fit`: a person's own nn.Module and arrays through the same loop, into the same run folder."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cloche.data.read.examples import Examples, row_digests
from cloche.data.store import Store
from cloche.errors import UserError
from cloche.recipe import change, parse
from cloche.tasks import Task
from cloche.use.model import Model
from cloche.use.train import Options, train_recipe
from cloche.words import _

BEGINNING = {"format": 1, "data": {"kind": "columns", "source": "arrays", "normalize": False}, "optim": {"kind": "adam"}, "train": {"epochs": 10}}


def fit(
    module: nn.Module,
    x: np.ndarray | dict[str, np.ndarray],
    y: np.ndarray | None = None,
    *,
    out: str,
    task: Task | None = None,
    sets: dict[str, Any] | None = None,
    again: bool = False,
) -> Model:
    """Train your own module on your own arrays; the run folder remembers its name and weights, never its code.

    Args:
        module: forward(x) → (B, K) logits, or (B,) · (B, 1) values. x: (n, …) float32, or a dict of arrays with rows first
            where `task` knows what to do with them. y: (n,) integers for classes, (n, K) zeros and ones for labels, floats for numbers.
        out: the run folder. task: your own task object (see `cloche.tasks.Task`); else classify or regress, as y is.
        sets: keys of [optim] and [train], such as {"train.epochs": 20, "optim.lr": 1e-3}.
    Returns: the Model; `cloche report OUT` works by command, evaluate and predict in Python with the module passed again.
    Raises: UserError for arrays that do not fit each other.
    """
    fields = {k: np.ascontiguousarray(v) for k, v in (x if isinstance(x, dict) else {"columns": np.asarray(x, np.float32)}).items()}
    examples = _examples(fields, y)
    raw = change(BEGINNING, sets or {})
    own = {"kind": "own", "name": type(task).__name__} if task else {"kind": "classify" if examples.labels else "regress"}
    recipe = parse({**raw, "net": {"kind": "module", "name": type(module).__name__}, "task": own})
    return train_recipe(recipe, Path(out), Options(out=out, again=again, quiet=True), Store(examples), module, task)


def _examples(fields: dict[str, np.ndarray], y: np.ndarray | None) -> Examples:
    """Raises: UserError when the arrays differ in length or a label is not finite."""
    n = {k: len(a) for k, a in fields.items()} | ({} if y is None else {"y": len(y)})
    if len(set(n.values())) != 1:
        raise UserError(_("the arrays differ in length"), ", ".join(f"{k}: {v}" for k, v in n.items()), _("every array needs one row an example"))
    y = np.zeros((next(iter(n.values())), 1), np.float32) if y is None else np.asarray(y)
    if np.issubdtype(y.dtype, np.integer) and y.ndim == 1:
        label, labels = y.astype(np.int64), [str(k) for k in range(int(y.max()) + 1)]
    else:
        label = y.astype(np.float32).reshape(len(y), -1)
        labels = [str(k) for k in range(label.shape[1])] if np.issubdtype(y.dtype, np.integer) or y.dtype == bool else []
    if not np.isfinite(label).all():
        raise UserError(_("y has values that are not finite"), _("first at row {n}").format(n=int(np.argwhere(~np.isfinite(label))[0][0])), _("leave those rows out"))
    digest = row_digests(next(iter(fields.values())))
    return Examples("columns", fields, label, labels, digest, np.zeros(len(label), np.uint8), [f"row {i}" for i in range(len(label))])


