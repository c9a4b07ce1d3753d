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
import subprocess
import sys
import time
import tomllib

import pytest
import tomli_w
import torch

from cloche import cli, files
from cloche.errors import DONE, FAILED, WRONG_INPUT
from cloche.training import loop as loops
from cloche.training.run import KIND, SEALED

REFUSED_S = 0.1 * 3  # of processor time; three for a machine that others use too
REFUSED_BYTES = 64 << 20
VALUES = (None, True, -1, 0, 2**63, 10**9, 1e308, "x", "{0.__class__}", "$(touch touched)", "os:system", [], {}, [[1]], {"x": 1})
FEW = (None, -1, 2**63, "x", [], {})
FAST = ["train.precision=fp32", "train.layout=plain", "train.matmul=default", "train.device=cpu", "train.batch=32"]
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
        for _again in range(2 if self.code > 0 and self.s > REFUSED_S else 0):  # the best of three: other programs share the caches
            t0 = time.process_time()
            call(*argv)
            self.s = min(self.s, time.process_time() - t0)
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


@pytest.mark.faults
@pytest.mark.parametrize(("family", "name", "verbs", "values"), FIELDS, ids=[f"{f} {n} {v}" for f, n, v, _values in FIELDS])
def test_no_field_says_what_it_likes(family, name, verbs, values, whole, tmp_path):
    run = copy(whole(family), tmp_path / "run")
    n, faults = fuzz(run, name, values, lambda run: [asked(family, run, verb) for verb in verbs.split()])
    print(f"{n} states")
    assert n > 50
    assert not faults, "\n".join(faults)
    assert not (tmp_path / "touched").exists()


# --- what is no file of ours ------------------------------------------------------------------------------------------------------

READ = [*SEALED, "manifest.json", "events.jsonl", "report/inside.json"]
TEXTS = {
    "empty": b"",
    "NUL": bytes(4096),
    "deep": b"[" * 60_000,
    "deep tables": b'{"a":' * 60_000,
    "key twice": b'{"kind": "columns", "kind": "columns"}',
    "NaN": b'{"kind": NaN}\n',
    "long number": b'{"n": ' + b"9" * 60_000 + b"}\n",
    "no UTF-8": b'{"kind": "\xff"}\n',
    "list": b"[]\n",
    "number": b"7\n",
    "dots": b"a." * 30_000 + b"a=1",
    "dots of tables": (b"[" + b"a." * 490 + b"a]\n") * 60,
    "pickle": b"\x80\x04cos\nsystem\n(S'touch touched'\ntR.",
}


def put(path: Path, kind: str, sentinel: Path) -> None:
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link outside":
        path.symlink_to(sentinel)
    elif kind == "link to nothing":
        path.symlink_to(path.parent.parent.parent / "nothing")
    elif kind == "1 GB of holes":
        with path.open("wb") as file:
            file.truncate(1 << 30)
    elif kind != "gone":
        path.write_bytes(TEXTS[kind])


@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_of_a_run_is_refused(name, whole, home, tmp_path):
    """Of manifest, log and pictures it is enough that a verb ends in words; what the manifest vouches for has to be refused."""
    faults = []
    for kind in (*TEXTS, "FIFO", "folder", "link outside", "link to nothing", "1 GB of holes", "gone"):
        if kind == "1 GB of holes" and name == "model.safetensors":
            continue  # its sha256 is taken first: as long as reading it takes
        run = copy(whole("columns"), tmp_path / kind.replace(" ", "-"))
        for verb in ("report", "evaluate") if kind == "empty" else ():
            call(*asked("columns", run, verb))
        put(run / name, kind, home / "sentinel")
        if name != files.MANIFEST and kind != "1 GB of holes":
            seal(run)
        elif name != files.MANIFEST:
            sizes = {n: {"bytes": (run / n).stat().st_size, "sha256": "0" * 64} for n in SEALED}
            seal(run, sizes)
        for verb in ("evaluate", "predict", "report", "explain"):
            verdict = Verdict(
                asked("columns", run, verb),
                refused=(name in SEALED and (verb, name) != ("report", "model.safetensors"))
                or (name == files.MANIFEST and kind != "gone")
                or None,
            )
            if verdict.wrong:
                faults.append(f"{verb}: {name}, {kind}: {verdict.wrong}")
        shutil.rmtree(run)
    assert not faults, "\n".join(faults)
    assert (home / "sentinel").read_text() == "nobody may read this"
    assert not (tmp_path / "touched").exists()


NAMES = ["../sentinel", "/etc/passwd", "a\\b", "a\0b", "C:x", "", ".", "a/../../x", "sentinel/", "\x1b[2J", "x" * 5000]


def test_a_manifest_names_what_a_run_has_and_nothing_else(whole, tmp_path):
    run, faults = copy(whole("columns"), tmp_path / "run"), []
    many = {f"{n}": {"bytes": 0, "sha256": ""} for n in range(30_000)}  # each could be a link to the same large file
    listings = [{name: {"bytes": 1, "sha256": "x"}} for name in NAMES] + [{}, many, dict.fromkeys(SEALED)]
    said = [{"files": f} for f in listings] + [
        {k: v} for k in ("kind", "format", "facts", "files") for v in VALUES if (k, v) != ("format", True)
    ]
    for more in said:
        seal(run, **more)
        verdict = Verdict(["evaluate", run], refused=None if "facts" in more else True)
        if verdict.wrong:
            faults.append(f"{more!r:.80}: {verdict.wrong}")
    assert not faults, "\n".join(faults)


# --- tokenizers -------------------------------------------------------------------------------------------------------------------


def tokenizers(text: str) -> Iterator[tuple[str, dict]]:
    ours = json.loads(text)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    yield "a pattern without end", {**ours, "pre_tokenizer": split}
    yield "a normalizer", {**ours, "normalizer": {"type": "Replace", "pattern": {"Regex": "(e|ee)+x"}, "content": "x" * 10**6}}
    yield "a template", {**ours, "post_processor": {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 0]}}
    yield "padding", {**ours, "padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_token": "x"} | {
        "pad_type_id": 0, "pad_to_multiple_of": None}}  # fmt: skip
    yield "another model", {**ours, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["x", 0.0]], "byte_fallback": False}}
    vocabulary = ours["model"]["vocab"]
    first = next(iter(vocabulary))
    for what, number in (("ids with a gap", 10**9), ("a negative id", -1), ("an id twice", 1), ("an id of 2**64", 2**64)):
        yield what, {**ours, "model": {**ours["model"], "vocab": {**vocabulary, first: number}}}
    yield "an added token", {**ours, "added_tokens": [{"id": 10**6, "content": "$(touch touched)", "special": True}]}
    yield "no vocabulary", {**ours, "model": {**ours["model"], "vocab": {}}}
    yield "merges of nothing", {**ours, "model": {**ours["model"], "merges": [["nothing", "else"]]}}
    yield "null", {}


@pytest.mark.parametrize("family", ["text", "pairs"])
def test_only_a_tokenizer_of_ours_is_opened(family, whole, tmp_path):
    run, faults = copy(whole(family), tmp_path / "run"), []
    call(*asked(family, run, "predict"))
    ours = json.loads((run / "prepare.json").read_text())
    for what, text in [*((w, json.dumps(t)) for w, t in tokenizers(ours["tokenizer"])), ("a path", "/etc/passwd"), ("no JSON", "{")]:
        (run / "prepare.json").write_text(json.dumps({**ours, "tokenizer": text}))
        seal(run)
        harmless = family == "pairs" and what == "merges of nothing"  # words have no merges
        verdict = Verdict(asked(family, run, "predict"), refused=None if harmless else True)
        if verdict.wrong:
            faults.append(f"{what}: {verdict.wrong}")
    assert not faults, "\n".join(faults)


# --- weights and checkpoints ------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_of_this_net(whole, tmp_path):
    run, faults = copy(whole("columns"), tmp_path / "run"), []
    ours, _facts = files.read_tensors(run / "model.safetensors")
    name = next(iter(ours))
    for what, weights in {
        "none": {},
        "one less": {k: t for k, t in ours.items() if k != name},
        "one more": {**ours, "net/../../x": torch.zeros(1)},
        "another shape": {**ours, name: torch.zeros(3)},
        "no dims": {**ours, name: torch.zeros(())},
        "nothing in it": {**ours, name: torch.zeros(0, 1 << 40)},
    }.items():
        (run / "model.safetensors").write_bytes(b"".join(files.tensor_file(weights, {})))
        seal(run)
        verdict = Verdict(["evaluate", run], refused=True)
        if verdict.wrong:
            faults.append(f"{what}: {verdict.wrong}")
    assert not faults, "\n".join(faults)


def resume(half: Path, home: Path, to: Path, spoil: Callable[[Path], None], refused: bool | None = None) -> str:
    """The command that goes on, on a copy that was spoiled: what was wrong with how it ended."""
    run = copy(half, to)
    spoil(run)
    verdict = Verdict(command("pictures", home, run), refused)
    shutil.rmtree(run)
    return verdict.wrong


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir(), key=lambda p: int(p.name.removeprefix("step-")))


def respoil(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (newest(run) / name).write_bytes(data)
        files.write_manifest(newest(run), "cloche checkpoint", ["state.safetensors", "place.json"])

    return spoil


def test_a_checkpoint_made_by_an_enemy(half, home, tmp_path):
    faults, n = [], 0
    assert not resume(half, home, tmp_path / "as-it-is", lambda run: None)
    place = json.loads((newest(half) / "place.json").read_text())
    for at in leaves(place):
        for value in (None, -1, 2**63, "x", [], GONE):
            n += 1
            wrong = resume(half, home, tmp_path / "place", respoil("place.json", json.dumps(changed(place, at, value)).encode()))
            faults += [f"{'.'.join(map(str, at))} = {value!r}: {wrong}"] if wrong else []
    state, _facts = files.read_tensors(newest(half) / "state.safetensors")
    net = next(k for k in state if k.startswith("net/"))
    for name in ("optim/999/x", "optim/x/y", "optim/1/2/3", "optim//", "best/x", "ema/x", "carry/x", "carry/-1/x", net):
        n += 1
        spoiled = respoil("state.safetensors", b"".join(files.tensor_file({**state, name: torch.zeros(3, 5)}, {})))
        wrong = resume(half, home, tmp_path / "state", spoiled, refused=None if name == "carry/-1/x" else True)
        faults += [f"{name}: {wrong}"] if wrong else []
    print(n, "states")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "README.md", "model.safetensors", "report", "facts.json", "checkpoints"])
def test_no_link_of_a_run_leads_a_writer_out_of_it(name, half, home, tmp_path):
    def spoil(run: Path) -> None:
        target = home / "sentinel" if name not in ("report", "checkpoints") else home
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)

    assert not resume(half, home, tmp_path / "run", spoil, refused=True)
    assert (home / "sentinel").read_text() == "nobody may read this"


# --- seen from outside ------------------------------------------------------------------------------------------------------------


@pytest.mark.needs("strace")
def test_the_kernel_sees_no_file_no_socket_and_no_program_of_an_enemy(whole, home, tmp_path):
    """Strings that other libraries import, run, read or fetch, in every text of a run; Rust and C are seen here too."""
    run = copy(whole("text"), tmp_path / "run")
    evil = [str(home / "sentinel"), "http://127.0.0.1:9/x", "os:system", "$(touch touched)", "{0.__class__}", "antigravity"]
    for name in ("facts.json", "results.json"):
        tree = json.loads((run / name).read_text())
        for k, at in enumerate([a for a in leaves(tree) if a != ("source",)]):
            with contextlib.suppress(LookupError, TypeError):
                here = tree
                for key in at[:-1]:
                    here = here[key]
                if isinstance(here[at[-1]], str) and at[-1] not in ("part", "headline", "kind"):
                    here[at[-1]] = evil[k % len(evil)]
        (run / name).write_text(json.dumps(tree))
    seal(run)
    more = copy(run, tmp_path / "more")
    ours = json.loads((more / "prepare.json").read_text())
    (more / "prepare.json").write_text(json.dumps({**ours, "tokenizer": str(home / "sentinel")}))
    seal(more)
    told = "from cloche.cli import run\n" + "\n".join(
        f"print('code', run({[str(a) for a in asked('text', r, verb)]!r}))"
        for r in (run, more)
        for verb in ("evaluate", "predict", "report")
    )
    log = tmp_path / "trace"
    trace = ["strace", "-f", "-o", str(log), "-s", "4096", "-e", "trace=open,openat,openat2,connect,execve,execveat"]
    done = subprocess.run([*trace, sys.executable, "-c", told], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0"] * 3 + ["code 1", "code 1", "code 0"], done.stdout + done.stderr
    seen = log.read_text().splitlines()
    assert sum("run/facts.json" in line for line in seen) >= 3  # it does see what is opened
    assert not [line for line in seen if "sentinel" in line or "connect(" in line]
    assert sum("execve(" in line and "ENOENT" not in line for line in seen) == 1  # python itself
    assert not (tmp_path / "touched").exists()


# --- without asserts, as `python -OO` runs it -------------------------------------------------------------------------------------


def optimised(*argv: object, flags: tuple[str, ...]) -> tuple[int, object]:
    """A command in a process of its own: (exit code, the JSON without what a clock or a name says)."""
    line = [sys.executable, *flags, "-m", "cloche", *map(str, argv), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else done.stderr
    for key in ("seconds", "speed"):
        found.pop(key, None) if isinstance(found, dict) else None
    return done.returncode, found


@pytest.mark.faults
def test_the_commands_do_the_same_without_asserts(half, home, tmp_path):
    train = command("columns", home, tmp_path / "run")
    wanted = (DONE, DONE, DONE, DONE, DONE, WRONG_INPUT, FAILED, FAILED)
    told = []
    for flags in ((), ("-OO",)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.rmtree(tmp_path / "evil", ignore_errors=True)
        found = [optimised(*train, flags=flags)]
        found += [optimised(*asked("columns", tmp_path / "run", v), flags=flags) for v in ("evaluate", "predict", "explain", "report")]
        found += [optimised(*train, "--set", "net.widths=[0]", "--set", "optim.rate=1", flags=flags)]
        cut = newest(copy(half, tmp_path / "cut")) / "state.safetensors"
        cut.write_bytes(cut.read_bytes()[:-1])
        found += [optimised(*command("pictures", home, tmp_path / "cut"), flags=flags)]
        evil = copy(tmp_path / "run", tmp_path / "evil")
        facts = json.loads((evil / "facts.json").read_text())
        (evil / "facts.json").write_text(json.dumps({**facts, "labels": 2**63}))
        seal(evil)
        found += [optimised("evaluate", evil, flags=flags)]
        told.append(found)
    assert tuple(code for code, _said in told[0]) == wanted, told[0]
    assert told[0] == told[1]
