"""Optimizers and schedules: `[optim]`.

Every optimizer obeys `found_inf`, a flag on the device: where it is 1, `step` changes neither weights nor state.
"""

from collections.abc import Collection, Iterable
import math
from typing import Annotated, Any, Literal

from pydantic import Field
import torch
from torch import Tensor, nn

from cloche.config import Frozen
from cloche.training.precision import bf16_is_native
from cloche.words import _

Decay = Annotated[float, Field(ge=0, lt=1)]
Parameters = list[nn.Parameter]
Inner = Collection[nn.Parameter] | None  # the matrices inside the nets; None: all matrices


class OptimConfig(Frozen):
    """Keys of every `[optim]` table."""

    lr: float = Field(1e-3, gt=0, description=_("the learning rate"))
    weight_decay: float = Field(0.0, ge=0, description=_("how strongly weights are pulled to zero"))
    schedule: Literal["constant", "cosine", "onecycle"] = Field("constant", description=_("how the learning rate moves over the run"))
    warmup: float = Field(0.0, ge=0, lt=1, description=_("share of the run in which the learning rate rises (onecycle: 0 means 0.3)"))
    clip: float = Field(0.0, ge=0, description=_("largest gradient norm; 0 for no limit"))

    def factor(self, progress: float) -> float:
        """What the learning rate is multiplied by after `progress` (0..1) of the run: a pure function of the place."""
        rise = self.warmup or (0.3 if self.schedule == "onecycle" else 0.0)
        floor = 0.04 if self.schedule == "onecycle" else 0.0
        if progress < rise:
            done = progress / rise
            return floor + (1 - floor) * (done if self.schedule != "onecycle" else (1 - math.cos(math.pi * done)) / 2)
        if self.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2


class SgdConfig(OptimConfig):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.05, gt=0, description=_("the learning rate"))
    momentum: Decay = Field(0.9, description=_("how much of the last step is kept"))

    def build(self, parameters: Parameters, inner: Inner = None) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)


class RmspropConfig(OptimConfig):
    kind: Literal["rmsprop"] = "rmsprop"
    decay: Decay = Field(0.99, description=_("memory of the mean of squared gradients"))

    def build(self, parameters: Parameters, inner: Inner = None) -> torch.optim.Optimizer:
        return RmsProp(parameters, self.lr, self.decay, self.weight_decay)


class AdamConfig(OptimConfig):
    kind: Literal["adam"] = "adam"
    beta1: Decay = Field(0.9, description=_("memory of the mean gradient"))
    beta2: Decay = Field(0.999, description=_("memory of the mean of squared gradients"))

    def build(self, parameters: Parameters, inner: Inner = None) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.lr, (self.beta1, self.beta2), weight_decay=self.weight_decay, fused=True)


class AdamwConfig(OptimConfig):
    """Decays matrices and kernels only, not biases and gains."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0, description=_("how strongly weights are pulled to zero"))
    beta1: Decay = Field(0.9, description=_("memory of the mean gradient"))
    beta2: Decay = Field(0.999, description=_("memory of the mean of squared gradients"))

    def build(self, parameters: Parameters, inner: Inner = None) -> torch.optim.Optimizer:
        return torch.optim.AdamW(decayed(parameters), self.lr, (self.beta1, self.beta2), weight_decay=self.weight_decay, fused=True)


class MuonConfig(AdamwConfig):
    """Orthogonal steps for the matrices and kernels inside a net, AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    momentum: Decay = Field(0.95, description=_("how much of the last step is kept"))
    ratio: float = Field(1.0, gt=0, description=_("learning rate of embeddings, biases, gains and the last layer, in times of optim.lr"))

    def build(self, parameters: Parameters, inner: Inner = None) -> torch.optim.Optimizer:
        inside = {p: p.ndim > 1 and (inner is None or p in inner) for p in parameters}
        return Muon([p for p in parameters if inside[p]], [p for p in parameters if not inside[p]], self)


def decayed(parameters: Parameters) -> list[dict[str, Any]]:
    """Groups of which matrices and kernels decay, biases and gains do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def inner_of(nets: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The matrices and kernels inside nets: no embeddings, and not the layer that answers: `net.head`, else the last that has a matrix."""
    out = set()
    for net in nets:
        own = {m: {p for p in m.parameters(recurse=False) if p.ndim > 1} for m in net.modules()}
        head = getattr(net, "head", next((m for m in reversed(own) if own[m]), None))
        apart = {m for m in own if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        apart |= set(head.modules()) if isinstance(head, nn.Module) else set()
        out |= set().union(*own.values()) - set().union(*(own[m] for m in apart))
    return out


class RmsProp(torch.optim.Optimizer):
    """v ← d·v + (1−d)·g²; w ← w − lr·g / (√v + ε). torch's own is not fused and cannot be told of a non-finite gradient.

    Source: T. Tieleman & G. Hinton 2012, lecture 6.5; ε as in torch.optim.RMSprop.
    """

    def __init__(self, parameters: Parameters, lr: float, decay: float, weight_decay: float, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay, "weight_decay": weight_decay, "eps": eps})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                v = self.state[p].setdefault("square_avg", torch.zeros_like(p))
                g = p.grad.add(p, alpha=group["weight_decay"])
                new_v = v.mul(group["decay"]).addcmul_(g, g, value=1 - group["decay"])
                new_p = p.addcdiv(g, new_v.sqrt().add_(group["eps"]), value=-group["lr"])
                settle(v, new_v, self.found_inf)
                settle(p, new_p, self.found_inf)


class Muon(torch.optim.Optimizer):
    """m ← μ·m + (1−μ)·g; w ← (1 − lr·λ)·w − lr · 0.2·√max(a, b) · orthogonal(μ·m + (1−μ)·g) for matrices (a, b), AdamW for the rest.

    A kernel is the matrix (out, in·k·k). 0.2·√max(a, b) makes a step as long as AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4),
    so that one lr, found for AdamW or not, serves both. torch.optim.Muon takes matrices only, one by one and always in bf16, which most
    CPUs emulate, and cannot be told of a non-finite gradient. Here those of a shape are multiplied together.

    Source: K. Jordan 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, inside: Parameters, rest: Parameters, config: MuonConfig) -> None:
        self.config, self.found_inf = config, None
        keys = {"lr": config.lr, "weight_decay": config.weight_decay}
        self.adamw = torch.optim.AdamW(decayed(rest), betas=(config.beta1, config.beta2), fused=True, **keys)
        super().__init__([{"params": inside, **keys}, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self) -> None:
        (inside, *rest), alike = self.param_groups, {}
        for p in inside["params"]:
            if p.grad is not None:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                alike.setdefault(p.flatten(1).shape, []).append(p)
        lr, keep = inside["lr"], self.config.momentum
        for shape, some in alike.items():
            g = torch.stack([p.grad.flatten(1) for p in some])  # (N, a, b)
            m = torch.stack([self.state[p]["momentum_buffer"].flatten(1) for p in some]).lerp_(g, 1 - keep)
            steps = orthogonal(g.lerp_(m, keep), torch.bfloat16 if bf16_is_native(g.device) else g.dtype)
            for p, new_m, step in zip(some, m, steps, strict=True):
                new_p = p.mul(1 - lr * inside["weight_decay"]).add_(step.reshape(p.shape), alpha=-lr * 0.2 * max(shape) ** 0.5)
                settle(self.state[p]["momentum_buffer"], new_m.view(p.shape), self.found_inf)
                settle(p, new_p, self.found_inf)
        self.adamw.state, self.adamw.found_inf = self.state, self.found_inf
        self.adamw.param_groups = [{**group, "lr": group["lr"] * self.config.ratio} for group in rest]
        self.adamw.step()


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, a, b) → each with singular values near 1 (0.7 … 1.2) and its own singular vectors, by five Newton–Schulz steps in `dtype`."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).to(dtype)
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _step in range(5):
        s = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.mT if tall else y


def settle(t: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """t ← new, unless the flag is up."""
    t.copy_(new if found_inf is None else torch.where(found_inf == 0, new, t))


OPTIMS = {"adam": AdamConfig, "adamw": AdamwConfig, "muon": MuonConfig, "sgd": SgdConfig, "rmsprop": RmspropConfig}
