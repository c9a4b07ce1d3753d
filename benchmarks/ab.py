"""Compares two commands fairly on a noisy machine: alternated processes, a ratio a round, median and bootstrap interval.

    python benchmarks/ab.py --a "CMD" --b "CMD" [--rounds 7] [--figure 'REGEX with one group'] [--json]

Without --figure the figure is wall seconds, and less is better; with it, the last match in what a command prints, for example
'([0-9.]+) images/s', and more is better. A ratio above 1 always means that b is better. {tmp} in a command becomes a fresh
folder that is removed after the process. Processes, not functions: allocator, threads and kernel caches are global to a process.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

STEADY_FRAC = 0.9  # of the cores of a side's best process; below it another tenant had the machine


class Failed(Exception):
    """A command that gave no figure; the text says which and why."""


@dataclass(frozen=True)
class Side:
    name: str
    command: tuple[str, ...]  # {tmp} in a part becomes the process's own folder, in an environment value too
    read: Callable[[str, Path], dict]  # (what it printed, its folder) → figures by name
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None


def run(side: Side) -> dict:
    """One process: its figures, with wall_s, cpu_s, cores (used on average), peak_rss_bytes and load_average.

    Raises: Failed when it ends with another code than 0 or prints no figure.
    """
    with tempfile.TemporaryDirectory() as tmp, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [part.replace("{tmp}", tmp) for part in side.command]
        env = os.environ | {k: v.replace("{tmp}", tmp) for k, v in side.env.items()}
        t0 = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=side.cwd)
        _pid, status, used = os.wait4(child.pid, 0)  # this process's own time and memory; subprocess gives neither
        wall_s = time.perf_counter() - t0
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        printed, complaints = out.read(), err.read()
        if child.returncode:
            raise Failed(f"{side.name} ended with {child.returncode}: {shlex.join(command)}\n{(printed + complaints)[-3000:]}")
        try:
            figures = side.read(printed, Path(tmp))
        except Failed as fault:
            raise Failed(f"{side.name}: {fault}\n{(printed + complaints)[-3000:]}") from None
    cpu_s = used.ru_utime + used.ru_stime
    return {
        **figures,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "cores": cpu_s / wall_s,
        "peak_rss_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "load_average": os.getloadavg()[0],
    }


def alternate(sides: dict[str, Side], rounds: int, say: Callable[[str], None] = lambda text: None) -> list[dict]:
    """A B, B A, A B, …, of three A B C, C B A, …: one {key: figures, …, "dropped"} a round.

    A round in which a side used less than STEADY_FRAC of the cores of its best process is played once more at the end; the
    first one then stands under "dropped", so that nothing measured is lost.
    """

    def play(i: int) -> dict:
        keys = list(sides)
        found = {key: run(sides[key]) for key in (keys if i % 2 == 0 else keys[::-1])}
        say(f"round {i + 1} of {rounds}: " + "   ".join(f"{side.name} {_short(found[key])}" for key, side in sides.items()))
        return {key: found[key] for key in keys} | {"dropped": None}

    played = [play(i) for i in range(rounds)]
    best = {key: max(r[key]["cores"] for r in played) for key in sides}
    for i, r in enumerate(played):
        if any(r[key]["cores"] < STEADY_FRAC * best[key] for key in sides):
            say(f"round {i + 1} was disturbed and is repeated")
            played[i] = play(i) | {"dropped": {key: r[key] for key in sides}}
    return played


def _short(figures: dict) -> str:
    first = next((f"{k} {v:.4g}, " for k, v in figures.items() if isinstance(v, float) and k != "wall_s"), "")
    return f"{first}{figures['wall_s']:.1f} s, {figures['cores']:.2f} cores"


def interval(ratios: list[float], draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def compare(rounds: list[dict], figure: str, more_is_better: bool) -> dict:
    """The median over rounds of the paired ratio, above 1 where b is better; `best_ratio` pairs each side's best instead."""
    a, b = ([r[key][figure] for r in rounds] for key in "ab")
    ratios = [y / x if more_is_better else x / y for x, y in zip(a, b, strict=True)]
    low, high = interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "n": len(ratios),
        "best_ratio": max(b) / max(a) if more_is_better else min(a) / min(b),
        "a_median": statistics.median(a),
        "b_median": statistics.median(b),
        "ratios": ratios,
    }


def match(pattern: str, printed: str) -> float:
    """The last match's one group as a number. Raises: Failed when there is none."""
    found = re.findall(pattern, printed)
    if not found:
        raise Failed(f"nothing printed matches {pattern!r}")
    return float(found[-1])


def main() -> None:
    p = argparse.ArgumentParser(description="Compares two commands in alternated processes.")
    p.add_argument("--a", required=True, help="the command to compare with")
    p.add_argument("--b", required=True, help="the command that is judged")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--figure", help="pattern with one group, more is better; without it wall seconds, less is better")
    p.add_argument("--json", action="store_true", help="one object with all rounds on stdout")
    o = p.parse_args()
    if o.rounds < 1:
        p.error(f"--rounds is {o.rounds}; give 1 or more")

    def read(printed: str, folder: Path) -> dict:
        return {"figure": match(o.figure, printed)} if o.figure else {}

    sides = {name: Side(name, tuple(shlex.split(command)), read) for name, command in (("a", o.a), ("b", o.b))}
    try:
        rounds = alternate(sides, o.rounds, say=lambda text: print(text, file=sys.stderr))
    except Failed as fault:
        sys.exit(str(fault))
    result = compare(rounds, "figure" if o.figure else "wall_s", more_is_better=bool(o.figure))
    if o.json:
        print(json.dumps({**result, "a": o.a, "b": o.b, "rounds": rounds}))
    else:
        print(f"b is {result['ratio']:.2f}x a (95 % interval {result['low']:.2f}-{result['high']:.2f}, {result['n']} rounds)")


if __name__ == "__main__":
    main()
