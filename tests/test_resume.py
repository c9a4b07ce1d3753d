"""The power may fail: kill -9, signals, damage and second starts; the same command ends with the bits of an unbroken run.

Checkpoints are paid for with 1 % of the time, so a test of seconds would see none. Here `Clock.save_is_due` says yes every
few steps instead; nothing else of the command is changed, and the unbroken runs that are compared with save as they always do.
"""

from collections.abc import Callable
import contextlib
import hashlib
import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

import pytest

from cloche import cli, files
from cloche.errors import FAILED, INTERRUPTED, STOPPED, WRONG_INPUT, UserError
from cloche.training import loop as loops
from cloche.training.precision import Precision
from cloche.training.run import OURS, Run, read_events
from cloche.use import train as use_train

EVERY = 7  # steps between two checkpoints: never in time with the epochs

CNN = """
format = 1
[data]
source = "digits"
pixels = 12
channels = 1
augment = { rotate = 10.0, brightness = 0.2, contrast = 0.2 }
[net]
kind = "cnn"
stages = [[4], [8]]
hidden = 16
norm = "batch"
dropout = 0.2
[optim]
kind = "adamw"
lr = 3e-3
schedule = "onecycle"
[train]
epochs = 6
batch = 32
chunks = 2
precision = "fp32"
layout = "plain"
matmul = "default"
device = "cpu"
"""
MLP = """
format = 1
[data]
source = "digits"
pixels = 8
channels = 1
[net]
kind = "mlp"
widths = [16]
dropout = 0.2
[optim]
lr = 5e-3
[train]
epochs = 2
batch = 64
precision = "fp32"
layout = "plain"
matmul = "default"
device = "cpu"
"""

DRIVER = """
import sys, time
from cloche import start
start.tune_allocator()
from cloche.training import loop

def due(clock):
    time.sleep(0.01)  # long enough to be hit in the middle, however fast the machine
    return len(clock.steps_s) % {every} == 0

loop.Clock.save_is_due = property(due)
from cloche.cli import run
sys.exit(run(sys.argv[1:]))
"""


pytestmark = pytest.mark.usefixtures("quiet_machine")


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bits(run: Path) -> tuple[str, str, str]:
    """Model and log to the bit; the results without what a clock says."""
    results = json.loads((run / "results.json").read_text())
    return (
        sha(run / "model.safetensors"),
        sha(run / "events.jsonl"),
        repr({k: v for k, v in results.items() if k not in ("seconds", "speed")}),
    )


def steps_saved(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*")) if folder.is_dir() else []


class Place:
    """A recipe in a folder, its command, and an unbroken run of it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.recipe, self.whole = folder, folder / "mine.toml", folder / "whole"
        self.recipe.write_text(text)
        assert cli.run(self.command(self.whole)) == 0
        assert json.loads((self.whole / "results.json").read_text())["metrics"]["accuracy"] > 0.3  # it learns something at all

    def command(self, out: Path, *more: str) -> list[str]:
        return ["train", str(self.recipe), "--out", str(out), *more]


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("cnn"), CNN)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("mlp"), MLP)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("averaged"), MLP + "ema = 0.95\n")


# --- real processes, really killed ----------------------------------------------------------------------------------------------


class Started:
    """`cloche train` in a process of its own."""

    def __init__(self, place: Place, out: Path) -> None:
        driver = place.folder / "driver.py"
        driver.write_text(DRIVER.format(every=EVERY))
        self.out, self.before = out, max(steps_saved(out), default=0)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.errors = open(place.folder / "stderr.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(driver), *place.command(out)], env=environment, stderr=self.errors, stdout=subprocess.DEVNULL
        )

    def wait_for_progress(self) -> int:
        """Until it has saved a checkpoint that was not there when it began."""
        t0 = time.monotonic()
        while max(steps_saved(self.out), default=0) <= self.before:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() - t0 < 60, self.said()
            time.sleep(0.005)
        return max(steps_saved(self.out))

    def send(self, what: signal.Signals) -> int:
        """Signal it; returns how it ended."""
        assert self.process.poll() is None, "it ended before it could be stopped: " + self.said()
        self.process.send_signal(what)
        return self.process.wait(5)

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.errors.close()


@contextlib.contextmanager
def started(place: Place, out: Path):
    running = Started(place, out)
    try:
        yield running
    finally:
        running.close()


@pytest.mark.skipif(os.name != "posix", reason="not run: signals as POSIX has them")
def test_killed_twice_then_stopped_twice_it_ends_with_the_same_bits(cnn, tmp_path, capsys):
    """240 steps. kill -9 at moments of chance, resumes among them; then SIGTERM, then Ctrl-C; then the command is left alone."""
    out, chance = tmp_path / "run", random.Random()
    for kill in range(2):
        with started(cnn, out) as running:
            running.wait_for_progress()
            if kill == 0:  # while it runs: a second one in its folder
                capsys.readouterr()
                assert cli.run(cnn.command(out)) == WRONG_INPUT
                said = capsys.readouterr().err
                assert f"in use: {out}" in said and f"by process {running.process.pid} since" in said and "--out" in said
            time.sleep(chance.uniform(0, 0.2))
            assert running.send(signal.SIGKILL) == -signal.SIGKILL
        assert steps_saved(out) and not (out / "model.safetensors").exists()
        for step in steps_saved(out):  # what stands is whole
            files.check_manifest(out / "checkpoints" / f"step-{step}", "cloche checkpoint")
    for sent, code in ((signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)):
        with started(cnn, out) as running:
            saved = running.wait_for_progress()
            time.sleep(chance.uniform(0, 0.1))
            assert running.send(sent) == code  # within five seconds
            said = running.said()
        assert "everything done so far is saved" in said and "type the same command" in said
        assert max(steps_saved(out)) >= saved
        assert len(steps_saved(out)) <= 2
    assert cli.run(cnn.command(out)) == 0
    assert bits(out) == bits(cnn.whole)
    left = {p.name for p in out.rglob("*")} - {"index.html", "inside.json"}
    assert left <= {*OURS, ".lock"}, left  # no litter of the killed ones, no checkpoint any more


# --- the same in this process, at exact places ----------------------------------------------------------------------------------


@contextlib.contextmanager
def saving_every(n: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops.Clock, "save_is_due", property(lambda self: len(self.steps_s) % n == 0))
        yield patch


def acting(patch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
    """Do something just before step `at` (counted from 1)."""
    step = loops.step

    def stepping(job, state, chunks, place):
        if place.step == at - 1:
            act()
        return step(job, state, chunks, place)

    patch.setattr(loops, "step", stepping)


def stopped_at(place: Place, out: Path, at: int, sent: signal.Signals = signal.SIGTERM) -> None:
    """A run that was asked to stop in step `at`: it finishes the step, saves and ends."""
    with saving_every(EVERY) as patch:
        acting(patch, at, lambda: signal.raise_signal(sent))
        assert cli.run(place.command(out)) == (STOPPED if sent == signal.SIGTERM else INTERRUPTED)
    assert max(steps_saved(out)) == at


@pytest.mark.parametrize("at", [1, 13, 20, 39], ids=["first step", "inside an epoch", "end of an epoch", "last step but one"])
def test_stopped_at_any_step(mlp, at, tmp_path):
    stopped_at(mlp, tmp_path / "run", at)
    assert not (tmp_path / "run/model.safetensors").exists()
    assert cli.run(mlp.command(tmp_path / "run")) == 0
    assert bits(tmp_path / "run") == bits(mlp.whole)


@pytest.mark.parametrize("at", [1, 13, 20, 39], ids=["first step", "inside an epoch", "end of an epoch", "last step but one"])
def test_a_running_average_goes_on_where_it_was(averaged, mlp, at, tmp_path):
    """train.ema is part of the state: what is kept, and what selection looked at, to the bit."""
    assert sha(averaged.whole / "model.safetensors") != sha(mlp.whole / "model.safetensors")
    stopped_at(averaged, tmp_path / "run", at)
    assert cli.run(averaged.command(tmp_path / "run")) == 0
    assert bits(tmp_path / "run") == bits(averaged.whole)


def test_what_was_measured_is_read_not_measured_again(mlp, tmp_path):
    """Number format and layout are tried once, before the first step, and stand in recipe.toml."""
    out, command = tmp_path / "run", mlp.command(tmp_path / "run", "--set", "train.precision=auto", "--set", "train.layout=auto")
    with saving_every(EVERY) as patch:
        patch.setattr(use_train, "threads_for", lambda flops, threads: threads)  # a net this small is not worth a trial
        patch.setattr(use_train, "trial", lambda *given: (Precision("fp32", "channels_last"), {"fp32 channels_last": 0.1}))
        acting(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        assert cli.run(command) == STOPPED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(use_train, "threads_for", lambda flops, threads: threads)
        patch.setattr(use_train, "trial", lambda *given: pytest.fail("it measures again"))
        assert cli.run(command) == 0
    assert 'layout = "channels_last"' in (out / "recipe.toml").read_text() and 'precision = "fp32"' in (out / "recipe.toml").read_text()


def test_the_log_is_cut_where_the_checkpoint_stands(mlp, tmp_path):
    """What a killed run had logged after its last checkpoint, and half a line, is gone when it goes on."""
    out = tmp_path / "run"
    stopped_at(mlp, out, 13)
    with open(out / "events.jsonl", "a") as f:
        f.write('{"kind": "step", "step": 999, "loss": 0.0}\n{"kind": "st')
    assert cli.run(mlp.command(out)) == 0
    assert bits(out) == bits(mlp.whole)


def test_a_crash_at_every_write_of_a_run(mlp, tmp_path):
    """Every file is put in its place by a rename: die at the first, the second, … and start again each time."""

    class Killed(BaseException):
        pass

    def dying_at(n: int):
        calls, replace = [], os.replace

        def dying(*given, **named):
            calls.append(given)
            if len(calls) == n:
                raise Killed
            return replace(*given, **named)

        return calls, dying

    command = lambda name: mlp.command(tmp_path / name, "--epochs", "1", "--batch", "128")  # noqa: E731
    with saving_every(EVERY) as patch:
        calls, counting = dying_at(0)
        patch.setattr(files.os, "replace", counting)
        assert cli.run(command("whole")) == 0
    writes = [Path(target).name for _source, target in calls]
    assert {"recipe.toml", "facts.json", "step-7", "step-10", "model.safetensors", "manifest.json"} <= set(writes)
    order = [writes.index(name) for name in ("recipe.toml", "facts.json", "step-7", "step-10", "model.safetensors", "manifest.json")]
    assert order == sorted(order)
    for n, name in enumerate(writes, 1):
        with saving_every(EVERY) as patch:
            patch.setattr(files.os, "replace", dying_at(n)[1])
            with pytest.raises(Killed):
                cli.run(command(f"run-{n}"))
        assert cli.run(command(f"run-{n}")) == 0, f"after a crash at the write of {name}"
        assert bits(tmp_path / f"run-{n}") == bits(tmp_path / "whole"), f"after a crash at the write of {name}"


@pytest.mark.parametrize("fault", [RuntimeError("out of luck"), "SIGTERM"], ids=["crash", "signal"])
def test_a_fault_in_the_final_evaluation_costs_no_training(mlp, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a fault of ours leaves its trace in the working folder
    out, measure = tmp_path / "run", use_train.judged

    def failing(*given, **named):
        if isinstance(fault, Exception):
            raise fault
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(use_train, "judged", failing)
        assert cli.run(mlp.command(out)) == (FAILED if isinstance(fault, Exception) else STOPPED)
    assert steps_saved(out) == [40]
    with pytest.MonkeyPatch.context() as patch:
        for at in range(1, 41):
            acting(patch, at, lambda: pytest.fail("it trains again"))
        assert use_train.judged is measure
        assert cli.run(mlp.command(out)) == 0
    assert bits(out) == bits(mlp.whole)


@pytest.mark.skipif(os.name != "posix", reason="not run: signals as POSIX has them")
def test_the_second_signal_ends_at_once_and_a_closed_terminal_does_not(tmp_path):
    run = Run(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(UserError, match="everything done so far is saved") as caught, use_train.signals(run):
        run.looping = True
        signal.raise_signal(signal.SIGHUP)
        assert run.stop == 0
        signal.raise_signal(signal.SIGTERM)
        assert run.stop == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it goes on")
    assert caught.value.code == INTERRUPTED
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# --- the same folder again ------------------------------------------------------------------------------------------------------


def state_of(run: Path) -> dict[str, tuple[int, str]]:
    """Every file but the lock: time and content."""
    return {str(p.relative_to(run)): (p.stat().st_mtime_ns, sha(p)) for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_finished_run_prints_its_result_and_trains_nothing(mlp, capsys):
    before = state_of(mlp.whole)
    capsys.readouterr()
    assert cli.run([*mlp.command(mlp.whole), "--json"]) == 0
    told, said = capsys.readouterr()
    results = json.loads((mlp.whole / "results.json").read_text())
    assert json.loads(told)["metrics"] == results["metrics"]
    assert "is finished; this is its result" in said and "--again" in said
    assert state_of(mlp.whole) == before


def test_a_moved_folder_goes_on_and_answers(mlp, tmp_path, capsys):
    stopped_at(mlp, tmp_path / "run", 13)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert cli.run(mlp.command(tmp_path / "moved")) == 0
    (tmp_path / "moved").rename(tmp_path / "again")
    capsys.readouterr()
    assert cli.run(["evaluate", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == json.loads((mlp.whole / "results.json").read_text())["metrics"]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_another_recipe_is_refused_field_by_field(mlp, finished, tmp_path, capsys):
    out = mlp.whole if finished else tmp_path / "run"
    if not finished:
        stopped_at(mlp, out, 13)
    before = state_of(out)
    capsys.readouterr()
    assert cli.run(mlp.command(out, "--set", "optim.lr=0.5", "--seed", "3", "--set", "net.widths=[8, 4]")) == WRONG_INPUT
    said = capsys.readouterr().err
    assert f"{out} was begun with another recipe" in said
    assert "optim.lr   there 0.005   now 0.5" in said
    assert "train.seed   there 0   now 3" in said
    assert "net.widths   there [16]   now [8, 4]" in said
    assert "--out NAME" in said and "--again" in said and "--allow-change optim.lr" in said and "--allow-change train.seed" in said
    assert state_of(out) == before


def test_another_machine_is_refused_while_unfinished(mlp, tmp_path, capsys):
    """Other threads add in another order: not the same bits. A finished run is only read, and needs none."""
    out = tmp_path / "run"
    stopped_at(mlp, out, 13)
    facts = json.loads((out / "facts.json").read_text())
    (out / "facts.json").write_text(json.dumps({**facts, "threads": 64, "fingerprint": "0" * 32}))
    capsys.readouterr()
    assert cli.run(mlp.command(out)) == WRONG_INPUT
    said = capsys.readouterr().err
    assert "facts.threads   there 64   now 1" in said and "facts.fingerprint" in said and "--allow-change facts.threads" in said
    (out / "facts.json").write_text(json.dumps({**facts, "threads": 64}))
    assert cli.run(mlp.command(out, "--allow-change", "facts.threads")) == 0
    assert bits(out) == bits(mlp.whole)


def test_allow_change_goes_on_with_the_new_value(mlp, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_at(mlp, out, 20)
    assert cli.run(mlp.command(out, "--set", "optim.lr=0.5", "--set", "optim.clip=1.0", "--allow-change", "optim.lr")) == WRONG_INPUT
    said = capsys.readouterr().err
    assert "optim.clip" in said and "optim.lr   there" not in said
    assert cli.run(mlp.command(out, "--set", "optim.lr=0.5", "--allow-change", "optim.lr")) == 0
    rates = [e["lr"] for e in read_events(out) if e["kind"] == "step"]
    assert rates[:2] == [0.005] * 2 and rates[-1] == 0.5
    assert sha(out / "model.safetensors") != sha(mlp.whole / "model.safetensors")


def test_the_folder_tells_what_was_trained_after_an_allowed_change(mlp, tmp_path):
    """recipe.toml is the contract between the verbs: it says what the weights were trained with last."""
    out = tmp_path / "run"
    stopped_at(mlp, out, 20)
    assert cli.run(mlp.command(out, "--set", "optim.lr=0.5", "--allow-change", "optim.lr")) == 0
    assert "lr = 0.5" in (out / "recipe.toml").read_text()


def test_a_change_that_the_weights_cannot_follow_is_told(mlp, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    stopped_at(mlp, out, 13)
    capsys.readouterr()
    code = cli.run(mlp.command(out, "--set", "net.widths=[8]", "--allow-change", "net.widths"))
    said = capsys.readouterr().err
    assert code in (FAILED, WRONG_INPUT) and "cloche itself failed" not in said
    assert not list(tmp_path.glob("cloche-fault*"))


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_again_starts_anew_and_leaves_what_is_not_ours(mlp, finished, tmp_path):
    out = tmp_path / "run"
    stopped_at(mlp, out, 13)
    if finished:
        assert cli.run(mlp.command(out)) == 0
    (out / "note.txt").write_text("seen by Ann")
    (out / ".hidden").write_text("mine")
    (out / "mine").mkdir()
    (out / "mine/data.csv").write_text("1,2")
    assert cli.run(mlp.command(out, "--again", "--epochs", "1")) == 0
    assert [e["step"] for e in read_events(out) if e["kind"] == "epoch"] == [20]
    assert (out / "note.txt").read_text() == "seen by Ann" and (out / ".hidden").exists() and (out / "mine/data.csv").exists()
    assert cli.run(mlp.command(out, "--again")) == 0
    assert bits(out) == bits(mlp.whole)


def test_what_is_saved_is_not_thrown_away_by_the_command_that_goes_on(mlp, tmp_path, capsys):
    """A run begun with --again and stopped: the command that is told does not say --again. Where nothing is saved, it still does."""
    out = tmp_path / "run"
    stopped_at(mlp, out, 9)
    for at, told in ((13, f"  cloche train {mlp.recipe} --out {out}\n"), (1, f"  cloche train {mlp.recipe} --out {out} --again\n")):
        capsys.readouterr()
        with saving_every(EVERY) as patch:
            if at == 1:
                patch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0, "total": 1}))
            else:
                acting(patch, at, lambda: signal.raise_signal(signal.SIGTERM))
            assert cli.run([*mlp.command(out), "--again"]) == STOPPED
        assert told in capsys.readouterr().err


# --- damage ---------------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_names_file_tensor_and_the_older_one(mlp, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_at(mlp, out, 17)
    assert steps_saved(out) == [14, 17]
    newest = out / "checkpoints/step-17"
    flip(newest / "state.safetensors", -100)
    capsys.readouterr()
    assert cli.run(mlp.command(out)) == FAILED
    said = capsys.readouterr().err
    assert str(newest / "state.safetensors") in said and "tensor " in said and "crc32" in said
    assert f"delete {newest} and type the same command: it goes on from step 14" in said
    assert steps_saved(out) == [14, 17]  # nothing is thrown away by itself
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert cli.run(mlp.command(out)) == 0
    assert bits(out) == bits(mlp.whole)


@pytest.mark.parametrize("file", ["place.json", "manifest.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_any_damage_of_a_checkpoint_is_told(mlp, file, how, tmp_path, capsys):
    """One byte, half a file, or no file: exit 1 naming it, never a silent new start."""
    out = tmp_path / "run"
    stopped_at(mlp, out, 9)
    path = out / "checkpoints/step-9" / file
    if how == "flipped":
        flip(path, len(path.read_bytes()) // 2)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    capsys.readouterr()
    assert cli.run(mlp.command(out)) == FAILED
    said = capsys.readouterr().err
    assert str(path) in said or str(path.parent) in said
    assert "goes on from step 7" in said
    assert not (out / "model.safetensors").exists()


def test_a_damaged_recipe_of_a_run_is_told(mlp, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_at(mlp, out, 9)
    (out / "recipe.toml").write_text("[data\n")
    capsys.readouterr()
    assert cli.run(mlp.command(out)) == FAILED
    said = capsys.readouterr().err
    assert str(out / "recipe.toml") in said and "--again" in said


def test_the_only_checkpoint_damaged(mlp, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_at(mlp, out, 3)
    flip(out / "checkpoints/step-3/state.safetensors", -1)
    capsys.readouterr()
    assert cli.run(mlp.command(out)) == FAILED
    assert "start anew with --again" in capsys.readouterr().err
    assert cli.run(mlp.command(out, "--again")) == 0
    assert bits(out) == bits(mlp.whole)


def test_a_running_average_that_is_allowed_in_the_middle_is_kept_from_there(mlp, tmp_path):
    stopped_at(mlp, tmp_path / "run", 20)
    assert cli.run([*mlp.command(tmp_path / "run"), "--set", "train.ema=0.9", "--allow-change", "train.ema"]) == 0
    assert sha(tmp_path / "run/model.safetensors") != sha(mlp.whole / "model.safetensors")
