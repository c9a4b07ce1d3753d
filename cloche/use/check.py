"""`cloche check`: what this machine can do, what of it cloche will use, and what would make it faster."""

import os
from pathlib import Path
import platform
import re
from typing import Any

import torch

from cloche import __version__, start
from cloche.training.precision import Precision, bf16_is_native, onednn_is_exact
from cloche.training.speed import copy_limit, limit_of
from cloche.words import _, _n, number, size


def check() -> tuple[dict[str, Any], str]:
    """Measured in about two seconds: matrix products in each format, copying of memory.

    Returns: {"cpu", "cores", "threads", "memory_bytes", "gpus", "torch", "cloche", "limits": FLOP/s by device and format and
        "copy" in bytes/s, "load", "advice"}; and it as text.
    """
    cpu, load = torch.device("cpu"), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    limits = {"fp32": limit_of("fp32", cpu)}
    if onednn_is_exact():
        with Precision(matmul="onednn").products():
            limits["fp32 onednn"] = limit_of("fp32", cpu)
    if bf16_is_native(cpu):
        limits["bf16"] = limit_of("bf16", cpu)
    limits["copy"] = copy_limit(cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for i in range(len(gpus)):
        device = torch.device("cuda", i)
        limits |= {f"cuda:{i} {kind}": limit_of(kind, device) for kind in ("fp32", "bf16")} | {f"cuda:{i} copy": copy_limit(device)}
    found = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "gpus": gpus,
        "torch": torch.__version__,
        "cloche": __version__,
        "limits": {k: round(v) for k, v in limits.items()},
        "load": round(load, 2),
        "allocator": start.tuned,
    }
    found["advice"] = _advice(found)
    return found, _text(found)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _advice(found: dict[str, Any]) -> list[str]:
    """What would make it faster; what is in force already is not said."""
    limits, cores, out = found["limits"], found["cores"], []
    if found["threads"] < cores:
        told = _("PyTorch uses {n} of {cores} cores: unset OMP_NUM_THREADS")
        out.append(told.format(n=found["threads"], cores=cores))
    if found["load"] > 0.5 * cores:
        out.append(_("other programs are using the cores (load {load}): end them, or measure again later").format(load=found["load"]))
    if not found["allocator"]:
        out.append(_("the memory allocator is the system's: on Linux with glibc cloche sets it, unless CLOCHE_ALLOCATOR=system"))
    if not found["gpus"] and "+cpu" in found["torch"] and Path("/proc/driver/nvidia").exists():
        out.append(_("there is an NVIDIA driver, but this PyTorch is built for the CPU: install the CUDA build"))
    if "bf16" not in limits and not found["gpus"]:
        out.append(_("this CPU does not multiply bfloat16: a GPU, or a CPU with AVX512-BF16 or AMX, would be several times as fast"))
    return out


def _text(found: dict[str, Any]) -> str:
    cores = _n("{n} core", "{n} cores", found["cores"]).format(n=found["cores"])
    memory = " · " + size(found["memory_bytes"]) if found["memory_bytes"] else ""
    names = {"fp32": "fp32", "fp32 onednn": _("fp32 by oneDNN, as exact"), "bf16": "bf16", "copy": _("copying memory")}
    rows = [(_("machine"), f"{found['cpu']} · {cores}{memory}"), *((_("device"), name) for name in found["gpus"])]
    rows += [("", f"PyTorch {found['torch']} · cloche {found['cloche']}")]
    for i, (key, value) in enumerate(found["limits"].items()):
        unit = _("{n} GB/s") if key.endswith("copy") else _("{n} GFLOP/s")
        rows.append((_("limits") if i == 0 else "", f"{names.get(key, key):<26}{unit.format(n=number(value / 1e9)):>16}"))
    advice = found["advice"] or [_("nothing to improve that cloche knows of; each run chooses its format by a short trial")]
    rows += [(_("faster") if i == 0 else "", text) for i, text in enumerate(advice)]
    return "\n".join(f"{name:<10} {text}".rstrip() for name, text in rows)
