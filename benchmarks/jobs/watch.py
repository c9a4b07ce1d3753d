"""What every peer's program measures, in one place. Imported before anything heavy: where there is no /proc, seconds count from here."""

import argparse
import json
import os
from pathlib import Path
import statistics
import time

SCRIPT_T0 = time.perf_counter()
FIRST_TIMED_STEP = 10  # steps count from 1; the first few are slow on every side (page faults, kernel choice)


def since_process_start() -> tuple[float, str]:
    """Seconds since the interpreter's process began, and from where they count (where there is no /proc: this file's first line)."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK"), "process"
    except (OSError, AttributeError):
        return time.perf_counter() - SCRIPT_T0, "script"


class Watch:
    """Made before the first batch is loaded, told of the end of each step: a step's time holds the loading of its batch."""

    def __init__(self) -> None:
        self.ends_s = [time.perf_counter()]
        self.cold = (0.0, "")

    def step(self) -> None:
        self.ends_s.append(time.perf_counter())
        if len(self.ends_s) == 2:
            self.cold = since_process_start()

    def figures(self, per_step: float, losses: list[float], unit: str = "images") -> dict:
        """{unit}_per_s from the median of the steps from FIRST_TIMED_STEP on, of per_step units each; the mean loss of those steps."""
        step_s = [b - a for a, b in zip(self.ends_s, self.ends_s[1:], strict=False)]
        typical_s = statistics.median(step_s[FIRST_TIMED_STEP - 1 :])
        return {
            f"{unit}_per_s": per_step / typical_s,
            "ms_per_step": 1000 * typical_s,
            "cold_s": self.cold[0],
            "cold_from": self.cold[1],
            "loss": statistics.mean(float(loss) for loss in losses[FIRST_TIMED_STEP - 1 :]),
            "steps": len(step_s),
        }


def arguments(about: str, tuned: str) -> argparse.Namespace:
    """DATA STEPS [--tuned], for programs that train on pictures or text in a folder or file."""
    p = argparse.ArgumentParser(description=about.splitlines()[0])
    p.add_argument("data", type=Path)
    p.add_argument("steps", type=int, help=f"more than {FIRST_TIMED_STEP}: the median is over the steps from the {FIRST_TIMED_STEP}th")
    p.add_argument("--tuned", action="store_true", help=tuned)
    o = p.parse_args()
    if o.steps <= FIRST_TIMED_STEP:
        p.error(f"STEPS is {o.steps}; give more than {FIRST_TIMED_STEP}, the steps before are not timed")
    return o


def tell(figures: dict, unit: str = "images") -> None:
    """A line for people and one of JSON."""
    rate, ms, loss, cold_s = (figures[k] for k in (f"{unit}_per_s", "ms_per_step", "loss", "cold_s"))
    print(f"{rate:.1f} {unit}/s, {ms:.1f} ms a step, loss {loss:.3f}, first step after {cold_s:.1f} s")
    print(json.dumps(figures))
