"""Optimizers and schedules: `[optim]`.

Every optimizer obeys `found_inf`, a flag on the device: where it is 1, `step` changes neither weights nor state.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
import torch
from torch import Tensor, nn

from cloche.config import Frozen
from cloche.words import _

Decay = Annotated[float, Field(ge=0, lt=1)]


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

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)


class RmspropConfig(OptimConfig):
    kind: Literal["rmsprop"] = "rmsprop"
    decay: Decay = Field(0.99, description=_("memory of the mean of squared gradients"))

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return RmsProp(parameters, self.lr, self.decay, self.weight_decay)


class AdamConfig(OptimConfig):
    kind: Literal["adam"] = "adam"
    beta1: Decay = Field(0.9, description=_("memory of the mean gradient"))
    beta2: Decay = Field(0.999, description=_("memory of the mean of squared gradients"))

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.lr, (self.beta1, self.beta2), weight_decay=self.weight_decay, fused=True)


class AdamwConfig(OptimConfig):
    """Decays matrices and kernels only, not biases and gains."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0, description=_("how strongly weights are pulled to zero"))
    beta1: Decay = Field(0.9, description=_("memory of the mean gradient"))
    beta2: Decay = Field(0.999, description=_("memory of the mean of squared gradients"))

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], self.lr, (self.beta1, self.beta2), weight_decay=self.weight_decay, fused=True
        )


class RmsProp(torch.optim.Optimizer):
    """v ← d·v + (1−d)·g²; w ← w − lr·g / (√v + ε). torch's own is not fused and cannot be told of a non-finite gradient.

    Source: T. Tieleman & G. Hinton 2012, lecture 6.5; ε as in torch.optim.RMSprop.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, decay: float, weight_decay: float, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay, "weight_decay": weight_decay, "eps": eps})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                v = state.setdefault("square_avg", torch.zeros_like(p))
                g = p.grad.add(p, alpha=group["weight_decay"])
                new_v = v.mul(group["decay"]).addcmul_(g, g, value=1 - group["decay"])
                new_p = p.addcdiv(g, new_v.sqrt().add_(group["eps"]), value=-group["lr"])
                ok = self.found_inf is None or self.found_inf == 0
                v.copy_(new_v if ok is True else torch.where(ok, new_v, v))
                p.copy_(new_p if ok is True else torch.where(ok, new_p, p))


OPTIMS = {"adam": AdamConfig, "adamw": AdamwConfig, "sgd": SgdConfig, "rmsprop": RmspropConfig}
