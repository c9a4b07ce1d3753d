"""On one CUDA device: how fast cloche trains each family, beside the bounds of the H200. Ready to run; not run: needs a CUDA device.

    python benchmarks/gpu.py --data ../shared/data [--only primer exact gpt lstm unet]

DATA holds mnist/, tinyshakespeare.txt and openmoji/. Each is `cloche train` as a person starts it; --device cpu --steps 3 tries the
commands themselves, its figures mean nothing. Rates are those of the run's own
meter: steps from the 11th on ÷ their time, the device waited for at every line of the log; its share of the limit is of a bf16 matrix
product measured in the same process. The LSTM is compared with torch.nn.LSTM in a bare loop (jobs/lstm_bare.py), alternated.
"""

import argparse
from functools import partial
import json
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile

from families import PICTURES, SIDE, made, pictures

HERE = Path(__file__).resolve().parent
ALWAYS: dict[str, object] = {"train.device": "cuda"}
LSTM = {"tokens": "words", "vocabulary": 10_000, "window": 35}


def train(recipe: str, data: Path, **sets: object) -> dict:
    """The JSON of `cloche train`. Raises: SystemExit with its complaint."""
    words = [w for key, value in {**sets, **ALWAYS}.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "cloche", "train", recipe, "--data", str(data), *words, "--json", "--out", f"{out}/run"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def primer(data: Path) -> dict:
    """Bound: 300 000 images/s at batch 1024."""
    sets = {"train.batch": 1024, "train.steps": 600, "train.log_steps": 50}
    return {"bound": "images_per_s >= 300 000", "images_per_s": train("mnist", data / "mnist", **sets)["speed"]["examples_per_s"]}


def exact(data: Path) -> dict:
    """Bound: 4 690 steps of 64 in 5 s; evaluation, trial and store are not in it."""
    found = train("mnist", data / "mnist", **{"train.log_steps": 100})
    return {"bound": "training_s <= 5", "training_s": found["speed"]["training_s"], "accuracy": found["metrics"]["accuracy"]}


def gpt(data: Path) -> dict:
    """Bound: 45 % of the bf16 limit at the shape of GPT-2 124M."""
    sets = {"data.tokens": "bpe", "data.vocabulary": 50_304, "data.window": 1024, "net.width": 768, "net.layers": 12, "net.heads": 12}
    sets |= {"net.dropout": 0.0, "train.batch": 16, "train.steps": 60}
    speed = train("pydocs", data / "tinyshakespeare.txt", **sets)["speed"]
    return {"bound": "share >= 0.45", "share": speed["share_of_limit"], "tokens_per_s": 1024 * speed["examples_per_s"]}


def lstm(data: Path) -> dict:
    """Bound: 0.95 of torch.nn.LSTM in a bare loop, words a second, batch 20, 35 steps of time, 2 × 650."""
    sets = {f"data.{k}": v for k, v in LSTM.items()} | {"net.width": 650, "net.layers": 2, "train.batch": 20, "train.steps": 400}
    ratios = []
    for _round in range(5):
        bare = subprocess.run([sys.executable, str(HERE / "jobs" / "lstm_bare.py"), "400"], capture_output=True, text=True, check=True)
        own = train("pydocs-lstm", data / "tinyshakespeare.txt", **sets)["speed"]["examples_per_s"] * LSTM["window"]
        ratios.append(own / json.loads(bare.stdout)["words_per_s"])
    return {"bound": "ratio >= 0.95", "ratio": statistics.median(ratios), "ratios": ratios}


def unet(data: Path) -> dict:
    """Bound: 8 000 images/s, 35 M parameters, 32 × 32."""
    sets = {"data.pixels": 32, "net.width": 128, "net.mults": [1, 2, 2, 2], "train.batch": 256, "train.steps": 120}
    found = train("digits-diffusion", made(f"pictures-{PICTURES}-{SIDE}", partial(pictures, data)), **sets, **{"task.judge": ""})
    return {"bound": "images_per_s >= 8 000", "images_per_s": found["speed"]["examples_per_s"]}


MEASURES = {f.__name__: f for f in (primer, exact, gpt, lstm, unet)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    p.add_argument("--device", default="cuda")
    p.add_argument("--steps", type=int, help="in place of each measure's own")
    p.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    o = p.parse_args()
    import torch

    ALWAYS.update({"train.device": o.device} | ({"train.steps": o.steps} if o.steps else {}))
    if o.device != "cpu" and not torch.cuda.is_available():
        print("not run: needs a CUDA device")
        return
    result = {"device": o.device if o.device == "cpu" else torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in o.only:
        result[name] = MEASURES[name](o.data.resolve())
        o.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
