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
    carry, outside = None, torch.get_rng_state()
    for i, chunk in enumerate(part.once(batch)):
        torch.manual_seed(rng.chunk_seed(0, 0, i, -1))  # a task that draws noise to measure draws the same each time
        with precision.autocast(chunk.weight.device):
            sums, carry, told = task.measure(nets, precision.place(chunk), carry)
        total = {k: total[k] + v if k in total else v for k, v in sums.items()}
        real = chunk.weight > 0
        for k, v in {"ids": chunk.ids, **told}.items():
            rows.setdefault(k, []).append(v[real].float().cpu().numpy() if v.is_floating_point() else v[real].cpu().numpy())
    torch.set_rng_state(outside)
    for k, net in nets.items():
        net.train(was[k])
    return total, {k: np.concatenate(v) for k, v in rows.items()}
