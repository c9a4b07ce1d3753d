"""Helper of the kill loops: every shipped recipe made small, and `cloche train` in processes that are forked, watched and really killed.

Importing torch takes seconds, so one parent has it imported and forks a process for each start; it starts no thread before. What a
child does is the command as it is, but for the speed of the machine, which is not measured, and for words on a pipe that say where
it stands. The words are read by whoever kills, so where a kill has landed is known, not guessed.
"""

import contextlib
import json
import os
from pathlib import Path
import re
import select
import subprocess
import sys
import time

from cloche import files

SAVE = ("--save-seconds", "0.05")
SMALL = {
    "airline": ["train.steps=500"],
    "curve": ["train.epochs=30"],
    "dates": ["data.rows=600", "net.width=32", "net.layers=1", "train.steps=60", "train.test_batch=64"],
    "dialtones": ["data.rows=60", "net.width=16", "net.stack=1", "train.steps=20"],
    "digits": [
        "data.pixels=12",
        "data.channels=1",
        "net.stages=[[4],[8]]",
        "net.hidden=16",
        "net.norm=batch",
        "net.dropout=0.2",
        "train.epochs=20",
    ],
    "digits-diffusion": ["net.width=16", "train.steps=22", 'task.judge=""', "task.samples=6", "task.steps=2"],
    "digits-mlp": ["train.epochs=24", "train.ema=0.9"],
    "digits-resnet": ["data.pixels=8", "net.width=4", "net.blocks=[1, 1]", "train.epochs=10"],
    "digits-rows": ["net.width=32", "train.epochs=10"],
    "primer-walkthrough": [
        "data.pixels=12",
        "data.channels=1",
        "net.stages=[[4,4]]",
        "net.hidden=16",
        "net.norm=batch",
        "net.dropout=0.2",
        "train.epochs=8",
    ],
    "pydocs": ["net.width=32", "net.layers=1", "net.heads=2", "data.vocabulary=300", "data.window=64", "train.steps=160"],
    "pydocs-lstm": ["net.width=24", "data.vocabulary=300", "train.steps=200"],
    "spirals": ["train.epochs=40"],
}
NEEDS_DATA = {"mnist", "mnist-fast", "fashion-mnist", "fashion-resnet"}  # a person brings it: not run here

PARENT = """
import json, os, sys, time
from cloche import start
start.tune_allocator()
import torch
import torch._dynamo  # what the first step would import: a second a start
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import sklearn.datasets
from cloche import cli, rng
from cloche.data import prepare
from cloche.tasks import metrics
from cloche.training import loop, run
from cloche.use import explain, report, train

torch.set_num_threads(1)
train.limit_of = lambda *given: 1e9
SLOW_S = {"step": 0.01, "chunk": 0.1}
if len(os.listdir("/proc/self/task")) != 1:
    sys.exit("threads before the fork")


def child(argv, fd, errors, slow, before):
    def tell(word):
        os.write(fd, word.encode() + b"\\n")
        if word == slow:
            time.sleep(SLOW_S.get(slow, 60))

    def told(owner, name, before=None, after=None):
        real = getattr(owner, name)

        def calling(*given, **named):
            if before and (word := before(*given)):
                tell(word)
            found = real(*given, **named)
            if after:
                tell(after(*given))
            return found

        setattr(owner, name, calling)

    told(train, "open_data", lambda *_: "data")
    told(train, "train_job", lambda *_: "start")
    told(train, "choose_precision", lambda *_: "trial", lambda *_: "start")
    told(run.Run, "last", lambda run: "resume" if run._checkpoints() else "start")
    told(run.Run, "save", lambda run, step, *_: f"save {step}", lambda run, step, *_: f"saved {step}")
    told(loop, "step", None, lambda *_: "step")
    told(loop, "evaluate", lambda *_: "validation", lambda *_: "step")
    told(rng, "chunk_seed", lambda *given: "chunk" if given[3] == -1 else "")  # each chunk of an evaluation
    told(train, "judged", lambda *_: "evaluation")
    told(report, "draw_inside", lambda *_: "report")
    tell("start")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    exec(before, globals() | locals())
    code = cli.run(argv)
    os._exit(code)


for line in sys.stdin:
    job = json.loads(line)
    go, ready = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ready)
            os.read(go, 1)
            child(fd=int(sys.argv[1]), **job)
        finally:
            os._exit(99)
    print(pid, flush=True)
    sys.stdin.readline()
    os.close(ready)  # go
    os.close(go)
    sys.stdin.readline()  # not before it is told: until then the number is nobody else's
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Family:
    """A shipped recipe made small, with its command."""

    def __init__(self, name: str, *more: str, steps: int = 0) -> None:
        fixed = [
            "train.layout=plain",
            "train.matmul=default",
            "train.device=cpu",
            "train.log_steps=3",
        ]  # what two unbroken runs might choose differently
        fixed += [] if any(s.startswith("train.precision") for s in more) else ["train.precision=fp32"]
        sets = [s for s in SMALL[name] if not (steps and re.match(r"train\.(steps|epochs)=", s))] + (
            [f"train.steps={steps}"] if steps else []
        )
        self.name = name
        self.sets = [w for s in (*fixed, *sets, *more) for w in ("--set", s)]

    def command(self, out: Path) -> list[str]:
        return ["train", f"recipe:{self.name}", "--out", str(out), *self.sets]


class Parent:
    """The process that has everything imported and forks a child for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, None
        self.words, theirs = os.pipe()
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(theirs)], pass_fds=[theirs], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, text=True,
        )  # fmt: skip
        self.theirs = theirs

    def start(self, argv: list[str], slow: str = "", before: str = "") -> "Child":
        """slow: a word after which the child waits. before: a text of Python that it does first."""
        if self.running:  # of a test that failed
            self.running.end(9)
        self._write(json.dumps({"argv": argv, "errors": str(self.folder / "stderr.txt"), "slow": slow, "before": before}))
        self.running = Child(self, int(self.process.stdout.readline()))
        self._write("")
        return self.running

    def ended(self) -> int:
        """The exit code of the child, the signal with a minus, once it has ended."""
        self._write("")
        self.running = None
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def _write(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        if self.running:
            self.running.end(9)
        self.process.stdin.close()
        self.process.wait(60)
        os.close(self.words)
        os.close(self.theirs)


class Child:
    """One `cloche train`. words: what it has told so far, the last of them where it stands."""

    def __init__(self, parent: Parent, pid: int) -> None:
        self.parent, self.pid, self.words, self.t0, self._half = parent, pid, ["start"], time.monotonic(), b""
        self.handle = os.pidfd_open(pid)
        os.set_blocking(parent.words, False)

    def listen(self, seconds: float, word: str = "", times: int = 1) -> bool:
        """Until it has told a word that begins so, so many times, or time is over (False), or it has ended (False)."""
        end = time.monotonic() + seconds
        while not (word and sum(w.startswith(word) for w in self.words) >= times):
            ready = select.select([self.parent.words, self.handle], [], [], max(0, end - time.monotonic()))[0]
            self._read()
            if self.handle in ready or not ready:
                return bool(word) and sum(w.startswith(word) for w in self.words) >= times
        return True

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                *whole, self._half = (self._half + os.read(self.parent.words, 1 << 16)).split(b"\n")
                self.words += [w.decode() for w in whole]

    def end(self, sent: int = 0, seconds: float = 120) -> int:
        """Signal it, wait, and say how it ended."""
        if sent:
            os.kill(self.pid, sent)  # a process that has ended keeps its number until the parent is told
        ended = select.select([self.handle], [], [], seconds)[0]
        if not ended:
            os.kill(self.pid, 9)
        code = self.parent.ended()
        self._read()
        os.close(self.handle)
        assert ended, f"after {seconds} s it still ran, at: {self.words[-1]}"
        return code

    @property
    def where(self) -> str:
        """Where it stood when it ended: start-up, resume, loop, save, or end (the last evaluation, and the report)."""
        word = self.words[-1].split()[0]
        if word in ("save", "resume"):
            return word
        return {"step": "loop", "saved": "loop", "validation": "loop"}.get(
            word, "start-up" if word in ("start", "data", "trial") else "end"
        )

    def said(self) -> str:
        return (self.parent.folder / "stderr.txt").read_text()


def whole(out: Path) -> list[int]:
    """The steps of the checkpoints of a run, each of them read and found as it was written."""
    folders = sorted((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    for folder in folders:
        files.check_manifest(folder, "cloche checkpoint")
        files.read_tensors(folder / "state.safetensors")
    return [int(p.name.removeprefix("step-")) for p in folders]
