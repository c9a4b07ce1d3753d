"""How fast this machine can multiply, and how much of that a run used."""

import copy
import math
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cloche.data.chunk import Chunk
from cloche.tasks import Task
from cloche.tasks.metrics import Nets

if sys.platform == "win32":
    resource = None
else:
    import resource

Shape = tuple[int, ...]


aten = torch.ops.aten


def _lstm(x: Shape, w_ih: Shape, w_hh: Shape, *_rest: Any, out_shape: Any) -> int:
    return 2 * x[0] * x[1] * w_ih[0] * (w_ih[1] + w_hh[1])  # (T, B, I), (4H, I), (4H, H)


def _attention(q: Shape, k: Shape, *_rest: Any, out_shape: Any, **_named: Any) -> int:
    return 4 * math.prod(q) * k[2]  # q·kᵀ and then its softmax · v, (B, H, T, D) and (B, H, S, D)


def _twice(forward: Any) -> Any:
    return lambda *given, **named: 2 * forward(*given, **named)


# what PyTorch's counter does not know on a CPU; a backward pass counts as two forward passes
KERNELS = {
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: _twice(_lstm),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _twice(lambda _grad, q, k, *rest, **named: _attention(q, k, *rest, **named)),
}


def counter() -> FlopCounterMode:
    """Counts matrix products, convolutions, recurrent layers and attention; nothing else."""
    return FlopCounterMode(display=False, custom_mapping=KERNELS)


def flops_of(nets: Nets, task: Task, chunk: Chunk) -> float:
    """Floating-point operations of one row's forward and backward pass (a multiply and an add are two)."""
    mine: dict[str, nn.Module] = {k: copy.deepcopy(n).train() for k, n in nets.items()}
    with torch.random.fork_rng(devices=[]), counter() as counted:
        total, _carry, _seen = task.loss(mine, chunk, None)
        total.backward()
    return counted.get_total_flops() / len(chunk.ids)


def threads_for(flops: float, threads: int) -> int:
    """One thread for steps of less than a millisecond: with more, waiting for each other costs more than the work."""
    return 1 if flops < 1e8 else threads


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the device's memory, or of the machine's; 0 where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_limit(device: torch.device, rounds: int = 8) -> float:
    """Bytes a second that the best of a few copies read and wrote, of 128 MB that no cache holds."""
    a, best = torch.zeros(1 << 25, device=device), float("inf")
    b = torch.empty_like(a)
    for _ in range(rounds):
        t0 = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - t0)
    return 2 * a.nbytes / best


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
