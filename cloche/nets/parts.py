"""What two nets share: activations by name, dropout, one matrix for input and output, batch normalisation over a chunk."""

from typing import Literal

import torch
from torch import Tensor, nn
import torch.nn.functional as F

Activation = Literal["relu", "sigmoid", "tanh", "softmax", "gelu", "silu"]

ACTIVATIONS = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(1),  # over the channels
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class Dropout(nn.Dropout):
    """While training each value is 0 with probability p, the others are divided by 1 - p.

    torch's own draws one number a value on a CPU: 12 ms for the primer's (64, 18 432), a seventh of its step. Here four values share a
    64-bit draw, 16 bits each: 1.6 ms; the share that is dropped is p to 1/65 536.
    Source: Srivastava et al. 2014, "Dropout", JMLR 15.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        mask = draws.view(torch.int16)[: x.numel()].view(x.shape) < round((1 - self.p) * 65536) - 32768
        return x * mask.to(x.dtype).div_(1 - self.p)


class Tied(nn.Embedding):
    """Rows that stand for tokens on the way in and, multiplied with, tell the next one on the way out.

    Source: Press & Wolf 2017, "Using the output embedding to improve language models", arXiv 1608.05859.
    """

    def logits(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, C) → (…, V)."""
        return F.linear(x, self.weight, bias)


class BatchNorm(nn.Module):
    """Batch normalisation over a chunk; fillers never enter.

    Training: y = (x - mean) / sqrt(var + eps) · weight + bias, mean and var over the chunk's real rows (and places).
    Evaluation: the running mean and var. These move once a step, by the average over the step's chunks, when the loop calls
    `commit`: so accumulation changes only how many rows a mean is taken over, not how fast the statistics move. One chunk a
    step gives torch.nn.BatchNorm1d/2d exactly.

    Args: channels: C of an input (B, C) or (B, C, h, w). Raises: ValueError for a chunk with one value a channel.
    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("seen", torch.zeros(2, channels), persistent=False)  # sums of this step's chunk means and variances
        self.register_buffer("chunks", torch.zeros(()), persistent=False)
        self.rows: Tensor | None = None  # (B,) weights of the chunk when it holds fillers; the loop sets it

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        over, places = [0, *range(2, x.ndim)], x[0, 0].numel()
        if self.rows is None:
            if len(x) * places < 2:
                raise ValueError("batch normalisation needs at least two values a channel; this chunk has one")
            here = torch.zeros_like(self.seen)  # which takes the chunk's mean and variance: no second pass over x for them
            y = F.batch_norm(x, *here, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            self._saw(here)
            return y
        column = (-1, *(1,) * (x.ndim - 2))  # (C, 1, 1) for pictures
        w, n = self.rows.view(-1, *(1,) * (x.ndim - 1)), self.rows.sum() * places
        mean = ((x.float() * w).sum(over) / n).view(column)
        var = ((x.float() - mean).square() * w).sum(over) / n
        self._saw(torch.stack([mean.flatten(), var * n / (n - 1).clamp(min=1)]))
        y = (x.float() - mean) * torch.rsqrt(var.view(column) + self.eps)
        return (y * self.weight.view(column) + self.bias.view(column)).to(x.dtype)

    @torch.no_grad()
    def _saw(self, here: Tensor) -> None:
        self.seen += here
        self.chunks += 1

    @torch.no_grad()
    def commit(self, ok: Tensor) -> None:
        """Move the running statistics by the average over the step's chunks; not where `ok` () is 0."""
        mean, var = self.seen / self.chunks.clamp(min=1)
        by = self.momentum * ok * (self.chunks > 0)
        self.running_mean += torch.where(by > 0, by * (mean - self.running_mean), 0.0)
        self.running_var += torch.where(by > 0, by * (var - self.running_var), 0.0)
        self.forget()

    def forget(self) -> None:
        """Drop what this step has summed up."""
        self.seen.zero_()
        self.chunks.zero_()
