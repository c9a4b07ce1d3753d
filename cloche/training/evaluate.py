"""A part of the data, every row once: sums that become figures, and what happened to each row."""

import numpy as np
import torch

from cloche import rng
from cloche.data.chunk import Part
from cloche.tasks import Task
from cloche.tasks.metrics import Nets, Sums
from cloche.training.precision import Precision


@torch.inference_mode()
def evaluate(nets: Nets, task: Task, part: Part, precision: Precision, batch: int) -> tuple[Sums, dict[str, np.ndarray]]:
    """Dropout off, running statistics, no augmentation.

    Returns: the task's sums; by row, in the part's order: `ids` and what the task tells of it (`loss`, `predicted`, …).
    """
    was = {k: n.training for k, n in nets.items()}
    for net in nets.values():
        net.eval()
    total: Sums = {}
    rows: dict[str, list[np.ndarray]] = {}
    carry = None
    for i, chunk in enumerate(part.once(batch)):
        with rng.apart(part.device), precision.autocast(part.device):
            torch.manual_seed(rng.chunk_seed(0, 0, i, -1))  # a task that draws noise to measure draws the same each time
            sums, carry, told = task.measure(nets, precision.place(chunk), carry)
        total = {k: total[k] + v if k in total else v for k, v in sums.items()}
        real = chunk.weight > 0
        for k, v in {"ids": chunk.ids, **told}.items():
            rows.setdefault(k, []).append(v[real].float().cpu().numpy() if v.is_floating_point() else v[real].cpu().numpy())
    for k, net in nets.items():
        net.train(was[k])
    return total, {k: np.concatenate(v) for k, v in rows.items()}
