"""The one module whose forward pass is a training loss: what autocast, DDP and compile wrap, never a net alone."""

import torch
from torch import Tensor, nn

from cloche.data.chunk import Chunk
from cloche.nets.parts import BatchNorm
from cloche.tasks import Task
from cloche.tasks.metrics import Carry, Nets, Sums
from cloche.training.parallel import Group
from cloche.training.precision import Precision


class Objective(nn.Module):
    def __init__(self, nets: Nets, task: Task, precision: Precision) -> None:
        super().__init__()
        self.nets, self.task, self.precision = nn.ModuleDict(nets), task, precision
        self.norms = [m for m in self.modules() if isinstance(m, BatchNorm)]

    def forward(self, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        """() float32 sum of losses over the chunk's rows, the carry for the next chunk, sums for the log.

        An idle chunk is another one's copy, so that every process goes through the same net: nothing of it counts.
        """
        before = [t.clone() for t in self.statistics()] if chunk.idle else []
        for norm in self.norms:
            norm.rows = chunk.weight if chunk.fillers else None
        with self.precision.autocast(chunk.weight.device):
            total, carry, told = self.task.loss(dict(self.nets.items()), self.precision.place(chunk), carry)
        if chunk.idle:
            for mine, t in zip(self.statistics(), before, strict=True):
                mine.copy_(t)
            total, told = total * 0, {k: t * 0 for k, t in told.items()}
        return total, carry, told

    def statistics(self) -> list[Tensor]:
        """What batch normalisation has summed up in this step."""
        return [t for norm in self.norms for t in (norm.seen, norm.chunks)]

    def commit(self, ok: Tensor, group: Group) -> None:
        """The end of a step for the statistics of batch normalisation; ok () is 0 after a non-finite gradient."""
        for t in self.statistics() if group.size > 1 else ():
            group.sum(t)
        for norm in self.norms:
            norm.commit(ok)


def detached(carry: Carry) -> Carry:
    return carry and {k: v.detach() for k, v in carry.items()}


@torch.no_grad()
def average(kept: dict[str, Tensor], weights: dict[str, Tensor], memory: float, ok: Tensor) -> None:
    """kept ← memory · kept + (1 − memory) · weights; not where `ok` () is 0. Whole numbers (counters) are copied."""
    real = [k for k, w in weights.items() if w.is_floating_point()]
    by = [((1 - memory) * ok).to(weights[k].dtype) for k in real]
    torch._foreach_lerp_([kept[k] for k in real], [weights[k] for k in real], by)
    for k in weights.keys() - real:
        kept[k].copy_(weights[k])


def gradient_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """() the norm of all gradients together; where limit > 0 they are scaled down to it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
