"""Number format, memory layout and matrix kernel of a run: chosen once by a short trial, then written down and only read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import copy
from dataclasses import dataclass, replace
import time
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.data.chunk import Chunk
from cloche.nets.parts import Tied
from cloche.tasks.metrics import Nets

LAYOUTS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Precision:
    """dtype: "fp32" or "bf16" (autocast; weights, logits and losses stay float32). layout: of pictures and kernels.

    matmul: what multiplies float32 matrices on a CPU, "default" or "onednn", which is up to three times as fast on some.
    """

    dtype: str = "fp32"
    layout: str = "plain"
    matmul: str = "default"

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        with self.products(), torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            yield

    @contextmanager
    def products(self) -> Iterator[None]:
        """Within it float32 matrices are multiplied by `matmul`, in backward passes too."""
        if self.matmul == "default":
            yield
            return
        before, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before

    def place(self, chunk: Chunk) -> Chunk:
        """Pictures (B, C, h, w) in this layout; all else as it is."""
        layout = LAYOUTS[self.layout]
        return replace(chunk, data={k: t.contiguous(memory_format=layout) if t.ndim == 4 else t for k, t in chunk.data.items()})

    def apply(self, nets: Nets) -> None:
        for net in nets.values():
            net.to(memory_format=LAYOUTS[self.layout])

    def pack(self, net: nn.Module, device: torch.device) -> None:
        """Lay out the matrices of a net that will only answer, a row at a time, so that a product is as fast as they can be read.

        Autocast writes them anew in bfloat16 for every token, and on a CPU the kernel then reorders them: 65 ms a token at 124 M
        parameters on one core, 15 packed. The answers are the same. The net can neither be trained nor copied afterwards.
        """
        if self.dtype != "bf16" or not bf16_is_native(device):
            return
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = _product(layer.weight, layer.bias, device)
            elif isinstance(layer, Tied):
                layer.logits = _product(layer.weight, None, device)


def _product(weight: Tensor, bias: Tensor | None, device: torch.device) -> Callable[..., Tensor]:
    """x (…, C), and a bias where it is not that of the layer → x · weightᵀ + bias, (…, V) bfloat16."""
    weight, own = weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()
    if device.type != "cpu":
        return lambda x, bias=own: F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda x, bias=own: torch.ops.mkldnn._linear_pointwise(
        x.to(weight.dtype), packed, None if bias is None else bias.to(weight.dtype), "none", [], ""
    )


def bf16_is_native(device: torch.device) -> bool:
    """Whether the chip multiplies bfloat16 itself: elsewhere autocast is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_is_exact() -> bool:
    """Whether oneDNN, when it may round float32 products to bfloat16, still multiplies in float32: a CPU with tiles for them would not.

    The error of one product against float64: 4e-7 where it is exact (1e-6 allowed), 3e-3 where it is not.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")):
        return False
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    with Precision(matmul="onednn").products():
        found = a @ b
    exact = a.double() @ b.double()
    return float((found - exact).norm() / exact.norm()) < 1e-6


def trial(nets: Nets, task: Any, chunk: Chunk, asked: Precision, rounds: int = 3) -> tuple[Precision, dict[str, float]]:
    """Time one forward and backward pass in each allowed combination, and take the fastest.

    Args:
        asked: "auto" in it leaves the choice to the trial; anything else is kept.
    Returns: the choice, and seconds a pass by "dtype layout matmul".
    """
    device, dtype, layout, matmul = chunk.weight.device, asked.dtype, asked.layout, asked.matmul
    matmuls = [matmul] if matmul != "auto" else ["default", "onednn"] if device.type == "cpu" and onednn_is_exact() else ["default"]
    dtypes = [dtype] if dtype != "auto" else ["fp32", "bf16"] if bf16_is_native(device) else ["fp32"]
    pictures = any(t.ndim == 4 for t in chunk.data.values())
    layouts = [layout] if layout != "auto" else list(LAYOUTS) if pictures else ["plain"]
    # in bf16 few products of float32 are left: not worth a trial of their own
    choices = [Precision(d, where, by) for d in dtypes for where in layouts for by in (matmuls if d == "fp32" else matmuls[:1])]
    if len(choices) == 1:
        return choices[0], {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seconds, least = {}, float("inf")
        for p in reversed(choices):  # those that most often win come first: what is twice as slow needs no second pass
            seconds[p] = _time(nets, task, chunk, p, rounds, 2 * least)
            least = min(least, seconds[p])
    return min(choices, key=seconds.__getitem__), {f"{p.dtype} {p.layout} {p.matmul}": round(s, 5) for p, s in seconds.items()}


def _time(nets: Nets, task: Any, chunk: Chunk, precision: Precision, rounds: int, enough: float) -> float:
    """Best of a few passes on a copy of the nets; the first builds kernels and counts only if it took longer than `enough` + 50 ms."""
    mine, best = {k: copy.deepcopy(n).train() for k, n in nets.items()}, float("inf")
    precision.apply(mine)
    chunk = precision.place(chunk)
    for i in range(rounds):
        t0 = time.perf_counter()
        with precision.products():
            with precision.autocast(chunk.weight.device):
                total, _carry, _seen = task.loss(mine, chunk, None)
            total.backward()
            _finish(total)
        dt_s = time.perf_counter() - t0
        if i == 0 and dt_s - 0.05 > enough:
            return dt_s
        best = min(best, dt_s) if i else best
    return best


def _finish(t: Tensor) -> None:
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
