"""The primer's training job as the primer writes it: PIL transforms in a plain loader, float32, batch 64, plain Adam.

    python benchmarks/jobs/primer_job.py DATA STEPS [--tuned]

DATA is a folder with MNIST's IDX files (.gz). This is the peer that cloche is measured against, so nothing of cloche is
imported. --tuned is the same job after the fixes that a good hand would make in the script: bfloat16 autocast,
channels-last, fused Adam; the loader stays. Prints a line for people and one of JSON.
"""

from watch import Watch, arguments, tell  # isort: skip  (its clock starts before the heavy imports)

from collections.abc import Iterator
import gzip
from pathlib import Path
import struct
import sys

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

BATCH = 64
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
    watch, losses, correct, total = Watch(), [], 0, 0
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
        watch.step()
        if step == steps:
            break
    return watch.figures(BATCH, losses) | machine(net, tuned) | {"accuracy": correct / total}


def machine(net: nn.Module, tuned: bool) -> dict:
    """What makes two runs comparable."""
    params, device = sum(p.numel() for p in net.parameters()), next(net.parameters()).device.type
    return {"batch": BATCH, "params": params, "tuned": tuned, "device": device, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    o = arguments(__doc__, "bfloat16 autocast, channels-last, fused Adam; the same loader")
    tell(train(o.data, o.steps, o.tuned))
