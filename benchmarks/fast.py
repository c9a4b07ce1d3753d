"""How soon `cloche train mnist-fast` is as good as five epochs of the primer's script.

    python benchmarks/fast.py --data ../shared/data/mnist [--seeds 0 1 2]

cloche's time is the whole command's: start, reading the data into an empty cache, training, judging 10 000 test pictures, the report. The
script's is 300 000 pictures ÷ its rate as shipped in results/primer.json, without start and test; its accuracy is that of the five epochs
in results/primer_epochs.json, which were run once. Everything goes to benchmarks/results/fast.json. Exit code 1 where a seed is worse.
"""

import argparse
import json
from pathlib import Path
import statistics
import sys

from ab import Side, run
from compare import RESULTS, begun, holding, limits, told, write
from peers import ROOT, NotRun, last_object
from primer import NEEDED

PICTURES = 5 * 60_000
TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def baseline() -> dict:
    """The script's accuracy after five epochs and its seconds. Raises: NotRun where it was not measured."""
    files = [RESULTS / name for name in ("primer.json", "primer_epochs.json")]
    if lacking := [f.name for f in files if not f.exists()]:
        raise NotRun(f"{' and '.join(lacking)} in {RESULTS.relative_to(ROOT)}: make bench-primer, jobs/primer_epochs.py")
    primer, epochs = (json.loads(f.read_text()) for f in files)
    rate = primer["comparisons"][0]["figures"]["images_per_s"]["a_median"]
    return {"accuracy": epochs["epochs"][-1]["accuracy"], "epochs": epochs["epochs"], "images_per_s": rate, "seconds": PICTURES / rate}


def read(printed: str, folder: Path) -> dict:
    answer = last_object(printed)
    speed = {name: answer["speed"][name] for name in ("cold_s", "training_s", "examples_per_s")}
    return {"accuracy": answer["metrics"]["accuracy"], "interval": answer["interval"], **speed}


def measure(folder: Path | None, seeds: list[int], out: Path) -> bool:
    data, script = holding(folder, (*NEEDED, *TEST), "MNIST's four IDX files"), baseline()
    result = begun("cloche train mnist-fast, the whole command, beside five epochs of the primer's script", script=script)
    before, runs = limits(), []
    for seed in seeds:
        words = ("train", "mnist-fast", "--data", str(data), "--set", f"train.seed={seed}", "--json", "--out", "{tmp}/run")
        side = Side("cloche", (sys.executable, "-m", "cloche", *words), read, {"CLOCHE_CACHE": "{tmp}/cache"}, ROOT)
        runs.append({"seed": seed, **run(side)})
        print(f"seed {seed}: {runs[-1]['accuracy']:.2%} in {runs[-1]['wall_s']:.1f} s", flush=True)
    ratios = [script["seconds"] / r["wall_s"] for r in runs]
    held = all(r["accuracy"] >= script["accuracy"] for r in runs)
    result |= {"runs": runs, "limits": [before, limits()], "ratio": statistics.median(ratios), "ratios": ratios, "as_good": held}
    write(result, out)
    print(f"the script: {script['accuracy']:.2%} in {script['seconds']:.0f} s; cloche {min(ratios):.1f} to {max(ratios):.1f} times as soon")
    return held


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder with MNIST's IDX files (.gz)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=RESULTS / "fast.json")
    o = p.parse_args()
    told(lambda: measure(o.data, o.seeds, o.out))


if __name__ == "__main__":
    main()
