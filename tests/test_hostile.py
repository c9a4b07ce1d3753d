"""Run folders made by an enemy, who seals them anew so that every checksum fits: refused in words, soon, in little memory, alone.

Each field that a verb reads is replaced by what it never is, each file by what is no file. A verb then does its work or says what is
wrong; it opens nothing that the folder names, imports nothing, and a refusal costs a third of a second and 64 MiB at most.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
import resource
import shutil
import sys
import time
import tomllib

import pytest
import tomli_w

from cloche import cli, files
from cloche.errors import DONE, FAILED, WRONG_INPUT
from cloche.training import loop as loops
from cloche.training.run import KIND, SEALED

REFUSED_S = 0.1 * 3  # of processor time; three for a machine that others use too
REFUSED_BYTES = 64 << 20
VALUES = (None, True, -1, 0, 2**63, 10**9, 1e308, "x", "{0.__class__}", "$(touch touched)", "os:system", [], {}, [[1]], {"x": 1})
FEW = (None, -1, 2**63, "x", [], {})
FAST = ["train.precision=fp32", "train.layout=plain", "train.device=cpu", "train.batch=32"]
MLP = ["net.kind=mlp", "net.widths=[8]"]
# what of each family is fuzzed: recipe and its keys, an input of `predict`
FAMILIES = {
    "columns": (["spirals", "data.rows=60", *MLP, "train.epochs=4"], "0.5 -1"),
    "regress": (["curve", "data.rows=60", *MLP, "train.epochs=4"], "0.5"),
    "pictures": (["digits", "data.pixels=8", "data.channels=1", *MLP, "train.epochs=4", "train.batch=256"], None),
    "series": (["airline", "net.kind=gru", "net.width=4", "train.epochs=3"], None),
    "audio": (["dialtones", "data.rows=40", "net.kind=gru", "net.width=8", "train.epochs=1"], None),
    "text": (["TEXT", "data.window=32", "data.vocabulary=260", "net.kind=gpt", "net.width=16", "net.layers=1", "train.epochs=1"], "the"),
    "pairs": (
        ["dates", "data.rows=80", "data.tokens=characters", "data.vocabulary=300", "net.kind=transformer", "net.width=16", "net.layers=1"]
        + ["net.heads=2", "train.epochs=1"],
        "<iso>March 15, 2024",
    ),
    "captions": (
        ["digits-diffusion", "data.pixels=8", "net.width=8", "net.heads=2", "net.mults=[1]", "net.text.width=8", "net.text.layers=1"]
        + ['task.judge=""', "task.steps=2", "train.steps=2", "train.ema=0.0"],
        None,
    ),
}
pytestmark = [pytest.mark.usefixtures("quiet_machine"), pytest.mark.skipif(os.name != "posix", reason="not run: FIFOs, links, rusage")]


def call(*argv: object) -> tuple[int, str]:
    """A command in this process: (exit code, all that it said)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.run([str(a) for a in argv])
    return code, said.getvalue()


def command(family: str, home: Path, out: Path) -> list[str]:
    (recipe, *sets), _given = FAMILIES[family]
    recipe = str(home / "story.txt") if recipe == "TEXT" else recipe
    return ["train", recipe, "--out", str(out), *(word for s in [*FAST, *sets] for word in ("--set", s))]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "story.txt").write_text("\n\n".join(f"the {n} mice ate {n * 7 % 11} of the cheese, and slept." for n in range(200)))
    (folder / "sentinel").write_text("nobody may read this")
    return folder


@pytest.fixture(scope="module")
def whole(home) -> Callable[[str], Path]:
    """A finished run of a family, made once."""

    def make(family: str) -> Path:
        path = home / family
        if not path.exists():
            code, said = call(*command(family, home, path))
            assert code == DONE, said
        return path

    return make


@pytest.fixture(scope="module")
def half(home) -> Path:
    """A run that was stopped inside its second epoch, with two checkpoints."""
    path, patch, old = home / "half", pytest.MonkeyPatch(), loops.step

    def step(job, state, chunks, place):
        if place.step == 5:
            raise KeyboardInterrupt
        return old(job, state, chunks, place)

    patch.setattr(loops.Clock, "save_is_due", property(lambda clock: True))
    patch.setattr(loops, "step", step)
    code, _said = call(*command("pictures", home, path))
    patch.undo()
    assert code == 130 and len(list((path / "checkpoints").iterdir())) == 2
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- the watch --------------------------------------------------------------------------------------------------------------------

_watched: list[tuple[str, str]] | None = None
EVENTS = ("open", "import", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")


def _hear(event: str, given: tuple) -> None:
    if _watched is not None and event in EVENTS:
        _watched.append((event, os.fsdecode(given[0]) if given and isinstance(given[0], str | bytes) else ""))


sys.addaudithook(_hear)


class Verdict:
    """One command on one folder: what was wrong with how it ended, in words; "" when nothing was."""

    def __init__(self, argv: list[object], refused: bool | None = None) -> None:
        global _watched
        modules, peak, t0 = set(sys.modules), _peak(), time.process_time()
        _watched, seen = [], []
        try:
            self.code, self.said = call(*argv)
        except BaseException as fault:  # noqa: BLE001 what a person must never see, a panic of Rust included
            self.code, self.said = -1, f"{type(fault).__name__}: {fault}"
        finally:
            seen, _watched = _watched, None
        self.s, self.grown = time.process_time() - t0, _peak() - peak
        wrong = []
        if self.code not in ((FAILED, WRONG_INPUT) if refused else (DONE, FAILED, WRONG_INPUT)):
            wrong.append(f"exit code {self.code}")
        if "Traceback" in self.said or "itself failed" in self.said or self.code == -1:
            wrong.append(next((line for line in self.said.splitlines() if "itself failed" in line), self.said[-200:]))
        if self.code != DONE and self.s > REFUSED_S:
            wrong.append(f"{self.s:.2f} s")
        if self.grown > REFUSED_BYTES:
            wrong.append(f"{self.grown >> 20} MiB")
        wrong += [f"{event} {name}" for event, name in seen if event not in ("open", "import") or "sentinel" in name]
        wrong += [f"imported {name}" for name in set(sys.modules) - modules if name.split(".")[0] in STRANGE]
        self.wrong = ", ".join(wrong)


STRANGE = {"antigravity", "this", "turtle", "pdb", "webbrowser", "pty"}  # what the folders name, and nobody else imports


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# --- an enemy's tools -------------------------------------------------------------------------------------------------------------


def seal(run: Path, files_listed: dict | None = None, **more: object) -> None:
    """The manifest that fits what lies there now, or says what it likes: its own sha256 fits too."""
    listed = {}
    for name in SEALED:
        data = (run / name).read_bytes() if (run / name).is_file() else b""
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    said = {"kind": KIND, "format": 1, "files": listed if files_listed is None else files_listed, "facts": {}} | more
    text = json.dumps({k: said[k] for k in ("kind", "format", "facts", "files")})
    (run / files.MANIFEST).write_text(json.dumps(json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1))


def leaves(tree: object, at: tuple = ()) -> Iterator[tuple]:
    """The place of every value: of a list the first two, tables and lists themselves too."""
    if at:
        yield at
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from leaves(value, (*at, key))


def changed(tree: object, at: tuple, value: object) -> object:
    """A copy with another value there; GONE takes the key out."""
    tree = json.loads(json.dumps(tree))
    here = tree
    for key in at[:-1]:
        here = here[key]
    if value is GONE:
        del here[at[-1]]
    else:
        here[at[-1]] = value
    return tree


GONE = object()


def fuzz(run: Path, name: str, values: tuple, commands: Callable[[Path], list[list[object]]]) -> tuple[int, list[str]]:
    """Each value of a JSON or TOML file replaced by each of values, sealed anew, and shown to every command."""
    path, faults, n = run / name, [], 0
    for argv in commands(run):
        call(*argv)  # what is loaded once is not the hostile file's
        verdict = Verdict(argv)
        assert verdict.code == DONE and not verdict.wrong, verdict.said + verdict.wrong
    before, manifest = path.read_bytes(), (run / files.MANIFEST).read_bytes() if (run / files.MANIFEST).exists() else b""
    toml = name.endswith(".toml")
    tree = tomllib.loads(before.decode()) if toml else json.loads(before)
    for at in leaves(tree):
        for value in (*values, GONE):
            try:
                new = changed(tree, at, value)
                path.write_text(tomli_w.dumps(new) if toml else json.dumps(new))
            except (TypeError, ValueError):  # TOML knows no null
                continue
            if manifest:
                seal(run)
            for argv in commands(run):
                n += 1
                verdict = Verdict(argv)
                if verdict.wrong:
                    faults.append(f"{argv[0]}: {name} {'.'.join(map(str, at))} = {'gone' if value is GONE else value!r}: {verdict.wrong}")
    path.write_bytes(before)
    if manifest:
        (run / files.MANIFEST).write_bytes(manifest)
    return n, faults


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, symlinks=True))


def asked(family: str, run: Path, verb: str) -> list[object]:
    given = FAMILIES[family][1]
    return {
        "evaluate": ["evaluate", run],
        "report": ["report", run],
        "explain": ["explain", run, *([given] if given else [])],
        "predict": ["predict", run, given],
        "generate": ["generate", run, given or "a", "--seed", "3", *(["--length", "3"] if given else ["--out", "drawn.png"])],
    }[verb]


# --- every field ------------------------------------------------------------------------------------------------------------------

FIELDS = [
    ("columns", "facts.json", "evaluate predict", VALUES),
    ("regress", "facts.json", "predict", FEW),
    ("captions", "facts.json", "evaluate", FEW),
    ("columns", "prepare.json", "predict", VALUES),
    ("text", "prepare.json", "predict generate", VALUES),
    ("pairs", "prepare.json", "predict", VALUES),
    ("series", "prepare.json", "evaluate", VALUES),
    ("audio", "prepare.json", "evaluate", VALUES),
    ("captions", "prepare.json", "generate", FEW),
    ("pictures", "prepare.json", "evaluate", VALUES),
    ("columns", "recipe.toml", "predict", VALUES),
    ("pictures", "recipe.toml", "evaluate", FEW),
    ("series", "recipe.toml", "evaluate", FEW),
    ("audio", "recipe.toml", "evaluate", FEW),
    ("text", "recipe.toml", "predict", FEW),
    ("pairs", "recipe.toml", "predict", FEW),
    ("captions", "recipe.toml", "evaluate", FEW),
    ("columns", "results.json", "evaluate", VALUES),
    ("pictures", "results.json", "evaluate", FEW),
    ("pictures", "results.json", "report", (None, 2**63, "x")),
]


@pytest.mark.parametrize(("family", "name", "verbs", "values"), FIELDS, ids=[f"{f} {n} {v}" for f, n, v, _values in FIELDS])
def test_no_field_says_what_it_likes(family, name, verbs, values, whole, tmp_path):
    run = copy(whole(family), tmp_path / "run")
    n, faults = fuzz(run, name, values, lambda run: [asked(family, run, verb) for verb in verbs.split()])
    print(f"{n} states")
    assert n > 50
    assert not faults, "\n".join(faults)
    assert not (tmp_path / "touched").exists()
