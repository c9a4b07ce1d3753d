"""`cloche.fit`: a person's own nn.Module and arrays through the same loop, into the same run folder."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cloche.data.read.examples import Examples
from cloche.data.read.examples import digest as digest_of
from cloche.data.store import ARRAYS, Store
from cloche.errors import UserError
from cloche.recipe import change, parse
from cloche.tasks import Task
from cloche.use.model import Model
from cloche.use.train import Options, train_recipe
from cloche.words import _

BEGINNING = {
    "format": 1,
    "data": {"kind": "columns", "source": ARRAYS, "normalize": False},
    "optim": {"kind": "adam"},
    "train": {"epochs": 10},
}


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
    own_keys = ("data.validation", "data.test", "data.fold")
    if wrong := [k for k in sets or {} if not k.startswith(("optim.", "train.")) and k not in own_keys]:
        do = _("the net and the task are the objects that you pass")
        raise UserError(_("cloche.fit takes keys of [optim] and [train]"), ", ".join(wrong), do)
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError(_("your module {name} has no weights to train").format(name=type(module).__name__))
    fields = {k: np.ascontiguousarray(v) for k, v in (x if isinstance(x, dict) else {"columns": np.asarray(x, np.float32)}).items()}
    if task is None and (y is None or "columns" not in fields):
        do = _("a dict of arrays, or no y, is for a task of your own")
        raise UserError(_("cloche.fit needs x as one array and y"), ", ".join(fields), do)
    if "label" in fields:
        raise UserError(_('no array may be called "label"'), "", _("that name is y's"))
    examples = _examples(fields, y)
    own = {"kind": "own", "name": type(task).__name__} if task else _task_for(module, fields, examples)
    raw = change(BEGINNING, sets or {})
    recipe = parse({**raw, "net": {"kind": "module", "name": type(module).__name__}, "task": own})
    return train_recipe(recipe, Path(out), Options(out=out, again=again, quiet=True), Store(examples), module, task)


def _task_for(module: nn.Module, fields: dict[str, np.ndarray], examples: Examples) -> dict[str, str]:
    """Classify or regress, and with which loss: by y, and by how many numbers the module gives for a row."""
    where = next(module.parameters()).device
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        try:  # on a copy: a forward pass may leave traces
            given = copy.deepcopy(module).eval()(torch.from_numpy(fields["columns"][:2]).to(where))
        except (RuntimeError, TypeError, ValueError) as fault:
            do = _("x is given as (B, …) float32: {shape}").format(shape=fields["columns"].shape)
            raise UserError(_("your module does not take these arrays"), str(fault), do) from None
    columns = given[:2].reshape(min(2, len(examples)), -1).shape[1]
    many, multi = len(examples.labels) or examples.label.shape[1], examples.label.ndim == 2
    if columns != many and not (columns == 1 and many == 2 and not multi):
        what = _("your module gives {n} numbers a row, y needs {k}").format(n=columns, k=many)
        raise UserError(what, "", _("change the module's last layer"))
    return {"kind": "classify", "loss": "bce" if multi or columns == 1 else "cross_entropy"} if examples.labels else {"kind": "regress"}


def _examples(fields: dict[str, np.ndarray], y: np.ndarray | None) -> Examples:
    """Raises: UserError when the arrays differ in length, or a number is not finite."""
    counts = {k: len(a) for k, a in fields.items()} | ({} if y is None else {"y": len(y)})
    n = min(counts.values())
    if n == 0 or n != max(counts.values()):
        told = ", ".join(f"{k}: {v}" for k, v in counts.items())
        raise UserError(_("the arrays differ in length or are empty"), told, _("every array needs one row an example"))
    label, labels = _labels(np.zeros((n, 1), np.float32) if y is None else np.asarray(y))
    for name, a in {**fields, "y": label}.items():
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            found = _("first at row {n}").format(n=int(np.argwhere(~np.isfinite(a))[0][0]))
            what = _("{name} has values that are not finite").format(name="x" if name == "columns" else name)
            raise UserError(what, found, _("leave those rows out"))
    digest = np.stack([digest_of(*(a[i] for a in fields.values())) for i in range(n)])
    return Examples("columns", fields, label, labels, digest, np.zeros(n, np.uint8), [f"row {i}" for i in range(n)])


def _labels(y: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(n,) words, yes or no, or integers → classes; (n, K) integers → labels at once; floats → numbers."""
    kind = y.dtype.kind
    if kind in "USO" or (kind == "b" and y.ndim == 1):
        names, label = np.unique(y.astype(str), return_inverse=True)
        return label.reshape(-1).astype(np.int64), [str(name) for name in names]
    if kind not in "iufb":
        raise UserError(_("y is neither numbers nor words"), str(y.dtype), _("classes as integers or words, numbers as floats"))
    if kind in "iu" and y.ndim == 1:
        if y.min() < 0 or y.max() > 1_000_000:
            do = _("number the classes from 0, or give their names")
            raise UserError(_("y has a class below 0 or above a million"), f"{y.min()} … {y.max()}", do)
        return y.astype(np.int64), [str(k) for k in range(int(y.max()) + 1)]
    wide = y.reshape(len(y), -1).astype(np.float32)
    if kind == "f":
        return wide, []
    if not np.isin(y, (0, 1)).all():
        what, found = _("y with several columns of integers holds labels, each 0 or 1"), str(np.setdiff1d(y, (0, 1))[:3].tolist())
        raise UserError(what, found, _("give floats for numbers"))
    return wide, [str(k) for k in range(wide.shape[1])]
