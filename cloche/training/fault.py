"""What ends a run early, told so that a person can act: a number that is not finite, a machine without memory, a signal."""

import errno
from typing import Any

import torch
from torch import Tensor, nn

from cloche import rng
from cloche.data.chunk import Chunk
from cloche.errors import FAILED, INTERRUPTED, STOPPED, UserError
from cloche.training.job import Job, Place
from cloche.training.run import Run
from cloche.training.state import State
from cloche.words import _, listed


def stopped(signal_number: int) -> UserError:
    code = INTERRUPTED if signal_number == 2 else STOPPED
    do = _("type the same command: it goes on where it was")
    return UserError(_("stopped; everything done so far is saved"), "", do, code=code, name="stopped")


def check(job: Job, run: Run, state: State) -> None:
    """End the run when a gradient was not finite.

    The weights are still those of the last good step: play the bad one again to see whose it was, and where it began.
    """
    bad = int(state.bad_step)
    if bad < 0:
        return
    epoch, index = 0, bad
    while index >= job.order.steps(epoch):
        epoch, index = epoch + 1, index - job.order.steps(epoch)
    chunks = [chunk for chunk in job.chunks(epoch, index, rng.draw(job.config.seed, epoch)) if not chunk.idle]
    ids = _of_all(job, [int(i) for chunk in chunks for i, w in zip(chunk.ids, chunk.weight, strict=True) if w > 0])
    culprits = _of_all(job, [int(i) for chunk in chunks for i in chunk.ids[_rows(job, chunk)]])
    layers = _layers(job, state, chunks, Place(bad, epoch, index))
    run.poisoned(bad + 1, culprits or ids)
    what = _("the loss or its gradient is not a finite number at step {step}; nothing from that step on was applied").format(step=bad + 1)
    whose = _("examples {ids}").format(ids=listed(map(str, culprits or ids), 8))
    whose += _(" · layers {names}").format(names=listed(layers)) if layers else ""
    do = _("lower optim.lr (now {lr}) or set optim.clip = 1, and look at those examples; to go on without them: --rewind")
    raise UserError(what, whose, do.format(lr=job.optim.lr), code=FAILED, name="not-finite")


def _of_all(job: Job, ids: list[int]) -> list[int]:
    """The rows that any process names."""
    if job.group.size == 1:
        return ids
    mine = torch.zeros(job.group.size, int(job.group.sum(torch.tensor(len(ids)))), dtype=torch.int64)
    mine[job.group.rank, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
    return [int(i) - 1 for i in job.group.whole(mine).flatten() if i > 0]


@torch.no_grad()
def _rows(job: Job, chunk: Chunk) -> Tensor:
    """(B,) whose own loss or input is not finite."""
    for net in job.nets.values():
        net.eval()  # batch normalisation would spread one bad row over all
    with job.precision.autocast(chunk.weight.device):
        _sums, _carry, rows = job.task.measure(job.nets, job.precision.place(chunk), None)
    wrong = ~torch.isfinite(rows["loss"])
    for t in chunk.data.values():
        if t.is_floating_point():
            wrong |= ~torch.isfinite(t.reshape(len(t), -1)).all(1)
    return wrong & (chunk.weight > 0)


def _layers(job: Job, state: State, chunks: list[Chunk], place: Place) -> list[str]:
    """Where it began: the first layer with a result that is not finite; else those nearest the loss whose gradient is none."""
    found: list[str] = []

    def look(name: str, out: Any) -> None:
        tensors = out if isinstance(out, tuple) else (out,)
        if not found and any(isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
            found.append(name)

    leaves = [(n, m) for n, m in state.objective.nets.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda _m, _given, out, n=n: look(n, out)) for n, m in leaves]
    for n in job.trained:
        job.nets[n].train()
    for k, chunk in enumerate(chunks):
        torch.manual_seed(rng.chunk_seed(job.config.seed, place.epoch, place.index, job.group.rank + k * job.group.size))
        total, _carry, _told = state.objective(chunk, None)
        total.backward()
    for hook in hooks:
        hook.remove()
    graded = [n for n, p in state.objective.nets.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    state.optimizer.zero_grad(set_to_none=True)
    return found or list(dict.fromkeys(n.rpartition(".")[0] for n in graded))[-1:]


def no_memory(fault: BaseException) -> bool:
    """Whether this is the machine's word for "no memory left"."""
    if isinstance(fault, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("DefaultCPUAllocator", "bad_alloc", f"Error code {errno.ENOMEM}")
    return isinstance(fault, RuntimeError) and any(word in str(fault) for word in words)


def smaller(job: Job, run: Run, state: State, place: Place, why: str) -> UserError | None:
    """After a step that found no memory: cut its chunks in two, if that was allowed and can be; else what to tell the person.

    Nothing of the step was applied. Chunks of another size add in another order: other bits from here on, which is said and recorded.
    """
    state.optimizer.zero_grad(set_to_none=True)
    for norm in state.objective.norms:
        norm.forget()
    chunks, rows = job.config.chunks * 2, len(job.order.ids(place.epoch, place.index)[0])
    told = _("at step {step}: {why}").format(step=place.step + 1, why=why)
    if "train.chunks" in run.allow and job.group.size == 1 and rows >= 2 * chunks:
        lanes = state.joined()
        job.config = job.config.model_copy(update={"chunks": chunks})
        state.cut(lanes)
        run.amend("train", {"chunks": chunks})
        run.event(kind="memory", step=place.step, chunks=chunks)
        return None
    do = _("set a smaller train.batch, or take a smaller net")
    if rows >= 2 * chunks:
        do = _("the same command with --set train.chunks={n} --allow-change train.chunks needs about half; or set a smaller train.batch")
    return UserError(_("there is not enough memory for a step"), told, do.format(n=chunks), code=FAILED, name="out-of-memory")


def parameters(state: State) -> list[nn.Parameter]:
    return [p for group in state.optimizer.param_groups for p in group["params"]]
