"""What a checkpoint holds, beside the place."""

from collections.abc import Callable
from dataclasses import dataclass, field
import math
from typing import Any

import torch
from torch import Tensor

from cloche.data.chunk import Chunk
from cloche.errors import UserError
from cloche.tasks.metrics import Carry, Figure, Sums
from cloche.training.job import Job, Place
from cloche.training.objective import Objective, detached
from cloche.words import _


@dataclass
class State:
    """Everything that moves while a job is done. With several processes each has its own sums and carry, all else alike."""

    job: Job
    objective: Objective
    forward: Callable[..., tuple[Tensor, Carry, Sums]]  # the objective, gradients added over the processes
    optimizer: torch.optim.Optimizer
    bad_step: Tensor  # () int64, the first step with a non-finite gradient; -1 while there is none
    carry: dict[int, Carry] = field(default_factory=dict)  # by chunk
    ema: dict[str, Tensor] = field(default_factory=dict)
    seen: Sums = field(default_factory=dict)  # since the last line of the log
    epoch_seen: Sums = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_value: tuple[float, float] = (-math.inf, -math.inf)
    best_step: int = 0
    sums: list[Tensor] = field(default_factory=list)  # of this step, of all processes
    waited: int = 0
    losses: tuple[float, ...] = ()  # the first line of the log's, and the lowest so far: what a leap is measured by
    shown: str = ""  # the figures of the last line of the log, as text: the bar must not wait for the device

    def weights(self) -> dict[str, Tensor]:
        return {f"{n}/{k}": t for n in self.job.trained for k, t in self.job.nets[n].state_dict().items()}

    def chosen(self) -> dict[str, Tensor]:
        """The weights that are judged and kept: the running average where there is one."""
        return self.ema or self.weights()

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        for n in self.job.trained if tensors else ():
            self.job.nets[n].load_state_dict({k.removeprefix(f"{n}/"): t for k, t in tensors.items() if k.startswith(f"{n}/")})

    def select(self, place: Place, found: dict[str, Figure]) -> None:
        """The validation figures of the end of an epoch: keep the weights if they are the best so far."""
        name, sign = self.job.task.choose
        value = (sign * found[name].value, -found["loss"].value)  # equal accuracy: the lower loss
        if all(math.isfinite(v) for v in value) and value > self.best_value:
            self.best_value, self.best_step, self.waited = value, place.step, 0
            if self.job.config.select == "best":
                self.best = {k: t.detach().clone() for k, t in self.chosen().items()}
        else:
            self.waited += 1

    def fold(self) -> None:
        """The sums of all processes go to the first, that of the others begin anew."""
        for seen in (self.seen, self.epoch_seen) if self.job.group.size > 1 else ():
            seen.update({k: self.job.group.sum(t.clone()) * float(self.job.group.leads) for k, t in seen.items()})

    def order(self, chunk: Chunk) -> None:
        """After a backward pass that no other process has seen: its gradients and statistics, added in the order of the chunks."""
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        here = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters] + self.objective.statistics()
        self.sums = self.job.group.in_order(self.sums, here, not chunk.idle)
        for p in parameters:
            p.grad = None
        for t in self.objective.statistics():
            t.zero_()

    def settle(self) -> None:
        """The sums of `order` become the gradients and statistics of the step."""
        if self.sums:
            parameters = [p for p in self.objective.parameters() if p.requires_grad]
            for p, t in zip(parameters, self.sums, strict=False):
                p.grad = torch.empty_like(p).copy_(t)  # fused kernels walk weights and gradients together: same memory layout
            for mine, t in zip(self.objective.statistics(), self.sums[len(parameters) :], strict=True):
                mine.copy_(t)
            self.sums = []

    def lanes(self) -> list[int]:
        """Where the chunks of a step begin, and end, in its rows."""
        return self.job.train.bounds(len(self.job.order.ids(0, 0)[0]), self.job.config.chunks, self.job.config.batch)[0]

    def tensors(self) -> dict[str, Tensor]:
        """All of it; of several processes each calls this. Carry is by lane, so that it can go on in other chunks."""
        self.fold()
        out = {f"net/{k}": t for k, t in self.weights().items()} | {f"best/{k}": t for k, t in self.best.items()}
        out |= {f"ema/{k}": t for k, t in self.ema.items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            out |= {f"optim/{i}/{k}": torch.as_tensor(t) for k, t in kept.items() if t is not None}
        out |= {f"carry/{k}": t for k, t in self.joined().items()}
        return out | {f"seen/{k}": t for k, t in self.seen.items()} | {f"epoch_seen/{k}": t for k, t in self.epoch_seen.items()}

    def numbers(self) -> dict[str, Any]:
        return {
            "best_value": [v if math.isfinite(v) else None for v in self.best_value],
            "best_step": self.best_step,
            "optim": self.job.optim.kind,
            "waited": self.waited,
            "losses": list(self.losses) or None,
        }

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        device = self.bad_step.device
        group = lambda name: {k.removeprefix(f"{name}/"): t.to(device) for k, t in tensors.items() if k.startswith(f"{name}/")}  # noqa: E731
        anew = _("start anew with --again")
        try:
            self.load_weights(group("net"))
        except RuntimeError as fault:
            raise UserError(_("the checkpoint does not fit this net"), str(fault).splitlines()[-1].strip(), anew) from None
        if numbers["optim"] != self.job.optim.kind:
            told = _("{old} there, {new} now").format(old=numbers["optim"], new=self.job.optim.kind)
            raise UserError(_("the checkpoint holds the memory of another optimizer"), told, anew)
        kept = self.optimizer.state_dict()
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        for key, t in group("optim").items():
            i, name = key.split("/")
            like = parameters[int(i)]  # fused kernels walk weights and state together: same memory layout
            kept["state"].setdefault(int(i), {})[name] = torch.empty_like(like).copy_(t) if t.shape == like.shape else t
        self.optimizer.load_state_dict(kept)
        self.cut(group("carry"))
        self.seen, self.epoch_seen, config = group("seen"), group("epoch_seen"), self.job.config
        self.ema = (group("ema") or {k: t.detach().clone() for k, t in self.weights().items()}) if config.ema else {}
        self.best = group("best") if config.select == "best" else {}
        if not self.job.group.leads:
            self.seen, self.epoch_seen = ({k: torch.zeros_like(t) for k, t in s.items()} for s in (self.seen, self.epoch_seen))
        self.best_value = tuple(-math.inf if v is None else v for v in numbers["best_value"])  # type: ignore[assignment]
        self.best_step, self.waited, self.losses = numbers["best_step"], numbers["waited"], tuple(numbers["losses"] or ())
        if config.select == "best" and not self.best:  # what was kept so far was not for its figure
            self.best_value, self.best_step = (-math.inf, -math.inf), 0
        like = {k: t.shape for k, t in self.weights().items()}
        if any(found and {k: t.shape for k, t in found.items()} != like for found in (group("best"), group("ema"))):
            raise ValueError("the best weights or their average are of another net")

    def joined(self) -> dict[str, Tensor]:
        """The carry of all lanes."""
        bounds, mine = self.lanes() if self.carry else [], [(c, carry) for c, carry in self.carry.items() if carry]
        out = {}
        for k, like in mine[0][1].items() if mine else ():
            out[k] = like.new_zeros(bounds[-1], *like.shape[1:])
            for c, carry in mine:
                out[k][bounds[c] : bounds[c + 1]] = carry[k]
            self.job.group.whole(out[k])
        return out

    def cut(self, lanes: dict[str, Tensor]) -> None:
        """The carry of all lanes → of the chunks that this process does."""
        bounds = self.lanes() if lanes else [0]
        if lanes and {len(t) for t in lanes.values()} != {bounds[-1]}:
            raise ValueError("the carried state is of other lanes")
        mine = range(self.job.group.rank, len(bounds) - 1, self.job.group.size)
        self.carry = {c: detached({k: t[bounds[c] : bounds[c + 1]] for k, t in lanes.items()}) for c in mine}
