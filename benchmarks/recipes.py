"""Re-run every shipped recipe and hold it to its [expect]: the figure to its bound, the seconds to three times theirs.

    python benchmarks/recipes.py [--data FOLDER] [--only NAME ...] [--out FOLDER]

FOLDER holds mnist/ and fashion-mnist/; a recipe whose data is absent is printed as "not run". Exit code 1 when one falls short.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time
import tomllib

from cloche.data.read.builtin import BUILTIN

RECIPES = Path(__file__).parent.parent / "cloche" / "recipes"


def run(path: Path, data: Path, out: Path) -> tuple[bool | None, str]:
    """One recipe in a process of its own: (held, what happened); None where it could not run."""
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    name, source = path.stem, recipe["data"]["source"]
    command = [sys.executable, "-m", "cloche", "train", name, "--json", "--out", str(out / name)]
    if source not in BUILTIN:  # a folder that the person brings
        if not (data / source).is_dir():
            return None, f"not run: needs {source} (--data FOLDER)"
        command += ["--data", str(data / source)]
    t0 = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    dt_s = time.perf_counter() - t0
    if done.returncode:
        return False, f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    found, bound, faults = json.loads(done.stdout), recipe["expect"], []
    value = found["metrics"][bound["metric"]]
    low, high = found["interval"]
    told = f"{bound['metric']} {value:.4f}" + (f" ({low:.4f} to {high:.4f})" if low is not None else "")
    told += f", n = {found['n']}, seed {found['seed']}; " + "; ".join(f"{k}: {v:.4f}" for k, v in (found["baselines"] or {}).items())
    if not bound.get("at_least", -1e9) <= value <= bound.get("at_most", 1e9):
        faults.append(f"outside {bound}")
    if found["n"] != bound.get("n", found["n"]):
        faults.append(f"n is {found['n']}, not {bound['n']}")
    if dt_s > 3 * recipe["expect"]["seconds"]:
        faults.append(f"{dt_s:.0f} s is over three times {recipe['expect']['seconds']} s")
    return not faults, f"{told}   {dt_s:.0f} s   {'; '.join(faults)}".rstrip()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, default=Path("data"))
    p.add_argument("--only", nargs="*")
    p.add_argument("--out", type=Path)
    o = p.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for path in sorted(RECIPES.glob("*.toml")):
            if o.only and path.stem not in o.only:
                continue
            held, told = run(path, o.data, o.out or Path(temporary))
            failed += held is False
            print(f"{'held  ' if held else 'FAILED' if held is False else '-     '} {path.stem:<20} {told}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
