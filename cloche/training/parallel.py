"""Several processes, started by torchrun: each does every N-th chunk of a step, all make the same update, the first one writes.

Gradients are added over the chunks of a step, whoever did them (the loss is divided by the count of the whole step before), so the
number of processes decides only who does which chunk. On CPUs the sums of the processes are added in their order: equal bits where
each does one chunk of a step. With more chunks than processes `train.exact_sum` asks for the order of one process alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import reduce
from inspect import signature
import os
import time
from typing import Any

import torch
from torch import Tensor, nn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cloche.errors import FAILED, STOPPED, UserError
from cloche.words import _, listed

PATIENCE_S = float(os.environ.get("CLOCHE_PATIENCE_S", 600))  # how long the others wait for a process that says nothing


class Group:
    """The processes that train together. Alone, everything here gives back what it was given."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.runs = 0  # begun in this group: folds and seeds train one after the other
        self.doing, self._told = "", 0.0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def done(self, what: str) -> None:
        """The first process has done what the others wait for."""
        if self.size > 1 and self.leads:
            self.store.set(f"{self.runs} {what}", "")

    def wait(self, what: str) -> None:
        """Until the first process has done it, however long that takes. Raises: UserError when it failed; it has said why."""
        while self.rank and not self.store.check([f"{self.runs} {what}"]):
            if self.store.check([key := f"{self.runs} failed"]):
                raise UserError(_("the first process has failed"), code=int(self.store.get(key)), name="follows")
            time.sleep(0.05)

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """The first process goes first, and the others find done what it did."""
        self.wait(what)
        yield
        self.done(what)

    def failed(self, fault: BaseException) -> None:
        """After a fault of this process. Raises: UserError "follows" where the first one, which has a moment for it, failed too."""
        key, self.runs = f"{self.runs} failed", self.runs + 1
        with suppress(RuntimeError):  # the store may have gone with the first process: the fault itself is what to tell
            if self.size > 1 and self.leads:
                self.store.set(key, str(getattr(fault, "code", FAILED)))
            for _moment in range(20 if self.rank else 0):
                if self.store.check([key]):
                    raise UserError(_("the first process has failed"), code=int(self.store.get(key)), name="follows")
                time.sleep(0.05)

    def sum(self, t: Tensor) -> Tensor:
        """The sum over the processes, in place; on CPUs in their order."""
        if self.size > 1 and t.device.type == "cpu":
            each = [torch.empty_like(t) for _rank in range(self.size)]
            dist.all_gather(each, t)
            t.copy_(reduce(torch.add, each))
        elif self.size > 1:
            dist.all_reduce(t)
        return t

    def agree(self, stop: int, due: bool) -> tuple[int, bool]:
        """(the signal that any process got, whether the first one wants to save): all do the same after the same step."""
        if self.size == 1:
            return stop, due
        self.doing = _("agreeing on whether to stop")
        asked = torch.tensor([stop, int(due and self.leads)])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked[0]), bool(asked[1])

    def whole(self, t: Tensor) -> Tensor:
        """t, which each process has filled in part and left 0 elsewhere, with every part: byte by byte, so to the bit."""
        if self.size > 1:
            self.doing = _("putting a state together")
            dist.all_reduce(t.view(-1).view(torch.uint8))
        return t

    def wrap(self, objective: nn.Module, exact: bool) -> Callable[..., Any]:
        """The objective, whose gradients are added over the processes during the last backward pass of a step."""
        if self.size == 1:
            return objective
        for t in objective.state_dict().values() if exact else ():
            dist.broadcast(t, 0)
        if exact:
            return objective
        new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # torch 2.13's name of it
        wrapped = DistributedDataParallel(objective, **{"forward_sync_buffers" if new else "broadcast_buffers": False})
        wrapped.register_comm_hook(None, _added)
        return wrapped

    def apart(self, wrapped: Any) -> Any:
        """Within it a backward pass keeps its gradients to itself."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def in_order(self, sums: list[Tensor], more: list[Tensor], real: bool) -> list[Tensor]:
        """sums + `more` of the first process + that of the second …, those with a real chunk: the additions of one process alone."""
        mine = torch.cat([*(t.reshape(-1) for t in more), more[0].new_full((1,), float(real))])
        each = [torch.empty_like(mine) for _rank in range(self.size)]
        self.doing = _("adding gradients in the order of the chunks")
        dist.all_gather(each, mine)
        total = torch.cat([t.reshape(-1) for t in sums]) if sums else None
        for one in (one[:-1] for one in each if one[-1]):
            total = one if total is None else total + one
        parts = total.split([t.numel() for t in more])
        return [part.view(t.shape) for part, t in zip(parts, more, strict=True)]

    def at(self, step: int) -> None:
        """Where this process is, for those that may have to say who was lost."""
        now = time.monotonic()
        self.doing = _("adding gradients")
        if self.size > 1 and now - self._told > 0.5:
            self._told = now
            self.store.set(f"at {self.rank}", str(step))

    @contextmanager
    def watched(self, step: Callable[[], int]) -> Iterator[None]:
        """What torch says when a process is lost or silent, told with its number, the step and what the others waited for."""
        try:
            yield
        except RuntimeError as fault:
            if self.size == 1 or not any(
                word in str(fault).lower() for word in ("connection", "timed out", "timeout", "peer", "nccl", "gloo")
            ):
                raise
            places = {}
            with suppress(RuntimeError):  # the store may be gone too
                places = {r: int(self.store.get(f"at {r}")) for r in range(self.size) if self.store.check([f"at {r}"])}
            last = min(places.values(), default=0)
            behind = [str(r) for r in range(self.size) if r != self.rank and places.get(r, 0) == last]
            what = _("process {rank} lost the others at step {step}, while {doing}").format(rank=self.rank, step=step(), doing=self.doing)
            found = _("the furthest behind: process {ranks}, last heard of at step {step}").format(ranks=listed(behind), step=last)
            do = _("the same command goes on from the last checkpoint; torchrun --max-restarts 3 does so by itself")
            raise UserError(what, found, do, code=STOPPED, name="lost") from fault


def _added(_state, bucket):
    """The sum of a bucket of gradients; DistributedDataParallel's own way is their mean.

    On CPUs in the order of the processes: the network's would hang on where in a bucket a number lies, and that changes after a restart.
    """
    mine = bucket.buffer()
    if mine.device.type != "cpu":
        return dist.all_reduce(mine, async_op=True).get_future().then(lambda done: done.value()[0])
    each = [torch.empty_like(mine) for _rank in range(dist.get_world_size())]
    return dist.all_gather(each, mine, async_op=True).get_future().then(lambda _done: reduce(torch.add, each))


joined: list[Group] = []  # the one group of this process, once it is there


def group() -> Group:
    """The processes that torchrun started with this one, joined at the first call."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Group()
    if not joined:
        local = int(os.environ.get("LOCAL_RANK", 0))
        nccl = local < torch.cuda.device_count() and dist.is_nccl_available()
        if nccl:
            torch.cuda.set_device(local)
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE_S)))
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts lost processes again
        ours, torchs = (dist.PrefixStore(f"{whose} {start}", store) for whose in ("cloche", "torch"))
        dist.init_process_group(backend, store=torchs, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S))
        joined.append(Group(rank, size, ours))
    return joined[0]
