"""kill -9 from outside, at any moment of the life of `cloche train`, over every shipped recipe made small; then the same command again.

After each kill all that stands is whole and nothing that was acknowledged is lost; at the end the bits are those of an unbroken run.
The moment is drawn uniformly over the time that an unbroken run takes; of the later kills of a chain some are drawn within the first
30 ms of a save or of a resume. The seed is printed: CLOCHE_SEED=… draws the same moments again.
"""

from collections import Counter
import os
from pathlib import Path
import random
import shutil
import subprocess
import sys
import time

from forked import NEEDS_DATA, SAVE, SMALL, Child, Family, Parent, whole
import pytest
from test_resume import bits

from cloche import files
from cloche.recipe import shipped
from cloche.training.run import OURS

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="not run: needs Linux")]
KILLED = -9
WITHIN_S = 0.03


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    made = Parent(tmp_path_factory.mktemp("parent"))
    yield made
    made.close()


@pytest.fixture
def chance():
    seed = int(os.environ.get("CLOCHE_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CLOCHE_SEED={seed}")
    return random.Random(seed)


class Unbroken:
    """A family, its run without a kill, and the seconds that this took."""

    def __init__(self, parent: Parent, name: str, folder: Path) -> None:
        self.parent, self.family, self.out = parent, Family(name), folder / "whole"
        for out in (folder / "first", self.out):  # the first one also makes the store
            child = parent.start([*self.family.command(out), *SAVE])
            assert child.end() == 0, child.said()
            self.seconds = time.monotonic() - child.t0
        assert bits(self.out) == bits(folder / "first")  # two unbroken runs, else nothing below means anything

    def start(self, out: Path) -> Child:
        return self.parent.start([*self.family.command(out), *SAVE])

    def killed(self, out: Path, aim: str, chance: random.Random) -> str:
        """Start the command and kill it. aim: any moment, or one word of the child. Returns where it was, or "" where it had ended."""
        child = self.start(out)
        if aim == "any":
            child.listen(chance.uniform(0, self.seconds))
        elif child.listen(120, aim, 1 if aim == "resume" else chance.randint(1, 3)):
            time.sleep(chance.uniform(0, WITHIN_S))
        code = child.end(9)
        assert code in (0, KILLED), child.said()
        saved = [int(w.split()[1]) for w in child.words if w.startswith("saved")]
        if (out / "manifest.json").exists():
            files.check_manifest(out, "cloche run")
        else:
            assert max(whole(out), default=-1) >= max(saved, default=-1), f"acknowledged and lost: {child.words[-3:]}"
        return child.where if code else ""


def chains(unbroken: Unbroken, folder: Path, kills: int, chance: random.Random, aims: dict[str, int], most: int = 3) -> Counter:
    """Chains of up to `most` kills until there were so many, each chain ended by the command left alone. Returns where they landed."""
    landed: Counter = Counter()
    n = 0
    while landed.total() < kills:
        n += 1
        out, left = folder / f"{unbroken.family.name}-{n}", chance.randint(1, most)
        while left and landed.total() < kills:
            resumes = bool(whole(out)) and not (out / "manifest.json").exists()
            aim = chance.choices([*aims], [w if k != "resume" or resumes else 0 for k, w in aims.items()])[0]
            where = unbroken.killed(out, aim, chance)
            if not where:
                break
            landed[where] += 1
            left -= 1
        child = unbroken.start(out)
        assert child.end() == 0, child.said()
        assert bits(out) == bits(unbroken.out), f"chain {n} of {unbroken.family.name}, {landed}"
        litter = {p.name for p in out.iterdir()} - {*OURS, ".lock"}
        assert not litter, litter
        shutil.rmtree(out)
    return landed


def test_every_recipe_that_needs_no_data_is_here():
    assert set(SMALL) | NEEDS_DATA == set(shipped())


@pytest.mark.parametrize("name", SMALL)
def test_killed_twice_at_any_moment(name, parent, chance, tmp_path):
    unbroken = Unbroken(parent, name, tmp_path)
    landed = chains(unbroken, tmp_path, 2, chance, {"any": 3, "save": 1, "resume": 2}, most=2)  # compares the bits of each chain's end
    assert landed.total() == 2 and set(landed) <= {"start-up", "loop", "save", "resume", "end"}, landed


def test_the_command_itself_killed_three_times(parent, chance, tmp_path):
    """No fork, nothing imported before, a cache of its own: the time from the start of Python to its end."""
    family, unbroken = Family("digits-mlp"), Unbroken(parent, "digits-mlp", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CLOCHE_CACHE": str(tmp_path / "cache")}

    def start(name: str) -> subprocess.Popen:
        words = [sys.executable, "-m", "cloche", *family.command(tmp_path / name), *SAVE]
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    t0 = time.monotonic()
    assert start("alone").wait(120) == 0
    dt_s, kills, n = time.monotonic() - t0, 0, 0
    assert bits(tmp_path / "alone") == bits(unbroken.out)
    shutil.rmtree(tmp_path / "cache")
    while kills < 3:
        n += (tmp_path / f"run-{n}" / "manifest.json").exists()
        process = start(f"run-{n}")
        time.sleep(chance.uniform(0, dt_s))
        process.kill()
        kills += process.wait() == KILLED
        whole(tmp_path / f"run-{n}")
    assert start(f"run-{n}").wait(120) == 0
    assert bits(tmp_path / f"run-{n}") == bits(unbroken.out)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_kills(parent, chance, tmp_path):
    """Some at any moment, the others drawn near saves and resumes; it goes on until enough of them have landed there."""
    landed: Counter = Counter()
    runs = {name: Unbroken(parent, name, tmp_path / name) for name in SMALL}
    while landed.total() < 100 or landed["save"] < 10 or landed["resume"] < 5:
        assert landed.total() < 300, f"too few saves and resumes were hit: {landed}"
        for name, unbroken in runs.items():
            landed += chains(unbroken, tmp_path / name, 3, chance, {"any": 2, "save": 2, "resume": 2})
    print("\n" + "\n".join(f"{where:10} {n:4} {'#' * n}" for where, n in landed.most_common()))
    print(f"{landed.total()} kills, all bits equal, nothing torn, nothing lost")
