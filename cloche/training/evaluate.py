"""A part of the data, every row once: sums that become figures, what happened to each row, and what a person would have got."""

from collections.abc import Callable, Iterator
import math
from typing import Any

import numpy as np
import torch

from cloche import rng
from cloche.data.chunk import Part
from cloche.tasks import Task
from cloche.tasks.metrics import Nets, Sums
from cloche.training.parallel import Group
from cloche.training.precision import Precision


class Interrupted(Exception):
    """A signal came while something was being measured that can be measured again."""


@torch.inference_mode()
def evaluate(
    nets: Nets, task: Task, part: Part, precision: Precision, batch: int, group: Group | None = None, asked: Callable[[], int] = int
) -> tuple[Sums, dict[str, np.ndarray]]:
    """Dropout off, running statistics, no augmentation.

    Args:
        group: the processes that share the chunks, where rows need not follow each other. asked: the signal that asks to stop early.
    Returns: the task's sums; by row, `ids` (the rows of running text come in lanes) and what the task tells of it (`loss`, `predicted`, …),
        of several processes those that this one has seen.
    Raises: Interrupted.
    """
    was, group = {k: n.training for k, n in nets.items()}, group or Group()
    for net in nets.values():
        net.eval()
    n = -(-len(part) // batch)
    shared = group.size > 1 and not part.carried and n >= group.size
    sums: dict[int, Sums] = {}
    rows: dict[str, list[np.ndarray]] = {}
    carry = None
    try:
        for i, chunk in part.once(batch, group.rank if shared else 0, group.size if shared else 1):
            complete = not shared or (i // group.size + 1) * group.size <= n  # all processes come here, and do the same
            if complete and group.agree(asked(), False)[0]:
                raise Interrupted
            with rng.apart(part.device), precision.autocast(part.device):
                torch.manual_seed(rng.chunk_seed(0, 0, i, -1))  # a task that draws noise to measure draws the same each time
                sums[i], carry, told = task.measure(nets, precision.place(chunk), carry)
            real = chunk.weight > 0
            for k, v in {"ids": chunk.ids, **told}.items():
                rows.setdefault(k, []).append(v[real].float().cpu().numpy() if v.is_floating_point() else v[real].cpu().numpy())
    finally:
        for k, net in nets.items():
            net.train(was[k])
    total: Sums = {}
    for one in _of_all(sums, n, group) if shared else sums.values():  # added in the order of the chunks, whoever has seen them
        total = {k: total[k] + v if k in total else v for k, v in one.items()}
    return total, {k: np.concatenate(v) for k, v in rows.items()}


def _of_all(mine: dict[int, Sums], n: int, group: Group) -> Iterator[Sums]:
    """The sums of every chunk, with those of the other processes."""
    table = {}
    for k, like in next(iter(mine.values())).items():
        table[k] = like.new_zeros(n, *like.shape)
        for i, one in mine.items():
            table[k][i] = one[k]
        group.whole(table[k])
    return ({k: t[i] for k, t in table.items()} for i in range(n))


@torch.inference_mode()
def judge(nets: Nets, task: Any, part: Part, precision: Precision, batch: int, keep: int = 12) -> tuple[Sums, list[dict[str, Any]]]:
    """What a person would get for the first `task.samples` rows (all, where it does not say), scored by the task.

    Returns: the sums of its `score`; the first answers beside what they ought to be.
    """
    for net in nets.values():
        net.eval()
    total, kept, left = {}, [], getattr(task, "samples", math.inf)
    for start in range(0, min(left, len(part)) if hasattr(task, "score") else 0, batch):
        chunk = precision.place(part.take(np.arange(start, min(start + batch, left, len(part)))))
        with precision.autocast(part.device):
            answers = task.answer(nets, chunk)
            sums = task.score(answers, chunk, nets)
        total = {k: total[k] + v if k in total else v for k, v in sums.items()}
        if len(kept) < keep and hasattr(task, "truth"):
            rows = zip(chunk.ids.tolist(), task.truth(chunk), answers, strict=True)
            kept += [{"name": part.store.name(i), "true": t, "answer": a} for i, t, a in rows][: keep - len(kept)]
    return total, kept
