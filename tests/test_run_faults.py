"""What goes wrong around a run: signals in every phase, a terminal that closes, a clock that jumps, no memory, numbers that are not finite.

Signals are sent to real processes, each a fork of one that has everything imported (see forked.py); memory and bad numbers are made
in this process, at exact steps. The bits at the end are always those of a run that met no fault.
"""

import contextlib
import errno
import json
import os
from pathlib import Path
import pty
import random
import shutil
import signal
import time

from forked import Family, Parent, whole
import pytest
from test_resume import CNN, MLP, Place, acting, bits, saving_every, sha, stopped_at
import torch

from cloche import cli, files
from cloche.data import chunk as chunks
from cloche.data import store as stores
from cloche.errors import DONE, FAILED, INTERRUPTED, STOPPED, WRONG_INPUT, UserError
from cloche.training import loop as loops
from cloche.training.fault import no_memory
from cloche.training.job import Job
from cloche.training.objective import Objective
from cloche.training.run import read_events

pytestmark = pytest.mark.usefixtures("quiet_machine")
linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="not run: needs Linux")
AT = 13  # inside the first epoch of MLP


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("mlp"), MLP)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("cnn"), CNN.replace("epochs = 6", "epochs = 2"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    made = Parent(tmp_path_factory.mktemp("parent"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def points(parent, tmp_path_factory):
    """spirals, very short: its command, and its unbroken run."""
    family, out = Family("spirals", "train.epochs=3", "train.test_batch=10"), tmp_path_factory.mktemp("points") / "whole"
    child = parent.start(family.command(out))
    assert child.end() == DONE, child.said()
    return family.command, out


# --- signals --------------------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    "phase, word, times",
    [
        ("reading data", "data", 1),
        ("trial", "trial", 1),
        ("steps", "step", 5),
        ("validation", "chunk", 2),
        ("final evaluation", "evaluation", 1),
        ("report", "report", 1),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else None,
)
def test_sigterm_in_every_phase(phase, word, times, parent, points, tmp_path):
    """F17: saved, exit 75, within five seconds."""
    command, unbroken = points
    child = parent.start(command(tmp_path / "run"), slow=word)
    assert child.listen(60, word, times), child.said()
    assert child.end(signal.SIGTERM, seconds=5) == STOPPED, child.said()
    assert "everything done so far is saved" in child.said() and "type the same command" in child.said()
    assert ("cloche train recipe:spirals" in child.said()) == (word not in ("data", "trial"))  # what goes on, once a step is saved
    assert child.words[-1].split()[0] in {"data": ["data"], "trial": ["trial"], "evaluation": ["evaluation"], "report": ["report"]}.get(
        word, ["saved"]
    )
    assert whole(tmp_path / "run") or word in ("data", "trial", "report")
    child = parent.start(command(tmp_path / "run"))
    assert child.end() == DONE, child.said()
    assert ("step" in child.words) == (word not in ("evaluation", "report"))  # nothing is trained twice
    assert bits(tmp_path / "run") == bits(unbroken)
    assert (tmp_path / "run/report/index.html").exists()


def test_a_signal_in_the_last_step_is_not_forgotten(mlp, tmp_path):
    """Without a validation nothing in the loop looks for a signal after it; evaluation and report may take minutes."""
    command = lambda out: mlp.command(out, "--set", "data.validation=0.0", "--set", "train.steps=9")  # noqa: E731
    assert cli.run(command(tmp_path / "whole")) == DONE
    with saving_every(7) as patch:
        acting(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))
        assert cli.run(command(tmp_path / "run")) == STOPPED
    assert max(whole(tmp_path / "run")) == 9 and not (tmp_path / "run/results.json").exists()
    assert cli.run(command(tmp_path / "run")) == DONE
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_a_signal_is_no_fault_of_the_cache(mlp, tmp_path, monkeypatch, capsys):
    """A store that cannot be kept is held in memory, and the run goes on; a signal while it is kept ends the run."""
    monkeypatch.setenv("CLOCHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "_keep", lambda folder, examples: signal.raise_signal(signal.SIGTERM))
    assert cli.run(mlp.command(tmp_path / "run")) == STOPPED
    assert "held in memory" not in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "n, at, sets",
    [(1, 20, []), (2, 40, []), (1, 15, ["train.steps=15"]), (2, 35, ["train.steps=35"])],
    ids=["first epoch", "last epoch", "steps end inside the first", "steps end inside the second"],
)
def test_stopped_in_a_validation_it_begins_again_where_it_began(n, at, sets, mlp, tmp_path):
    command = lambda out: mlp.command(out, *(w for s in sets for w in ("--set", s)))  # noqa: E731
    assert cli.run(command(tmp_path / "whole")) == DONE
    calls, once = [], chunks.Part.once

    def signalling(part, *given):
        calls.append(part.name)
        for i, chunk in once(part, *given):
            if calls.count("validation") == n and part.name == "validation":
                signal.raise_signal(signal.SIGTERM)
            yield i, chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks.Part, "once", signalling)
        assert cli.run(command(tmp_path / "run")) == STOPPED
    assert len([e for e in read_events(tmp_path / "run") if e["kind"] == "epoch"]) == n - 1
    assert whole(tmp_path / "run") == [at]
    assert cli.run(command(tmp_path / "run")) == DONE
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


@linux
def test_two_signals_one_after_the_other(parent, points, tmp_path):
    """F18: the first saves, the second ends at once, wherever the save is by then; nothing is torn."""
    command, unbroken = points
    for n, dt_s in enumerate((0, 0.001, 0.002, 0.004, 0.008)):
        child = parent.start(command(tmp_path / "run"), slow="step")
        assert child.listen(60, "step", 2 + n)
        os.kill(child.pid, signal.SIGTERM)
        assert n == 4 or child.listen(60, "save")
        time.sleep(dt_s)
        assert child.end(signal.SIGINT, seconds=5) in (STOPPED, INTERRUPTED), child.said()
        assert "cloche itself failed" not in child.said()
        whole(tmp_path / "run")
    child = parent.start(command(tmp_path / "run"))
    assert child.end() == DONE, child.said()
    assert bits(tmp_path / "run") == bits(unbroken)


@linux
def test_a_terminal_that_closes_does_not_end_a_run(parent, points, tmp_path):
    """F19: its own session on a terminal that goes away while it trains: SIGHUP from the kernel, and no place to write to."""
    command, unbroken = points
    ours, theirs = pty.openpty()
    own = f"os.setsid(); terminal = os.open({os.ttyname(theirs)!r}, os.O_RDWR); [os.dup2(terminal, n) for n in (0, 1, 2)]"
    hung = (
        "import signal; first = signal.signal; signal.signal = lambda n, f: first(n, (lambda *g: (tell('hung'), f(*g))) if n == 1 else f)"
    )
    child = parent.start(command(tmp_path / "run"), slow="step", before=f"{own}\n{hung}")
    assert child.listen(60, "step", 3)
    assert b"rows in 2 classes" in os.read(ours, 1 << 16)  # it did write there
    os.close(theirs)
    os.close(ours)
    assert child.end() == DONE
    assert "hung" in child.words, child.words[:9]
    assert bits(tmp_path / "run") == bits(unbroken)


@linux
def test_closed_streams_and_hangups_do_not_end_a_run(parent, points, tmp_path):
    """F19: started with nothing open to write to, as some schedulers do."""
    command, unbroken = points
    child = parent.start(command(tmp_path / "run"), slow="step", before="os.close(1); os.close(2); sys.stdout = sys.stderr = None")
    for n in (2, 4, 6):
        assert child.listen(60, "step", n)
        os.kill(child.pid, signal.SIGHUP)
    assert child.end() == DONE
    assert bits(tmp_path / "run") == bits(unbroken)


# --- the clock ------------------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(mlp, tmp_path):
    """F33: back to 1970, on to 2100, at every look; and the times of all files are those of 1970."""
    jumps = random.Random(0)

    @contextlib.contextmanager
    def jumping():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: jumps.choice([0.0, 4.1e9]))
            patch.setattr(time, "time_ns", lambda: jumps.choice([0, 4_100_000_000 * 10**9]))
            patch.setattr(time, "strftime", lambda *given: jumps.choice(["1970-01-01 00:00:00", "2100-01-01 00:00:00"]))
            yield

    with jumping():
        stopped_at(mlp, tmp_path / "run", AT)
    for n, path in enumerate(sorted((tmp_path / "run").rglob("*"))):
        os.utime(path, (n, n))  # step-13 before step-7
    with jumping(), pytest.MonkeyPatch.context() as patch:
        for at in range(1, AT + 1):
            acting(patch, at, lambda: pytest.fail("it does not go on from the newest"))
        assert cli.run(mlp.command(tmp_path / "run")) == DONE
    assert bits(tmp_path / "run") == bits(mlp.whole)


# --- the disk, and what a run was begun with ---------------------------------------------------------------------------------------


def test_a_save_that_fails_deletes_nothing(mlp, tmp_path):
    """F9: what stands is deleted only when what is newer stands."""
    out, write = tmp_path / "run", files.write_folder
    stopped_at(mlp, out, 17)
    assert whole(out) == [14, 17]

    def failing(path, *given):
        raise UserError("the disk is full", code=STOPPED, name="disk-full") if path.name == "step-21" else AssertionError(path)

    with saving_every(4) as patch:  # 17 + 4
        patch.setattr(files, "write_folder", failing)
        assert cli.run(mlp.command(out)) == STOPPED
    assert whole(out) == [14, 17] and files.write_folder is write
    assert cli.run(mlp.command(out)) == DONE
    assert bits(out) == bits(mlp.whole)


def test_a_full_disk_under_the_log_is_said_once(mlp, tmp_path, capsys):
    """F16: training goes on, the model is the same; the log misses lines, never half of one."""
    out, append = tmp_path / "run", Path.open

    def full_disk(path, mode="r", *given, **named):
        if path.name == "events.jsonl" and mode == "a":
            with append(path, mode, *given, **named) as file:
                file.write('{"kind": "st')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(path, mode, *given, **named)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        assert cli.run(mlp.command(out)) == DONE
    assert capsys.readouterr().err.count("events.jsonl cannot be written (No space left on device); training goes on") == 1
    assert (out / "events.jsonl").read_text() == "" and sha(out / "model.safetensors") == sha(mlp.whole / "model.safetensors")


@pytest.mark.parametrize("name, was", [("torch", "2.0.1"), ("cloche", "0.0.1"), ("device", "cuda")])
def test_another_version_is_named_and_refused(name, was, mlp, tmp_path, capsys):
    """F30: both are told; allowed by name it goes on."""
    out = tmp_path / "run"
    stopped_at(mlp, out, AT)
    facts = json.loads((out / "facts.json").read_text())
    (out / "facts.json").write_text(json.dumps({**facts, name: was}))
    capsys.readouterr()
    assert cli.run(mlp.command(out)) == WRONG_INPUT
    assert f"facts.{name}   there {was}   now {facts[name]}" in capsys.readouterr().err.replace('"', "")
    assert cli.run(mlp.command(out, "--allow-change", f"facts.{name}")) == DONE


# --- no memory ------------------------------------------------------------------------------------------------------------------

SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."
FULL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(SAID),
    RuntimeError("std::bad_alloc"),
]


class Killed(BaseException):
    pass


def dying():
    raise Killed


@contextlib.contextmanager
def full(at: int, fault: Exception, most: int = 1):
    """No memory in the last chunk of step `at`, when the others have left their marks, as long as there are at most so many chunks."""
    forward, step, seen = Objective.forward, loops.step, {}

    def stepping(job, state, given, place):
        seen.update(step=place.step + 1, left=len(given), of=len(given))
        return step(job, state, given, place)

    def forwarding(objective, chunk, carry):
        found = forward(objective, chunk, carry)
        seen["left"] -= 1
        if seen["step"] == at and seen["of"] <= most and not seen["left"]:
            raise fault
        return found

    with saving_every(7) as patch:
        patch.setattr(loops, "step", stepping)
        patch.setattr(Objective, "forward", forwarding)
        yield


@pytest.mark.parametrize("fault", FULL[:2], ids=lambda fault: type(fault).__name__)
def test_no_memory_for_a_step_keeps_the_step_before(fault, cnn, tmp_path, capsys):
    """F22, F23: batch normalisation has seen the first chunk by then; the same command, with more memory, ends with the same bits."""
    capsys.readouterr()
    with full(AT, fault, most=2):
        assert cli.run([*cnn.command(tmp_path / "run"), "--json"]) == FAILED
    told, said = capsys.readouterr()
    error = json.loads(told)["error"]
    assert error["code"] == "out-of-memory" and error["found"].startswith(f"at step {AT}: ")
    assert "--set train.chunks=4 --allow-change train.chunks" in error["do"] and "Traceback" not in said
    assert max(whole(tmp_path / "run")) == AT - 1
    assert cli.run(cnn.command(tmp_path / "run")) == DONE
    assert bits(tmp_path / "run") == bits(cnn.whole)


def test_every_word_for_no_memory_is_known_and_no_other():
    assert all(no_memory(fault) for fault in FULL)
    assert not no_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (64x3 and 4x2)")) and not no_memory(ValueError("memory"))


def test_allowed_it_goes_on_in_smaller_chunks_and_remembers(cnn, tmp_path, capsys):
    """F22: said, in the log, in recipe.toml; what the failed pass had seen is forgotten; the plain command goes on with that number."""
    out, killed, by_hand = tmp_path / "run", tmp_path / "killed", tmp_path / "by hand"
    allowed = ("--allow-change", "train.chunks")
    capsys.readouterr()
    with full(AT, MemoryError(), most=2):
        assert cli.run(cnn.command(out, *allowed)) == DONE
    assert f"no memory for step {AT}: train.chunks = 4 from here on (other bits)" in capsys.readouterr().err
    assert "chunks = 4" in (out / "recipe.toml").read_text()
    assert json.loads((out / "facts.json").read_text())["asked_chunks"] == 2
    assert [e for e in read_events(out) if e["kind"] == "memory"] == [{"kind": "memory", "step": AT - 1, "chunks": 4}]
    stopped_at(cnn, by_hand, AT - 1)  # the same change at the same step, asked for by a person
    assert cli.run(cnn.command(by_hand, "--set", "train.chunks=4", *allowed)) == DONE
    assert sha(out / "model.safetensors") == sha(by_hand / "model.safetensors") != sha(cnn.whole / "model.safetensors")
    with full(AT, MemoryError(), most=2) as _, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops.Clock, "save_is_due", property(lambda clock: len(clock.steps_s) == 7))  # and not between 12 and its death
        acting(patch, AT + 3, dying)
        with pytest.raises(Killed):
            cli.run(cnn.command(killed, *allowed))
    assert cli.run(cnn.command(killed)) == DONE
    assert bits(killed) == bits(out)


def test_as_small_as_can_be_it_says_so(mlp, tmp_path, capsys):
    """Every halving fails: it ends where no chunk of two rows can be halved, with the step before on the disk."""
    with full(AT, MemoryError(), most=10**6):
        assert cli.run(mlp.command(tmp_path / "run", "--allow-change", "train.chunks")) == FAILED
    said = capsys.readouterr().err
    assert "train.chunks = 32 from here on" in said and "train.chunks = 64" not in said and "not enough memory for a step" in said
    assert max(whole(tmp_path / "run")) == AT - 1


@linux
def test_a_real_limit_of_memory(parent, tmp_path):
    """F22: RLIMIT_AS at what the process has in step 4, and nearly all of its heap in use: the next step finds no room, really."""
    limit = """
import resource
def squeeze(*_):
    squeeze.n += 1
    if squeeze.n == 4:
        has = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has, has))
        for size in (1 << 22, 1 << 20):
            try:
                while True:
                    squeeze.held.append(bytearray(size))
            except MemoryError:
                pass
        del squeeze.held[-3:]
squeeze.n, squeeze.held = 0, []
real = loop.step
loop.step = lambda *given: (squeeze(), real(*given))[1]
"""
    family = Family("spirals", "train.batch=700", "net.widths=[3000]", steps=6)  # 8.4 MB a layer
    child = parent.start(family.command(tmp_path / "run"), before=limit)
    assert child.end() == FAILED, child.said()
    assert "there is not enough memory for a step" in child.said() and "at step 4: " in child.said()
    assert whole(tmp_path / "run") == [3]
    child = parent.start(family.command(tmp_path / "run"))
    assert child.end() == DONE, child.said()


# --- numbers that are not finite -------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """One row of the fifth step is not a number, wherever it comes up. Returns a list with it, once it has."""
    made, rows = Job.chunks, []

    def poisoning(job, epoch, index, draw):
        given = made(job, epoch, index, draw)
        if (epoch, index) == (0, 4) and not rows:
            rows.append(int(given[0].ids[5]))
        for chunk in given if rows else ():
            chunk.data["image"][chunk.ids == rows[0]] = float("nan")
        return given

    monkeypatch.setattr(Job, "chunks", poisoning)
    return rows


def test_rewind_goes_on_without_the_bad_row(mlp, poisoned, tmp_path, capsys):
    """F24: named with its layer; left out by --rewind, said and recorded; interrupted after that it ends with the same bits."""
    out, other = tmp_path / "run", tmp_path / "other"
    for _twice in range(2):
        capsys.readouterr()
        with saving_every(3):
            assert cli.run(mlp.command(out)) == FAILED
        said = capsys.readouterr().err
        assert "not a finite number at step 5; nothing from that step on was applied" in said
        assert f"examples {poisoned[0]} · layers net.fc1" in said and "--rewind" in said
        assert whole(out) == [3] and json.loads((out / "nonfinite.json").read_text()) == {"step": 5, "rows": poisoned}
    shutil.copytree(out, other)
    capsys.readouterr()
    assert cli.run(mlp.command(out, "--rewind")) == DONE
    assert f"without the examples {poisoned[0]} of step 5, from the last checkpoint on" in capsys.readouterr().err
    assert json.loads((out / "facts.json").read_text())["skipped"] == poisoned and not (out / "nonfinite.json").exists()
    assert sha(out / "model.safetensors") != sha(mlp.whole / "model.safetensors")
    for at, command in ((AT, mlp.command(other, "--rewind")), (31, mlp.command(other))):
        with saving_every(7) as patch:
            acting(patch, at, lambda: signal.raise_signal(signal.SIGTERM))
            assert cli.run(command) == STOPPED
    assert cli.run(mlp.command(other)) == DONE
    assert bits(other) == bits(out)


def test_rewind_where_nothing_was_bad_is_refused(mlp, tmp_path, capsys):
    stopped_at(mlp, tmp_path / "run", AT)
    capsys.readouterr()
    assert cli.run(mlp.command(tmp_path / "run", "--rewind")) == WRONG_INPUT
    said = capsys.readouterr().err
    assert "was not ended by a number that is not finite" in said and "leave out --rewind" in said
    assert cli.run(mlp.command(tmp_path / "run")) == DONE
    assert bits(tmp_path / "run") == bits(mlp.whole)


def test_a_row_without_a_neighbour_changes_no_other_place():
    """The order of a part is by place: who stands for the row that is left out is the next one, and every other place keeps its row."""
    import numpy as np

    part = chunks.Part("train", None, np.arange(10, 20), None)
    assert part.without([13, 14, 19]).ids.tolist() == [10, 11, 12, 15, 15, 15, 16, 17, 18, 10]
    assert part.without([]) is part
