"""A disk that says no, at every write, fsync and rename of a run folder: told by name, and the checkpoint before it loads to the bit."""

import errno
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest
import torch

from cloche import files
from cloche.errors import FAILED, STOPPED, WRONG_INPUT
from cloche.training.run import KIND, Run

pytestmark = [pytest.mark.needs("strace"), pytest.mark.faults]

AT = 300  # strace makes the 300th call of a process fail: 300 - k calls that do nothing come first, so that it is the k-th that counts
FACTS = {"source": "a.csv", "kind": "columns", "labels": [], "outputs": 1, "multi": False, "n": 9, "parts": {"train": 9}, "left_out": []}
FACTS |= {"fingerprint": "f", "device": "cpu", "torch": "2", "cloche": "0", "threads": 1, "parameters": 7, "flops": 9.0}
STEPS = (4, 8, 12)  # the first is saved before anything fails, the third throws the first out

DRIVER = """
import json, os, shutil, sys
from pathlib import Path
import torch
from cloche.errors import UserError
from cloche.training.run import Run

FACTS = json.loads(sys.argv.pop())

def tensors(step):
    return {"a": torch.arange(6.0) * step, "b": torch.full((2, 3), step)}

def life(folder, steps, ends):
    run = Run(folder)
    said = {"saved": []}
    try:
        run.open({"train": {"seed": 0}}, FACTS, False, ())
        run.begin("[train]\\nseed = 0\\n", FACTS, {"kind": "columns"})
        run.last()
        for step in steps:
            run.event(kind="step", step=step)
            place = {"step": step, "epoch": 0, "index": step}
            numbers = {"place": place, "best_value": [None, None], "best_step": 0, "waited": 0, "losses": None, "optim": "sgd"}
            numbers |= {"seconds": 1.0}
            run.save(step, tensors(step), numbers)
            said["saved"].append(step)
        if ends:
            run.finish(tensors(steps[-1]), {"accuracy": 1.0}, "# card")
            said["finished"] = True
    except UserError as fault:
        said |= {"code": fault.code, "name": fault.name, "text": str(fault)}
    except OSError as fault:
        said |= {"raw": str(fault)}
    return said

def nothing(call, count):  # calls that do nothing; how many of them failed in another way than they would
    strange = 0
    for _ in range(count):
        try:
            {"write": lambda: os.write(999, b""), "fsync": lambda: os.fsync(999), "rename": lambda: os.rename("", "")}[call]()
        except OSError as fault:
            strange += fault.errno != (2 if call == "rename" else 9)
    return strange

root, at, steps = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
if not os.fork():
    assert life(root / "before", steps[:1], False) == {"saved": steps[:1]}
    os._exit(0)
os.wait()
for call in ("write", "fsync", "rename"):
    for k in range(1, at):
        folder = root / f"{call}-{k}"
        shutil.copytree(root / "before", folder)
        if not os.fork():
            nothing(call, at - k)
            said = life(folder, steps[1:], True)
            over = nothing(call, at)
            (root / f"{call}-{k}.json").write_text(json.dumps(said | {"over": over > 0}))
            os._exit(1 if over else 0)
        if os.wait()[1]:
            break
"""


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0) * step, "b": torch.full((2, 3), step)}


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EFBIG", "EROFS"])
def test_a_disk_that_says_no_at_every_call(code, tmp_path):
    calls = "-e", "trace=write,fsync,?rename,?renameat,?renameat2"
    fail = [word for call in ("write", "fsync", "?rename,?renameat,?renameat2") for word in ("-e", f"inject={call}:error={code}:when={AT}")]
    driver = [sys.executable, "-c", DRIVER, str(tmp_path), str(AT), json.dumps(STEPS), json.dumps(FACTS)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "LANGUAGE": "en"}
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", *calls, *fail, *driver],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tried = {
        call: sorted(tmp_path.glob(f"{call}-*.json"), key=lambda p: int(p.stem.split("-")[1])) for call in ("write", "fsync", "rename")
    }
    names = {
        "ENOSPC": ("disk-full", STOPPED),
        "EFBIG": ("disk-full", STOPPED),
        "EROFS": ("read-only", WRONG_INPUT),
        "EIO": ("write-failed", FAILED),
    }
    told = 0
    for path in (path for paths in tried.values() for path in paths):
        said, folder = json.loads(path.read_text()), path.with_suffix("")
        where = f"{code} at {path.stem}: {said}"
        assert "raw" not in said, where  # an OSError without words
        if path in [paths[-1] for paths in tried.values()]:
            assert said == {"saved": list(STEPS[1:]), "finished": True, "over": True}, where  # all calls of the run are behind it
            continue
        assert not said["over"], where
        steps = [STEPS[0], *said["saved"]]
        if "name" in said:
            told += 1
            placed = "may not survive a power loss" in said["text"]
            assert (said["name"], said["code"]) == (("write-failed", FAILED) if placed else names[code]), where
            assert str(folder) in said["text"], where
            if said["name"] == "disk-full":
                assert re.search(r"[\d.]+\s[kMG]?B needed, [\d.]+\s[kMG]?B free; ", said["text"]), where
            if not re.search(r"/(\.lock|recipe\.toml|prepare\.json|facts\.json)\b", said["text"]):  # before it is known what is saved
                assert f"the last good step is {steps[-1]}" in said["text"], where
        else:
            assert said.get("finished"), where  # only what may fail did: a line of the log, a deletion
        run = Run(folder)
        try:  # the next start
            run.open({"train": {"seed": 0}}, FACTS, False, ())
            if run.finished:
                files.check_manifest(folder, KIND)
                found, step = files.read_tensors(folder / "model.safetensors")[0], STEPS[-1]
            else:
                found, step = run.last()[0], run.last_saved
                assert step in (steps[-1], STEPS[min(len(steps), 2)]), where  # the newer one: in place, though not acknowledged
        finally:
            run.close()
        assert all(torch.equal(found[name], wanted) for name, wanted in tensors(step).items()), where
        assert not [p for p in folder.rglob("*") if files._LITTER.fullmatch(p.name)], where
    print(f"{code}: " + ", ".join(f"{len(paths) - 1} of {call}" for call, paths in tried.items()) + f"; {told} told")
    assert min(map(len, tried.values())) > 8
    assert errno.errorcode[getattr(errno, code)] == code
