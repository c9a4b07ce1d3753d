"""Several processes by torchrun: the same step whoever does its chunks; killed, stopped and silent ones."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import pytest
from test_families import SMALL
import torch

from cloche import cli
from cloche.build import facts_of, job_of, nets_of, open_data, task_of
from cloche.config import RecipeError
from cloche.recipe import change, find, parse
from cloche.training.parallel import Group

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not run: needs torchrun with gloo")
SMALL = SMALL | {
    "digits": ["data.pixels=12", "data.channels=1", "net.stages=[[4], [8]]", "net.hidden=16", 'net.norm="batch"', "train.steps=20"],
    "digits-resnet": ["data.pixels=8", "net.width=4", "net.blocks=[1, 1]", "data.augment.small=0.5", "train.steps=20"],
    "digits-rows": ["train.steps=20"],
    "digits-mlp": ["train.steps=20", "train.ema=0.9"],
}
EVERYWHERE = ("train.precision=fp32", "train.layout=plain", "train.matmul=default", "train.device=cpu")


def command(name: str, out: Path, *sets: str) -> list[str]:
    return ["train", f"recipe:{name}", "--out", str(out), *(w for s in (*EVERYWHERE, *SMALL.get(name, ()), *sets) for w in ("--set", s))]


def torchrun(n: int, argv: list[str], *more: str, **environment: str) -> subprocess.Popen:
    """`torchrun -m cloche …` on a free port; one thread a process, as torchrun itself sets it."""
    given = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *more, "-m", "cloche", *argv]
    return subprocess.Popen(given, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen, code: int | None = 0) -> str:
    _told, said = process.communicate(timeout=240)
    assert code is None or process.returncode == code, said[-3000:]
    return said


def one_thread(argv: list[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.run(argv) == 0
    finally:
        torch.set_num_threads(before)


def same_bits(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    """Of each step."""
    return [e["loss"] for line in (run / "events.jsonl").read_text().splitlines() if (e := json.loads(line))["kind"] == "step"]


def alike(a: Path, b: Path) -> None:
    """Metrics score each example once; the log counts every row."""
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (a, b))
    assert ours["n"] == theirs["n"] and ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, nan_ok=True)
    logs = [[json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()] for run in (a, b)]
    for mine, other in zip(*logs, strict=True):
        assert mine.keys() == other.keys()
        assert {k: v for k, v in mine.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in other.items() if isinstance(v, float)}, rel=1e-4, abs=1e-6, nan_ok=True
        )


def test_alone_a_group_gives_back_what_it_was_given():
    group, t = Group(), torch.arange(3.0)
    assert group.sum(t) is t and group.whole(t) is t and group.agree(15, True) == (15, True)
    with group.turn("anything"):
        group.done("anything")


def both(name: str, n: int, folder: Path, *sets: str) -> tuple[Path, Path]:
    one, many = folder / "one", folder / "many"
    sets = (f"train.chunks={n}", *sets)
    one_thread(command(name, one, *sets))
    said = ended(torchrun(n, command(name, many, *sets)))
    assert said.count("   look   ") == 1  # one of them tells
    return one, many


@pytest.mark.parametrize("name", ["digits", "pydocs-lstm"])  # batch norm; a carried state
def test_two_processes_end_with_the_bits_of_one(name, tmp_path):
    one, many = both(name, 2, tmp_path)
    assert same_bits(one, many)
    alike(one, many)


@pytest.mark.faults
@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("digits", "pydocs-lstm")])
def test_every_recipe_on_two_processes(name, tmp_path):
    one, many = both(name, 2, tmp_path)
    assert same_bits(one, many)
    alike(one, many)


@pytest.mark.faults
@pytest.mark.parametrize("name", [n if n in ("digits", "pydocs-lstm") else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_every_recipe_on_four_processes(name, tmp_path):
    """One chunk a process: equal bits. Two each: the losses of 20 steps within 1e-6, and equal bits where exact_sum is asked for."""
    sets = ("train.steps=20", "train.log_steps=1")
    one, many = both(name, 4, tmp_path, *sets)
    assert same_bits(one, many)
    alike(one, many)
    more = tmp_path / "eight chunks"
    one_thread(command(name, more, "train.chunks=8", *sets))
    for out, exact in ((tmp_path / "near", "false"), (tmp_path / "exact", "true")):
        ended(torchrun(4, command(name, out, "train.chunks=8", f"train.exact_sum={exact}", *sets)))
        assert losses(out) == pytest.approx(losses(more), rel=1e-6) and len(losses(out)) == 20
    assert same_bits(more, tmp_path / "exact")


@pytest.mark.faults
def test_ordered_sums_keep_the_layout_of_the_weights(tmp_path):
    """Fused optimizers walk weights and gradients side by side through memory."""
    one, many = both("digits", 2, tmp_path, "train.layout=channels_last", "train.exact_sum=true")
    assert same_bits(one, many)


def test_a_process_that_would_always_be_idle_is_refused():
    """Nine lanes in four chunks are three: the fourth process would have no state to save."""
    recipe = parse(change(find("recipe:pydocs-lstm", None)[1], {"train.chunks": 4, "train.batch": 9, "data.vocabulary": 300}), "x")
    data = open_data(recipe, torch.device("cpu"))
    facts = facts_of(recipe, data)
    recipe, task = task_of(recipe, data.prepare, facts)
    job_of(recipe, data, task, nets_of(recipe, task), {}, Group())
    with pytest.raises(RecipeError, match="two lanes each"):
        job_of(recipe, data, task, nets_of(recipe, task), {}, Group(0, 4))


@pytest.mark.faults
def test_more_chunks_than_processes_and_a_short_last_step(tmp_path):
    """Six chunks by four processes are raised to eight; the last step of the epoch has rows for a few of them: others are idle."""
    sets = ["train.batch=40", "train.chunks=8", "train.steps=64", "train.exact_sum=true"]
    one_thread(command("digits", tmp_path / "one", *sets))
    raised = [s if "chunks" not in s else "train.chunks=6" for s in sets]
    said = ended(torchrun(4, command("digits", tmp_path / "many", *raised)))
    assert "train.chunks 6 → 8: a multiple of the 4 processes" in said
    assert same_bits(tmp_path / "one", tmp_path / "many")


def wait_for_checkpoint(out: Path, process: subprocess.Popen) -> None:
    t0 = time.monotonic()
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() - t0 < 120, process.communicate()[1][-3000:]
        time.sleep(0.01)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The pids of torchrun's workers, by rank: the eldest first."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"cloche" in Path(f"/proc/{pid}/cmdline").read_bytes()]


LONG = ("train.steps=400", "train.chunks=2")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    one_thread(command("pydocs-lstm", out, *LONG))
    return out


def test_a_killed_worker_is_started_again_and_the_run_ends_alike(unbroken, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, [*command("pydocs-lstm", out, *LONG), "--save-seconds", "0.05"], "--max-restarts=3")
    wait_for_checkpoint(out, process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    said = ended(process)
    assert "lost the others at step" in said or "SIGKILL" in said or "Signal 9" in said, said[-2000:]
    assert same_bits(unbroken, out)


def test_stopped_it_goes_on_in_one_process(unbroken, tmp_path):
    """SIGTERM to torchrun reaches all; they stop after the same step; the carried state goes on by lane in another number of processes."""
    out = tmp_path / "run"
    process = torchrun(2, [*command("pydocs-lstm", out, *LONG), "--save-seconds", "0.05"])
    wait_for_checkpoint(out, process)
    process.send_signal(signal.SIGTERM)
    said = ended(process, None)
    assert process.returncode != 0 and said.count("everything done so far is saved") == 1, said[-2000:]
    steps = [int(p.name.removeprefix("step-")) for p in out.glob("checkpoints/step-*")]
    assert steps and max(steps) < 400 and not (out / "manifest.json").exists()
    one_thread(command("pydocs-lstm", out, *LONG))
    assert same_bits(unbroken, out)


@pytest.mark.faults  # torchrun leaves a stopped process 30 s to end
def test_a_silent_worker_is_named(tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, [*command("pydocs-lstm", out, *LONG), "--save-seconds", "0.05"], CLOCHE_PATIENCE_S="4")
    wait_for_checkpoint(out, process)
    silent = workers_of(process)[-1]
    os.kill(silent, signal.SIGSTOP)
    try:
        said = ended(process, None)
    finally:
        if Path(f"/proc/{silent}").exists():
            os.kill(silent, signal.SIGKILL)
    told = r"process 0 lost the others at step (\d+), while (.*)\n.*the furthest behind: process 1, last heard of at step (\d+)"
    found = re.search(told, said)
    assert found and int(found[1]) >= int(found[3]), said[-2000:]
    assert process.returncode != 0


@pytest.mark.parametrize("fault", ["optim.kind=nothing", "train.device=cuda:99"], ids=["before they meet", "when they have met"])
def test_a_fault_of_all_is_told_once(fault, tmp_path):
    process = torchrun(2, command("curve", tmp_path / "run", fault))
    said = ended(process, None)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    ours = [line for line in said.split("torch.distributed.elastic")[0].splitlines() if "nothing was started" in line or "cuda:99" in line]
    assert len(ours) == 1 and "Traceback" not in "".join(ours), said[-2000:]
