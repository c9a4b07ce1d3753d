"""The primer's job in Keras, Lightning and transformers.Trainer, as shipped and tuned by hand, beside cloche.

    python benchmarks/frameworks.py --data ../shared/data/mnist [--rounds 7] [--only keras lightning trainer] [--steps 40]

A round plays a framework as shipped, the same tuned, and cloche, forwards and backwards in turn, so that both comparisons share
cloche's processes. All figures go to benchmarks/results/frameworks.json; what is equal and what is not: README.md.
"""

import argparse
from pathlib import Path

from compare import RESULTS, add, against, begun, holding, peer_side, told
from peers import NotRun, environment
from primer import BATCH, FIGURES, NEEDED, cloche_cnn, gflop_per_image

FRAMEWORKS = {  # name → (what pip installs, the program in benchmarks/jobs)
    "keras": (("keras",), "keras_cnn"),
    "lightning": (("lightning",), "lightning_cnn"),
    "trainer": (("transformers", "accelerate"), "trainer_cnn"),
}
ENV = {"KERAS_HOME": "{tmp}/keras", "HF_HOME": "{tmp}/hf", "HF_HUB_OFFLINE": "1"}  # nothing of a person's is read or written


def measure(folder: Path | None, names: list[str], steps: int, rounds: int, out: Path) -> None:
    """Raises: NotRun without the data; Failed when a side gives no figure. What was finished is in the file."""
    data, gflop = holding(folder, NEEDED, "MNIST's IDX files"), gflop_per_image()
    job = f"MNIST at 48 x 48 x 3, batch {BATCH}, median over steps 10 to {steps}; ratios above 1: cloche is better"
    result = begun(job, gflop_per_image=gflop)
    for name in names:
        packages, program = FRAMEWORKS[name]
        try:
            python, versions = environment(*packages, job=program)
        except NotRun as lack:  # the others go on
            print(f"{name} not run: needs {lack}")
            continue
        pair = ((f"{name} as shipped", ()), (f"{name}, tuned by hand", ("--tuned",)))
        peers = [peer_side(title, python, program, data, str(steps), *words, env=ENV) for title, words in pair]
        add(result, versions, against(peers, cloche_cnn(data, steps), FIGURES, rounds, gflop, (data,)), out)
    if result["comparisons"]:
        print(f"all figures: {out}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder with MNIST's IDX files (.gz)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--only", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    p.add_argument("--out", type=Path, default=RESULTS / "frameworks.json")
    o = p.parse_args()
    if o.rounds < 1 or not 20 < o.steps <= 900:
        p.error(f"--rounds is {o.rounds} and --steps {o.steps}; give at least one round, and 21 to 900 steps (Keras' steps of an epoch)")
    told(lambda: measure(o.data, o.only, o.steps, o.rounds, o.out))


if __name__ == "__main__":
    main()
