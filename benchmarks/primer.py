"""How fast the primer's job is in cloche and in the script that the primer has you write. One command, one file of results.

    python benchmarks/primer.py --data ../shared/data/mnist [--rounds 7]

Three comparisons in alternated processes: cloche with the script as shipped and with the same script tuned by hand, then cloche in float32
with the script as shipped, which is float32 too. The script runs in its own environment, .bench/venv, made at the first call. The machine's
limits are measured before and after; everything measured goes to benchmarks/results/primer.json. What is equal and what is not: README.md.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ab import Side
from compare import RESULTS, add, against, begun, cloche_side, holding, peer_side, told
from peers import environment

STEPS, BATCH = 60, 64
NEEDED = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
FIGURES = {"images_per_s": "images/s", "cold_s": "s to the end of the first step"}


def cloche_cnn(data: Path, steps: int, *options: str) -> Side:
    return cloche_side("mnist", steps, {"images_per_s": "speed.examples_per_s", "cold_s": "speed.cold_s"}, data, *options)


def gflop_per_image() -> float:
    """Training operations of the primer's net: three times the forward pass, less the gradient to the picture that nobody needs."""
    places = {"conv1": (9 * 3 * 32, 48 * 48), "conv2": (9 * 32 * 64, 48 * 48), "conv3": (9 * 64 * 128, 24 * 24)}
    forward = {name: 2 * weights * n for name, (weights, n) in places.items()} | {"fc1": 2 * 128 * 12 * 12 * 512, "fc2": 2 * 512 * 10}
    return (3 * sum(forward.values()) - forward["conv1"]) / 1e9


def measure(folder: Path | None, rounds: int, out: Path) -> None:
    """Raises: NotRun before anything is measured; Failed when a side gives no figure. What was finished is in the file."""
    data, gflop = holding(folder, NEEDED, "MNIST's IDX files"), gflop_per_image()
    python, versions = environment(job="primer_job")
    job = f"MNIST at 48 x 48 x 3, batch {BATCH}, median over steps 10 to {STEPS}; ratios above 1: cloche is better"
    result = begun(job, gflop_per_image=gflop)
    shipped = peer_side("the script as shipped", python, "primer_job", data, str(STEPS))
    tuned = peer_side("the script, tuned by hand", python, "primer_job", data, str(STEPS), "--tuned")
    exact = replace(cloche_cnn(data, STEPS, "--set", "train.precision=fp32"), name="cloche in float32")
    for peers, own in (([shipped, tuned], cloche_cnn(data, STEPS)), ([shipped], exact)):
        add(result, versions, against(peers, own, FIGURES, rounds, gflop, (data,)), out)
    print(f"all figures: {out}")


def main() -> None:
    p = argparse.ArgumentParser(description="The primer's job: cloche against the primer's script, as shipped and tuned by hand.")
    p.add_argument("--data", type=Path, help="folder with MNIST's IDX files (.gz)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, default=RESULTS / "primer.json")
    o = p.parse_args()
    if o.rounds < 1:
        p.error(f"--rounds is {o.rounds}; give 1 or more")
    told(lambda: measure(o.data, o.rounds, o.out))


if __name__ == "__main__":
    main()
