"""The primer's training job as the primer writes it: PIL transforms in a plain loader, float32, batch 64, plain Adam.

    python benchmarks/primer_job.py DATA STEPS [--tuned]

DATA is a folder with MNIST's IDX files (.gz). This is the peer that cloche is measured against, so nothing of cloche is
imported. --tuned is the same job after the fixes that a good hand would make in the script: bfloat16 autocast,
channels-last, fused Adam; the loader stays. Prints a line for people and one of JSON.
"""
# ruff: noqa: E402  (the clock starts before the heavy imports)

import argparse
from collections.abc import Iterator
import gzip
from importlib.metadata import version
import json
import os
from pathlib import Path
import statistics
import struct
import sys
import time

SCRIPT_T0 = time.perf_counter()

import numpy as np
from PIL import Image
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

# Where only torchvision's CUDA build is to be had, its compiled part does not load beside a CPU torch and the import fails at
# two absent operators. Declared here they need no implementation: no transform uses them. The failed try costs 4 ms.
try:
    from torchvision import transforms
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import transforms

BATCH, FIRST_TIMED_STEP = 64, 10  # steps count from 1; the first few are slow on every side (page faults, kernel choice)
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels


class Mnist(Dataset):
    def __init__(self, folder: Path, transform: transforms.Compose) -> None:
        self.x = read_idx(folder / "train-images-idx3-ubyte.gz")  # (n, h, w)
        self.y = read_idx(folder / "train-labels-idx1-ubyte.gz")  # (n,)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.x[i])), int(self.y[i])


def read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


class Net(nn.Module):
    """(B, 3, 48, 48) → (B, K); 9 536 074 parameters at ten classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(128 * 12 * 12, 512)
        self.fc2 = nn.Linear(512, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))  # (B, 32, 48, 48)
        x = self.pool(F.relu(self.conv2(x)))  # (B, 64, 24, 24)
        x = self.pool(F.relu(self.conv3(x)))  # (B, 128, 12, 12)
        x = self.dropout(torch.flatten(x, 1))  # (B, 18432)
        x = self.dropout(F.relu(self.fc1(x)))  # (B, 512)
        return self.fc2(x)  # (B, K)


def loader(folder: Path) -> DataLoader:
    prepare = transforms.Compose(
        [
            transforms.Resize((48, 48)),
            transforms.Grayscale(num_output_channels=3),
            transforms.RandomRotation(10),
            transforms.ColorJitter(brightness=0.2, contrast=0.2),
            transforms.ToTensor(),
            transforms.Normalize((MEAN,) * 3, (STD,) * 3),
        ]
    )
    return DataLoader(Mnist(folder, prepare), batch_size=BATCH, shuffle=True)


def endless(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def since_process_start() -> tuple[float, str]:
    """Seconds since the interpreter's process began, and from where they count (where there is no /proc: this file's first line)."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK"), "process"
    except (OSError, AttributeError):
        return time.perf_counter() - SCRIPT_T0, "script"


def train(folder: Path, steps: int, tuned: bool) -> dict:
    """Trains for `steps` batches and says how fast it went."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = loader(folder)
    net = Net(classes=10).to(device)
    if tuned:
        net = net.to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4, fused=tuned or None)
    net.train()
    step_s, losses, correct, total, cold = [], [], 0, 0, (0.0, "")
    t0 = time.perf_counter()
    for step, (x, y) in enumerate(endless(batches), 1):
        x, y = x.to(device), y.to(device)
        if tuned:
            x = x.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=tuned):
            logits = net(x)
            loss = criterion(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device, as the primer's progress bar does at every step
        correct += (logits.argmax(1) == y).sum().item()
        total += len(y)
        t1 = time.perf_counter()
        step_s.append(t1 - t0)  # the loader's share is in it
        t0 = t1
        if step == 1:
            cold = since_process_start()
        if step == steps:
            break
    typical_s = statistics.median(step_s[FIRST_TIMED_STEP - 1 :])
    return {
        "images_per_s": BATCH / typical_s,
        "ms_per_step": 1000 * typical_s,
        "cold_s": cold[0],
        "cold_from": cold[1],
        "loss": statistics.mean(losses[FIRST_TIMED_STEP - 1 :]),
        "accuracy": correct / total,
        "steps": steps,
        "batch": BATCH,
        "params": sum(p.numel() for p in net.parameters()),
        "tuned": tuned,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}


def main() -> None:
    p = argparse.ArgumentParser(description="The primer's training job, as the primer writes it.")
    p.add_argument("data", type=Path, help="folder with MNIST's IDX files (.gz)")
    p.add_argument("steps", type=int, help=f"more than {FIRST_TIMED_STEP}: the median is over the steps from the {FIRST_TIMED_STEP}th")
    p.add_argument("--tuned", action="store_true", help="bfloat16 autocast, channels-last, fused Adam; the same loader")
    o = p.parse_args()
    if o.steps <= FIRST_TIMED_STEP:
        p.error(f"STEPS is {o.steps}; give more than {FIRST_TIMED_STEP}, the steps before are not timed")
    r = train(o.data, o.steps, o.tuned)
    print(f"{r['images_per_s']:.1f} images/s, {r['ms_per_step']:.1f} ms a step, loss {r['loss']:.3f}, first step after {r['cold_s']:.1f} s")
    print(json.dumps(r))


if __name__ == "__main__":
    main()
