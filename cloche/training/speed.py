"""How fast this machine can multiply, and how much of that a run used."""

import copy
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cloche.data.chunk import Chunk
from cloche.tasks import Task
from cloche.tasks.metrics import Nets


def flops_of(nets: Nets, task: Task, chunk: Chunk) -> float:
    """Floating-point operations of one row's forward and backward pass (a multiply and an add are two).

    As PyTorch counts them: matrix products and convolutions, nothing else.
    """
    mine: dict[str, nn.Module] = {k: copy.deepcopy(n).train() for k, n in nets.items()}
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        total, _carry, _seen = task.loss(mine, chunk, None)
        total.backward()
    return counter.get_total_flops() / len(chunk.ids)


def threads_for(flops: float, threads: int) -> int:
    """One thread for steps of less than a millisecond: with more, waiting for each other costs more than the work."""
    return 1 if flops < 1e8 else threads


def limit_of(dtype: str, device: torch.device, n: int = 1024, rounds: int = 12) -> float:
    """FLOP/s of the best of a few n × n matrix products in this number format: what the machine can multiply now."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    n = n if device.type == "cpu" else 8192
    a, b = (torch.linspace(-1, 1, n * n, device=device).view(n, n).to(kind) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        t0 = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best
