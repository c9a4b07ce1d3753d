"""The primer's job to its end: five epochs of the script as shipped, the test accuracy after each. A long baseline, run once.

    .bench/venv/bin/python benchmarks/jobs/primer_epochs.py DATA [--epochs 5] [--seed 0] > benchmarks/results/primer_epochs.json

Seconds of training and of testing are apart; `cpu_s` beside `train_s` tells how much of the machine it had.
"""

import argparse
import json
import os
from pathlib import Path
import sys
import time

from primer_job import BATCH, Mnist, Net, loader, read_idx
import torch
from torch import nn
from torch.utils.data import DataLoader


def test_loader(folder: Path, train: DataLoader) -> DataLoader:
    """The test pictures, prepared as the training ones but for rotation and jitter."""
    steps = [t for t in train.dataset.transform.transforms if type(t).__name__ not in ("RandomRotation", "ColorJitter")]
    test = Mnist(folder, type(train.dataset.transform)(steps))
    test.x, test.y = (read_idx(folder / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return DataLoader(test, batch_size=BATCH)


def main() -> None:
    p = argparse.ArgumentParser(description="Five epochs of the primer's script, as shipped.")
    p.add_argument("data", type=Path, help="folder with MNIST's four IDX files (.gz)")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    torch.manual_seed(o.seed)
    batches, net, criterion, rows = loader(o.data), Net(classes=10), nn.CrossEntropyLoss(), []
    tests, optimizer = test_loader(o.data, batches), torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    for epoch in range(1, o.epochs + 1):
        t0, c0, total = time.perf_counter(), time.process_time(), 0.0
        net.train()
        for x, y in batches:
            loss = criterion(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        t1, c1, right = time.perf_counter(), time.process_time(), 0
        net.eval()
        with torch.no_grad():
            for x, y in tests:
                right += (net(x).argmax(1) == y).sum().item()
        rows.append({"epoch": epoch, "accuracy": right / len(tests.dataset), "loss": total / len(batches)})
        rows[-1] |= {"train_s": round(t1 - t0, 1), "cpu_s": round(c1 - c0, 1), "test_s": round(time.perf_counter() - t1, 1)}
        print(rows[-1], file=sys.stderr)
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(
        json.dumps(
            {"job": "the primer's script as shipped", "seed": o.seed, "steps": o.epochs * len(batches), **machine, "epochs": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
