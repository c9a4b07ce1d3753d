"""This machine's limits in a few seconds: matrix products in float32 and bfloat16, a copy in memory. Prints JSON.

    python benchmarks/limits.py

Each figure is the best of several tries: a limit is what the machine can do, not what it did while others used it. Run beside
every benchmark: on a shared machine the same product was seen at 883 and, minutes later, at 180 GFLOP/s.
"""

from collections.abc import Callable
import json
import os
import time

import torch

TRY_S = 0.3  # a figure's tries last at least this long
COPY_BYTES = 256 << 20  # far above any cache


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of at least three calls after one unmeasured call."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    wait()
    tries, end = [], time.perf_counter() + TRY_S
    while len(tries) < 3 or time.perf_counter() < end:
        t0 = time.perf_counter()
        work()
        wait()
        tries.append(time.perf_counter() - t0)
    return min(tries)


def matmul_gflop_per_s(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """An (n, n) by (n, n) product: 2·n³ operations."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / best_s(lambda: torch.mm(a, b, out=out)) / 1e9


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_s(lambda: target.copy_(source)) / 1e9


def limits() -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [(name, n, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) for n in (1024, 2048)]
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "matmul_gflop_per_s": {f"{name}_{n}": round(matmul_gflop_per_s(n, dtype, device), 1) for name, n, dtype in sizes},
        "copy_gb_per_s": round(copy_gb_per_s(device), 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    print(json.dumps(limits()))
