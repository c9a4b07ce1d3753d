"""What cloche's loop costs over a bare one, in CPU time, and what share of a run its checkpoints take.

    python benchmarks/loop.py --data ../shared/data/mnist [--rounds 7] [--only digits-mlp mnist saves]

Both loops get the same net, objective, optimizer, number format and chunks, all made before the clock starts, on one thread. The bare
one does a forward pass, a backward pass and an update, and nothing else; cloche's also seeds, counts, looks for numbers that are not
finite, keeps sums, writes the log and ends epochs. CPU time of the process, a step from the 10th on: what another tenant had counts
for neither. Exit code 1 when a bound is not held; all figures go to benchmarks/results/loop.json. README.md says more.
"""

import argparse
import json
from pathlib import Path
import sys
import tempfile

from ab import Failed, Side, alternate, compare, run
from compare import RESULTS, begun, holding, limits, plain, told, write
from peers import JOBS, ROOT, NotRun, last_object
from primer import NEEDED

STEPS = {"digits-mlp": 6000, "mnist": 60}  # some seconds of each
COST_AT_MOST = {"mnist": 1.04}  # times the bare loop's CPU seconds, the upper end of the interval
SAVING_AT_MOST = 0.01  # of the loop's time; the last checkpoint is left out, which is written whatever it costs


def side_of(name: str, recipe: str, steps: int, sets: dict[str, object], cache: str) -> Side:
    words = (name, recipe, str(steps), *(f"{key}={json.dumps(value)}" for key, value in sets.items()))
    env = {"CLOCHE_CACHE": cache, "PYTHONPATH": str(ROOT)}
    return Side(name, (sys.executable, str(JOBS / "loop_cloche.py"), *words), lambda printed, folder: last_object(printed), env, ROOT)


def cost(recipe: str, sets: dict[str, object], cache: str, rounds: int, hide: tuple[Path, ...]) -> dict:
    """Seconds a step of cloche's loop over those of the bare one: a ratio above 1 is what it costs more."""
    asked = run(side_of("try", recipe, 1, sets, cache))
    chosen = {key: value for key, value in asked.items() if key.startswith("train.")}
    pair = {key: side_of(name, recipe, STEPS[recipe], sets | chosen, cache) for key, name in (("a", "bare"), ("b", "cloche"))}
    before = limits()
    played = alternate(pair, rounds, say=lambda text: print(text, file=sys.stderr))
    figures = {name: compare(played, name, more_is_better=True) for name in ("cpu_s_per_step", "thread_s_per_step", "wall_s_per_step")}
    for found in figures.values():
        del found["best_ratio"]  # of the slowest processes, where less is better
    most = COST_AT_MOST.get(recipe)
    return {
        "recipe": recipe,
        "commands": {key: plain(side, hide) for key, side in pair.items()},
        "figures": figures,
        "at_most": most,
        "held": most is None or figures["cpu_s_per_step"]["high"] <= most,
        "limits": [before, limits()],
        "rounds": played,
    }


def saves(steps: int, sets: dict[str, object], cache: str, hide: tuple[Path, ...]) -> dict:
    """One long run of the primer's net, with checkpoints as cloche makes them by itself.

    Raises: Failed when it was too short to be due one.
    """
    side = side_of("saves", "mnist", steps, sets, cache)
    found = run(side)
    if found["saves"] < 2:
        raise Failed(f"no checkpoint was due in {found['run_s']:.0f} s: give more --steps than {steps}")
    share = found["saving_s"] * (found["saves"] - 1) / found["saves"] / found["run_s"]
    held = {"share": share, "at_most": SAVING_AT_MOST, "held": share <= SAVING_AT_MOST}
    return {"commands": {"b": plain(side, hide)}, **held, "share_with_the_last": found["saving_s"] / found["run_s"], "run": found}


def spoken(found: dict) -> str:
    bound = f", at most {found['at_most']}: {'held' if found['held'] else 'NOT held'}" if found["at_most"] else ""
    if "share" in found:
        return f"checkpoints: {found['share']:.2%} of {found['run']['run_s']:.0f} s ({found['run']['saves']} of them){bound}"
    f = found["figures"]["cpu_s_per_step"]
    pair = f"{1000 * f['b_median']:.3g} against {1000 * f['a_median']:.3g} ms CPU a step"
    return f"{found['recipe']}: {pair}: {f['ratio']:.3f}x (95 % interval {f['low']:.3f}-{f['high']:.3f}, {f['n']} rounds){bound}"


def measure(folder: Path | None, names: list[str], steps: int, rounds: int, out: Path) -> bool:
    """Whether all bounds were held. Raises: Failed when a side gives no figure. What was finished is in the file."""
    result = begun("cloche's loop beside a bare one on one thread; ratios above 1: cloche costs more")
    with tempfile.TemporaryDirectory() as cache:
        for name in names:
            try:
                data = holding(folder, NEEDED, "MNIST's IDX files") if name != "digits-mlp" else None
            except NotRun as lack:  # the others go on
                print(f"{name} not run: needs {lack}")
                continue
            sets, hide = ({"data": str(data)}, (data,)) if data else ({}, ())
            found = saves(steps, sets, cache, hide) if name == "saves" else cost(name, sets, cache, rounds, hide)
            result["comparisons"].append(found)
            write(result, out)
            print(spoken(found), flush=True)
    return all(found["held"] for found in result["comparisons"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder with MNIST's IDX files (.gz)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=2000, help="of the run whose checkpoints are timed: minutes")
    p.add_argument("--only", nargs="+", choices=(*STEPS, "saves"), default=[*STEPS, "saves"])
    p.add_argument("--out", type=Path, default=RESULTS / "loop.json")
    o = p.parse_args()
    if o.rounds < 1 or o.steps < 20:
        p.error(f"--rounds is {o.rounds} and --steps {o.steps}; give at least one round, and 20 steps")
    told(lambda: measure(o.data, o.only, o.steps, o.rounds, o.out))


if __name__ == "__main__":
    main()
