"""Without power at any moment: nothing torn, nothing lost that was acknowledged, for every file that `cloche train` writes."""

import json
from pathlib import Path
import sys
import time
import tomllib

from explorer import explore, read, trace
import pytest
from test_resume import MLP

from cloche import files, folders
from cloche.data import store
from cloche.errors import STOPPED, UserError
from cloche.recipe import parse
from cloche.training.run import KIND, Run
from cloche.use.model import read_prepare

pytestmark = [pytest.mark.needs("strace")]

TRAIN = """
import os, signal, sys
from pathlib import Path
from cloche import start
start.tune_allocator()
root, stop = Path(sys.argv[1]), int(sys.argv[2])
acks = os.open(root / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def acknowledging(function, word):
    def call(first, *given, **named):
        result = function(first, *given, **named)
        what = os.path.relpath(first, root) if word == "wrote" else given[0] if word == "saved" else ""
        os.write(acks, f"{word} {what}\\n".encode())
        return result
    return call

from cloche import files, folders
files.durable_write = acknowledging(files.durable_write, "wrote")
files.write_folder = acknowledging(files.write_folder, "wrote")
from cloche.training import loop
from cloche.training.run import Run
from cloche.use import train
Run.save = acknowledging(Run.save, "saved")
Run.finish = acknowledging(Run.finish, "finished")
train.limit_of = lambda *given: 1e9
step = loop.step

def stepping(job, state, chunks, place):
    if place.step == stop:
        signal.raise_signal(signal.SIGTERM)
    return step(job, state, chunks, place)

loop.step = stepping
loop.Clock.save_is_due = property(lambda clock: len(clock.steps_s) % 3 == 0)
from cloche.cli import run
sys.exit(run(sys.argv[3:]))
"""


def refused(read, *given, **named) -> list[str]:
    try:
        read(*given, **named)
    except (UserError, ValueError, OSError, KeyError, TypeError) as fault:
        return [f"{read.__name__}{given}: {fault}"]
    return []


def of_a_run(disk: Path, acks: list[str]) -> tuple[list[str], list[str]]:
    """What the real readers refuse; which checkpoint the next start would begin with."""
    run, torn, lost = disk / "runs/mine", [], []
    for name in ("prepare.json", "facts.json", "results.json", "report/inside.json"):
        torn += refused(files.read_json, run / name) if (run / name).exists() else []
    torn += refused(lambda: tomllib.loads((run / "recipe.toml").read_text())) if (run / "recipe.toml").exists() else []
    torn += refused(read_prepare, run) if (run / "prepare.json").exists() else []
    torn += refused(files.read_tensors, run / "model.safetensors") if (run / "model.safetensors").exists() else []
    torn += refused(files.check_manifest, run, KIND) if (run / "manifest.json").exists() else []
    if (run / "facts.json").exists() and not ((run / "recipe.toml").exists() and (run / "prepare.json").exists()):
        torn.append("facts.json stands without the others")
    for folder in (run / "checkpoints").glob("step-*"):
        torn += refused(files.check_manifest, folder, "cloche checkpoint") + refused(files.read_tensors, folder / "state.safetensors")
    for folder in (disk / "cache/stores").glob("[!.]*"):
        torn += refused(files.check_manifest, folder, "cloche store") + refused(store._load, folder)
    saved = max((int(ack.split()[1]) for ack in acks if ack.startswith("saved")), default=-1)
    if torn or saved < 0 or (run / "manifest.json").exists():
        return torn, lost
    begun = Run(run)
    found = begun.last()  # cuts the log
    if found is None or begun.last_saved < saved:
        lost.append(f"step {saved} was saved, {begun.last_saved} is found")
    elif not begun.log.exists() or begun.log.stat().st_size != found[1]["events_bytes"]:
        lost.append("lines of events.jsonl from before the checkpoint")
    return torn, lost


@pytest.mark.faults
def test_every_disk_that_cloche_train_may_leave(tmp_path):
    """Two processes: the first is asked to stop in step 8, the second goes on from there to the finished run and its report."""
    root, driver = tmp_path / "root", tmp_path / "driver.py"
    root.mkdir()
    driver.write_text(TRAIN)
    (tmp_path / "mine.toml").write_text(MLP.replace("epochs = 2", "epochs = 1").replace("batch = 64", "batch = 100"))
    environment = {"CLOCHE_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["train", str(tmp_path / "mine.toml"), "--out", str(root / "runs/mine")]
    t0, operations = time.perf_counter(), []
    for stop, code in ((8, STOPPED), (-1, 0)):
        start = [sys.executable, str(driver), str(root), str(stop), *command]
        operations += trace(start, root, tmp_path / "log", code, **environment)
    t1 = time.perf_counter()
    acks = [operation[1] for operation in operations if operation[0] == "ack"]
    print(f"{len(operations)} operations traced in {t1 - t0:.1f} s; acknowledged: {acks}")
    found = explore(operations, root, tmp_path / "disk", of_a_run, passing="/checkpoints/")
    print(f"{found.states} disks looked at in {time.perf_counter() - t1:.1f} s: {len(found.torn)} torn, {len(found.lost)} lost")
    names = ("recipe.toml", "prepare.json", "facts.json", "model.safetensors", "results.json", "README.md", "manifest.json")
    names = [f"runs/mine/{name}" for name in (*names, "report/inside.json", "report/index.html", "checkpoints/step-6")]
    assert {f"wrote {name}" for name in names} <= set(acks) and any(ack.startswith("wrote cache/stores/") for ack in acks)
    assert [ack for ack in acks if ack.startswith("saved")][-1] == "saved 13" and "finished " in acks
    assert (found.torn[:5], found.lost[:5]) == ([], [])


def test_what_a_killed_process_left_in_the_cache_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOCHE_CACHE", str(tmp_path))
    litter = tmp_path / "stores/.f315.tmp-999999999-0badcafe"  # above the largest pid that Linux gives out
    litter.mkdir(parents=True)
    (litter / "label.npy").write_bytes(b"half")
    store.open_store(parse(tomllib.loads(MLP), "mine").data)
    assert [p.name[0] != "." for p in (tmp_path / "stores").iterdir()] == [True]


# The explorer finds what it is for: the real module with one thing left out.

PLACED = "        os.replace(temp, target)\n    return sha"
UNSYNCED = ("        os.fsync(file.fileno())  # never twice", "        pass  #")
MUTANTS = {
    "as it is": [],
    "no sync of files": [UNSYNCED],
    "no sync of folders": [("        os.fsync(fd)\n", "        pass\n")],
    "sync after the rename": [UNSYNCED, (PLACED, PLACED.replace("\n", "\n    os.fsync(os.open(target, os.O_RDONLY))\n"))],
    "unlinked first": [(PLACED, "        target.unlink(missing_ok=True)\n" + PLACED)],
    "made, not synced": [("            target.mkdir(exist_ok=True)", "            pass\n        path.mkdir()")],
    "removed under its name": [
        ("    os.replace(path, temp)\n    files._sync_folder(path.parent)\n    files._clear(temp)", "    files.shutil.rmtree(path)")
    ],
}

WRITES = """
import json, os, sys
from pathlib import Path
from types import ModuleType
import torch  # once for all
import cloche
for name, sources in json.loads(Path(sys.argv[1]).read_text()).items():
    if os.fork():
        os.wait()
        continue
    root = Path(name)
    root.mkdir()
    files, folders = ModuleType("files"), ModuleType("folders")
    cloche.files = sys.modules["cloche.files"] = files
    for module, source in zip((files, folders), sources):
        exec(source, module.__dict__)
    acks = os.open(root / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for i in range(2):
        files.durable_write(root / "one", str(i).encode() * 100)
        os.write(acks, b"wrote one\\n")
        files.write_folder(root / "two", {"x": str(i).encode() * 50, "y": [b"y", b"z"]}, "kind", {})
        os.write(acks, b"wrote two\\n")
    folders.make_folder(root / "a/b")
    files.durable_write(root / "a/b/three", b"3")
    os.write(acks, b"wrote a/b/three\\n")
    files.write_folder(root / "four", {"x": b"4"}, "kind", {})
    folders.remove_folder(root / "four")
    os._exit(0)
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """All mutants in one process that imports torch once; the operations of each below its own folder."""
    folder = tmp_path_factory.mktemp("mutants")
    sources = {}
    for name, changes in MUTANTS.items():
        texts = [Path(module.__file__).read_text() for module in (files, folders)]
        for old, new in changes:
            assert sum(text.count(old) for text in texts) == 1, f"{name}: {old!r} is in the real modules not once"
            texts = [text.replace(old, new) for text in texts]
        sources[str(folder / name)] = texts
    (folder / "sources.json").write_text(json.dumps(sources))
    trace([sys.executable, "-c", WRITES, str(folder / "sources.json")], folder, folder / "log", PYTHONPATH=str(Path(__file__).parents[1]))
    return folder


@pytest.mark.parametrize("name", MUTANTS)
def test_a_writer_with_one_thing_left_out_is_found(traced, name, tmp_path):
    found = explore(list(read(traced / "log", str(traced / name))), traced / name, tmp_path / "disk", enough=99)
    print(f"{name}: {found.operations} operations, {found.states} disks, {len(found.torn)} torn, {len(found.lost)} lost")
    assert found.operations > 30
    if name == "as it is":
        assert (found.torn, found.lost) == ([], [])
    else:
        assert found.torn or found.lost
    if name in ("no sync of files", "sync after the rename", "removed under its name"):
        assert found.torn
    if name in ("unlinked first", "made, not synced"):
        assert found.lost
