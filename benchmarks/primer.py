"""How fast the primer's job is in cloche and in the script that the primer has you write. One command, one file of results.

    python benchmarks/primer.py --data ../shared/data/mnist [--rounds 7]

Two comparisons, each in alternated processes: cloche with the script as shipped, and with the same script tuned by hand. The
script runs in its own environment, .bench/venv, made at the first call. The machine's limits are measured before and after
each comparison; everything measured goes to benchmarks/results/primer.json. What is equal and what is not: README.md.
"""

import argparse
from datetime import UTC, datetime
import json
import math
import os
from pathlib import Path
import platform
import re
import shlex
import subprocess
import sys
import tomllib

from ab import Failed, Side, alternate, compare

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".bench" / "venv"
STEPS, BATCH = 60, 64
NEEDED = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "LD_PRELOAD", "CLOCHE_ALLOCATOR")  # they change speed


class NotRun(Exception):
    """Something that the benchmark needs is not there; the text names it."""


# The peer's environment


def peer_python() -> tuple[Path, dict[str, str]]:
    """The peer's interpreter and its versions; makes the environment where it is absent or does not work.

    Raises: NotRun when torch or torchvision cannot be installed or imported.
    """
    python = VENV / "bin" / "python"
    try:
        return python, peer_versions(python)
    except (OSError, Failed):
        print(f"making the peer's environment in {VENV.relative_to(ROOT)} (about a minute)", file=sys.stderr)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [d for d in declared if re.match(r"[\w.-]+", d)[0] in ("torch", "numpy", "pillow")]  # the constraints that cloche has
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    try:
        checked(sys.executable, "-m", "venv", "--clear", VENV)
        checked(*pip, *wanted)
        torch = checked(python, "-c", "from importlib.metadata import version; print(version('torch'))").strip()
        minor = int(torch.split(".")[1]) + 15  # torch 2.11 goes with torchvision 0.26, 2.13 with 0.28
        # without dependencies: torchvision would bring the torch of its own build
        checked(*pip, "--no-deps", f"torchvision==0.{minor}.*")
        return python, peer_versions(python)
    except Failed as fault:
        raise NotRun(f"torch, numpy, pillow and torchvision in {VENV.relative_to(ROOT)}, and there {fault}") from None


def peer_versions(python: Path) -> dict[str, str]:
    """Imports the job for real, so that a torchvision that does not load is found here."""
    return json.loads(checked(python, "-c", "import json, primer_job; print(json.dumps(primer_job.versions()))", cwd=HERE))


def checked(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command printed. Raises: Failed with its last complaint."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice]"))]
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {complaints[-1] if complaints else 'no message'}")
    return done.stdout


# The two sides


def peer_side(python: Path, data: Path, tuned: bool) -> Side:
    command = (str(python), str(HERE / "primer_job.py"), str(data), str(STEPS), *(["--tuned"] if tuned else []))
    return Side("the script, tuned by hand" if tuned else "the script as shipped", command, read_peer, cwd=ROOT)


def cloche_side(data: Path) -> Side:
    """As a person starts it for the first time: no store of the data from an earlier run, hence the empty cache folder."""
    options = ("--data", str(data), "--set", f"train.steps={STEPS}", "--json", "--out", "{tmp}/run")
    command = (sys.executable, "-m", "cloche", "train", "mnist", *options)
    return Side("cloche", command, lambda out, tmp: read_cloche(out, tmp, data), {"CLOCHE_CACHE": "{tmp}/cache"}, ROOT)


def read_peer(printed: str, folder: Path) -> dict:
    return last_object(printed)


def read_cloche(printed: str, folder: Path, data: Path) -> dict:
    """The two figures under the peer's names, and the recipe that cloche resolved.

    Raises: Failed naming the key that is not there.
    """
    answer = last_object(printed)
    figures = {"images_per_s": positive(answer, "speed.examples_per_s"), "cold_s": positive(answer, "speed.cold_s")}
    recipe = {}
    if (folder / "run" / "recipe.toml").exists():
        text = (folder / "run" / "recipe.toml").read_text().replace(str(data), "DATA").replace(str(folder), "OUT")
        recipe = tomllib.loads(text)
    speed = {k: v for k, v in answer["speed"].items() if isinstance(v, int | float | str | bool)}
    return {**figures, "steps": answer.get("steps"), "speed": speed, "recipe": recipe}


def last_object(printed: str) -> dict:
    """The last JSON object that begins at the beginning of a line. Raises: Failed when there is none."""
    for start in reversed([m.start() for m in re.finditer(r"^\{", printed, re.MULTILINE)]):
        try:
            return json.JSONDecoder().raw_decode(printed, start)[0]
        except json.JSONDecodeError:
            continue
    raise Failed("stdout holds no JSON object")


def positive(answer: dict, path: str) -> float:
    """The number at a dotted path. Raises: Failed naming the path and what is there."""
    value = answer
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(value) if isinstance(value, dict) else repr(value)
            raise Failed(f"its JSON has no {path}: {key!r} is missing, there is {there or 'nothing'}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise Failed(f"{path} in its JSON is {value!r}, not a number above 0")
    return float(value)


# What was measured


def gflop_per_image() -> float:
    """Training operations of the primer's net: three times the forward pass, less the gradient to the picture that nobody needs."""
    places = {"conv1": (9 * 3 * 32, 48 * 48), "conv2": (9 * 32 * 64, 48 * 48), "conv3": (9 * 64 * 128, 24 * 24)}
    forward = {name: 2 * weights * n for name, (weights, n) in places.items()} | {"fc1": 2 * 128 * 12 * 12 * 512, "fc2": 2 * 512 * 10}
    return (3 * sum(forward.values()) - forward["conv1"]) / 1e9


def limits() -> dict:
    return json.loads(checked(sys.executable, HERE / "limits.py"))


def plain(side: Side, data: Path) -> str:
    """The command without this machine's paths."""
    text = shlex.join(side.command).replace(str(data), "DATA").replace(side.command[0], "python")
    return text.replace(f"{ROOT}/", "").replace("'{tmp}/run'", "OUT")


def against(peer: Side, cloche: Side, data: Path, rounds: int) -> dict:
    """One comparison: limits, rounds, ratios, and remarks where the work was not equal or not possible."""
    before = limits()
    played = alternate(peer, cloche, rounds, say=lambda text: print(text, file=sys.stderr))
    measured = [before, limits()]
    recipes = []  # cloche measures some settings itself, so that two runs may differ
    for r in played:
        for pair in (r, r["dropped"]):
            recipe = pair["b"].pop("recipe") if pair else None
            if recipe is not None and recipe not in recipes:
                recipes.append(recipe)
    figures = {"images_per_s": compare(played, "images_per_s", True), "cold_s": compare(played, "cold_s", False)}
    rates = {key: figures["images_per_s"][f"{key}_median"] * gflop_per_image() for key in "ab"}
    top = max(v for found in measured for v in found["matmul_gflop_per_s"].values())
    return {
        "a": peer.name,
        "b": cloche.name,
        "commands": {"a": plain(peer, data), "b": plain(cloche, data)},
        "figures": figures,
        "gflop_per_s": rates,
        "share_of_top_matmul": {key: rate / top for key, rate in rates.items()},
        "limits": measured,
        "remarks": remarks(played, recipes, rates, top),
        "recipes": recipes,
        "rounds": played,
    }


def remarks(played: list[dict], recipes: list[dict], rates: dict[str, float], top: float) -> list[str]:
    """What makes the comparison doubtful, in words."""
    found = []
    for steps in {r["b"]["steps"] for r in played} - {STEPS, None}:
        found.append(f"cloche trained {steps} steps, the script {STEPS}")
    for recipe in recipes:
        batch = recipe.get("train", {}).get("batch")
        if batch not in (None, BATCH):
            found.append(f"cloche's batch was {batch}, the script's {BATCH}")
    for key, rate in rates.items():
        if rate > top:
            found.append(f"side {key}: {rate:.0f} GFLOP/s is above the measured limit of {top:.0f}: skipped work, or a disturbed limit")
    if len(played) < 5:
        found.append(f"{len(played)} rounds: the interval says little below 5")
    return found


def hardware() -> dict:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "settings": {name: os.environ[name] if name != "LD_PRELOAD" else "set" for name in SETTINGS if name in os.environ},
    }


def cloche_versions() -> dict[str, str]:
    """Of the interpreter that runs cloche; importing torch here also brings its files into the page cache, as peer_versions did."""
    code = "import json, torch, numpy, PIL; print(json.dumps({m.__name__: m.__version__ for m in (torch, numpy, PIL)}))"
    found = json.loads(checked(sys.executable, "-c", code))
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return {"cloche": own, "python": platform.python_version(), "torch": found["torch"], "numpy": found["numpy"], "pillow": found["PIL"]}


def commit() -> str:
    """The commit measured, "+ changes" where files differ from it, "unknown" outside git."""
    try:
        changed = checked("git", "status", "--porcelain", "--", "cloche", "benchmarks/*.py")
        return checked("git", "rev-parse", "HEAD").strip() + (" + changes" if changed.strip() else "")
    except (OSError, Failed):
        return "unknown"


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)


def spoken(comparison: dict) -> str:
    lines = [f"cloche against {comparison['a']}:"]
    for name, unit in (("images_per_s", "images/s"), ("cold_s", "s to the end of the first step")):
        f = comparison["figures"][name]
        pair = f"{f['b_median']:.4g} against {f['a_median']:.4g} {unit}"
        lines.append(f"  {pair}: {f['ratio']:.2f}x (95 % interval {f['low']:.2f}-{f['high']:.2f}, {f['n']} rounds)")
    return "\n".join([*lines, *(f"  note: {text}" for text in comparison["remarks"])])


def measure(data: Path, rounds: int, out: Path) -> None:
    """Raises: NotRun before anything is measured; Failed when a side gives no figure. What was finished is in the file."""
    python, peer = peer_python()
    own = cloche_versions()
    result = {
        "job": f"MNIST at 48 x 48 x 3, batch {BATCH}, median over steps 10 to {STEPS}; ratios above 1: cloche is better",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"a": peer, "b": own},
        "same_torch": peer["torch"] == own["torch"],
        "gflop_per_image": gflop_per_image(),
        "load_average_at_start": os.getloadavg(),
        "comparisons": [],
    }
    if not result["same_torch"]:
        print(f"note: the script runs on torch {peer['torch']}, cloche on {own['torch']}", file=sys.stderr)
    for tuned in (False, True):
        result["comparisons"].append(against(peer_side(python, data, tuned), cloche_side(data), data, rounds))
        result["load_average_at_end"] = os.getloadavg()
        write(result, out)
        print(spoken(result["comparisons"][-1]))
    print(f"all figures: {out}")


def main() -> None:
    p = argparse.ArgumentParser(description="The primer's job: cloche against the primer's script, as shipped and tuned by hand.")
    p.add_argument("--data", type=Path, help="folder with MNIST's IDX files (.gz)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, default=HERE / "results" / "primer.json")
    o = p.parse_args()
    if o.rounds < 1:
        p.error(f"--rounds is {o.rounds}; give 1 or more")
    try:
        if o.data is None:
            raise NotRun("--data FOLDER, with MNIST's IDX files")
        lacking = [name for name in NEEDED if not (o.data / name).is_file()]
        if lacking:
            raise NotRun(f"{' and '.join(lacking)} in {o.data}")
        measure(o.data.resolve(), o.rounds, o.out)
    except NotRun as lack:
        print(f"not run: needs {lack}")
    except Failed as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
