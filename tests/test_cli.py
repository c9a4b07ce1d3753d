"""The command itself: verbs, help, lists, one JSON object, what a machine may lack, and a console or disk that fails."""

import json
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch

from cloche import __version__, cli, start
from cloche.errors import DONE, FAILED, STOPPED, WRONG_INPUT

posix = pytest.mark.skipif(sys.platform == "win32", reason="limits and pipes of Unix")
PLAIN = ["--set", "train.precision=fp32", "--set", "train.layout=plain", "--set", "train.matmul=default", "--set", "train.device=cpu"]
POINTS = [*PLAIN, "--set", "data.rows=100", "--epochs", "2"]
TINY = [
    *PLAIN,
    "--set",
    "data.pixels=12",
    "--set",
    "data.channels=1",
    "--set",
    "net.stages=[[2]]",
    "--set",
    "net.hidden=4",
    "--epochs",
    "1",
]
VERBS = ("train", "verify-resume", "evaluate", "predict", "generate", "explain", "check", "report", "list")


pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.fixture
def cloche(capsys, tmp_path, monkeypatch):
    """A command in an empty folder: (exit code, stdout, stderr). It never ends in a trace."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.run([str(a) for a in argv])
        except SystemExit as done:  # --help and --version
            code = done.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "cloche itself failed" not in err, err
        return code, out, err

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert cli.run(["train", "spirals", *POINTS, "--out", str(root / "points")]) == DONE
    assert cli.run(["train", "curve", *POINTS, "--out", str(root / "curve")]) == DONE
    return root


def command(*argv: str, first: str = "", **how) -> subprocess.CompletedProcess:
    """A real process: `python -m cloche`, after a line of Python where one is given."""
    code = f"{first}\nimport sys\nsys.argv = ['cloche', *{list(argv)!r}]\nfrom cloche.__main__ import main\nmain()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run([sys.executable, "-c", code], env=env, timeout=120, **how)


# --- help, version, lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb_and_the_first_command(words, cloche):
    code, out, err = cloche(*words)
    assert code == DONE and err == "" and "Start with: cloche train digits" in out
    assert set(re.findall(r"^    ([\w-]+)(?:  |$)", out, re.M)) == set(VERBS)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, cloche):
    code, out, err = cloche(verb, "--help")
    assert code == DONE and err == "" and out.startswith(f"usage: cloche {verb} ") and "--json" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_version(cloche):
    assert cloche("--version") == (DONE, f"cloche {__version__}\n", "")


LISTS = {
    "recipes": "digits               cnn          digits",
    "nets": '[net] kind = "cnn"',
    "tasks": '[task] kind = "classify"',
    "data": "sets that need no download: digits, spirals, curve",
    "optim": "optim.lr                 0.001                  the learning rate",
    "train": "train.batch              64                     examples of one step",
    "schema": '"title": "cloche recipe"',
}


@pytest.mark.parametrize("what", LISTS)
def test_each_list(what, cloche):
    code, out, err = cloche("list", what)
    assert code == DONE and err == "" and LISTS[what] in out and "PydanticUndefined" not in out
    code, out, err = cloche("list", what, "--json")
    assert code == DONE and err == "" and isinstance(json.loads(out), dict)
    if what == "recipes":
        assert cloche("list") == cloche("list", what)


def test_a_list_that_there_is_not(cloche):
    code, _out, told = cloche("list", "net")
    assert code == WRONG_INPUT and 'there is no list "net"' in told and "did you mean: cloche list nets" in told
    assert "there are recipes, nets, tasks, data" in cloche("list", "xyzzy")[2]


# --- the wrong verb, the wrong option ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("trian", "train"),
        ("fit", "train"),
        ("test", "evaluate"),
        ("eval", "evaluate"),
        ("predcit", "predict"),
        ("lst", "list"),
        ("explian", "explain"),
    ],
)
def test_the_wrong_verb_names_the_right_one(wrong, right, cloche):
    code, out, told = cloche(wrong, "digits", "--set", "optim.lr=0.1")
    assert code == WRONG_INPUT and out == ""
    assert told == f'there is no verb "{wrong}"\n  did you mean: cloche {right}\n  see cloche --help\n'


def test_a_verb_near_none(cloche):
    code, _out, told = cloche("xyzzy")
    assert code == WRONG_INPUT and 'there is no verb "xyzzy"' in told and "there are " + ", ".join(VERBS) in told


@pytest.mark.parametrize(
    "words, text",
    [
        (["train"], "RECIPE"),
        (["predict", "runs/x"], "INPUT"),
        (["train", "digits", "--lr"], "--lr"),
        (["train", "digits", "--epoch", "3"], "--epoch"),  # no abbreviation: a new option could change its meaning
        (["predict", "runs/x", "in", "--js"], "--js"),
        (["train", "digits", "--folds", "many"], "many"),
        (["train", "digits", "spirals"], "spirals"),
        (["evaluate", "runs/x", "--set", "a=1"], "--set"),
    ],
)
def test_a_wrong_option_is_named(words, text, cloche, tmp_path):
    code, out, told = cloche(*words)
    assert code == WRONG_INPUT and out == "" and text in told.splitlines()[0] and re.search(r"see cloche( \w+)? --help", told)
    assert not list(tmp_path.iterdir())


# --- one JSON object --------------------------------------------------------------------------------------------------------------

SPEED = {"examples_per_s", "flops_per_s", "share_of_limit", "waiting_frac"}
SHAPE = {
    "run": str, "task": str, "part": str, "headline": str, "metrics": dict, "interval": list, "baseline": dict, "baselines": dict, "n": int,
    "seed": int, "steps": int, "seconds": float, "speed": dict,
}  # fmt: skip
CLASSES = {"per_class": dict, "confusion": list}


def one_object(out: str) -> dict:
    assert out.count("\n") == 1 and out.endswith("}\n")
    return json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


@pytest.mark.parametrize("name, more", [("points", CLASSES), ("curve", {})])
@pytest.mark.parametrize("words", [["train"], ["evaluate"], ["evaluate", "--data"]], ids=" ".join)
def test_the_shape_of_train_and_evaluate(words, name, more, cloche, made, tmp_path):
    run, recipe = shutil.copytree(made / name, tmp_path / "run"), {"points": "spirals", "curve": "curve"}[name]
    given = {"train": [recipe, *POINTS, "--out", run], "evaluate": [run]}[words[0]] + (words[1:] and ["--data", recipe])
    code, out, _told = cloche(words[0], *given, "--json")
    found = one_object(out)
    assert code == DONE and {k: type(v) for k, v in found.items()} == SHAPE | more
    assert found["run"] == str(run) and found["task"] == ("classify" if more else "regress") and found["part"] == "test"
    assert "loss" in found["metrics"] and ("accuracy" if more else "mse") in found["metrics"]
    assert all(type(v) is float for v in [*found["metrics"].values(), *found["speed"].values()])
    assert found["speed"].keys() >= SPEED and set(found["baseline"]) == {"value", "answer"}
    assert found["baselines"] == {found["baseline"]["answer"]: found["baseline"]["value"]} and found["headline"] in found["metrics"]
    low, high = found["interval"]
    assert low <= found["metrics"]["accuracy" if more else "mse"] <= high
    assert (found["n"], found["seed"], found["steps"]) == (20, 0, {"points": 4, "curve": 10}[name])


def test_the_shape_of_a_training_that_really_happens(cloche):
    code, out, told = cloche("train", "spirals", *POINTS, "--json")
    found = one_object(out)
    assert code == DONE and {k: type(v) for k, v in found.items()} == SHAPE | CLASSES and "epoch 2/2" in told
    results = json.loads(Path(found["run"], "results.json").read_text())
    assert found["metrics"] == results["metrics"] and found["seconds"] == results["seconds"]


def test_the_shape_of_predict(cloche, made):
    code, out, err = cloche("predict", made / "points", "0.5 1", "-1 0", "--json")
    found = one_object(out)
    assert code == DONE and err == "" and set(found) == {"predictions"}
    assert [set(a) for a in found["predictions"]] == [{"input", "label", "probabilities"}] * 2
    assert [a["input"] for a in found["predictions"]] == ["0.5 1", "-1 0"]
    for a in found["predictions"]:
        ranked = list(a["probabilities"].values())
        assert ranked == sorted(ranked, reverse=True) and a["label"] == next(iter(a["probabilities"]))
    (answer,) = one_object(cloche("predict", made / "curve", "0.5", "--json")[1])["predictions"]
    assert set(answer) == {"input", "value"} and type(answer["value"]) is float


@pytest.mark.parametrize(
    "words, wanted, name",
    [
        (["xyzzy"], WRONG_INPUT, "usage"),
        (["train"], WRONG_INPUT, "usage"),
        (["train", "digits", "--set", "net.kind=cn"], WRONG_INPUT, "recipe"),
        (["train", "digts"], WRONG_INPUT, "input"),
        (["train", "digits", "--set", "train.device=cuda:99"], WRONG_INPUT, "device"),
        (["predict", "nowhere", "x.png"], WRONG_INPUT, "input"),
        (["evaluate", "."], WRONG_INPUT, "not-a-run"),
    ],
)
def test_the_shape_of_a_fault(words, wanted, name, cloche):
    code, out, err = cloche(*words, "--json")
    found = one_object(out)
    assert code == wanted and set(found) == {"error"} and set(found["error"]) == {"what", "found", "do", "code"}
    assert found["error"]["code"] == name and found["error"]["what"] and found["error"]["do"]
    assert all(found["error"][k] in err for k in ("what", "found", "do"))


def test_the_fault_of_a_damaged_run_in_json(cloche, made, tmp_path):
    run = shutil.copytree(made / "points", tmp_path / "run")
    (run / "results.json").write_text("{}")
    code, out, _err = cloche("evaluate", run, "--json")
    assert code == FAILED and one_object(out)["error"]["code"] == "damaged"


# --- what is printed ----------------------------------------------------------------------------------------------------------------


def test_training_digits_prints_what_LOOK_shows_in_100_columns(cloche, monkeypatch):
    monkeypatch.setattr(start, "T0", time.perf_counter())  # this process is older than the command
    code, out, told = cloche("train", "digits", *TINY)
    lines = told.replace("\u00a0", " ").splitlines()
    assert code == DONE and out == "" and max(map(len, lines)) <= 100, max(lines, key=len)
    wanted = [
        r"digits     1 797 pictures in 10 classes, 8×8 → 12×12×1\. Nothing is downloaded\.",
        r"  classes  0 178 · 1 182 · .* · 9 180",
        r"  split    train 1 2\d\d · validation 1\d\d · test 3\d\d, alike in each class, twins together",
        r"  net      cnn, \d+ parameters · adam, lr 0\.001 · 1 epoch",
        r"  machine  cpu · 1 thread · fp32",
        r"epoch 1/1 ━{20} loss \d\.\d{3}  accuracy [\d.]+ %  validation [\d.]+ %   [\d ]+ pictures/s",
        r"test       accuracy [\d.]+ %  \(95 % interval [\d.]+–[\d.]+, n = 3\d\d, seed 0\)",
        r'           always answering "\d": [\d.]+ %      hardest: \d, read as \d in \d+ of \d+',
        r"speed      \d+ % of what this machine can multiply \([\d. ]+ of 1 GFLOP/s\) · waiting for data \d+ %",
        r"           at most [\d.]+ [MG]B of memory",
        r"runs/digits in [\d.]+ s   look   runs/digits/report/index\.html",
        r" +inside cloche explain runs/digits",
        r" +try    cloche predict runs/digits my\.png",
    ]
    assert len(lines) == len(wanted), told
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line
    assert Path("runs/digits/report/index.html").exists()
    starts = {line.index(word) for line, word in zip(lines[-3:], ("look", "inside", "try"), strict=True)}
    assert len(starts) == 1


def test_the_commands_that_are_offered_work_as_they_stand(cloche):
    """Also for a run folder with a space, where a shell would cut."""
    _code, _out, told = cloche("train", "spirals", *POINTS, "--out", "my run")
    offered = re.findall(r"(?:inside|try) +cloche (.*)", told)
    assert offered == ["explain 'my run'", "predict 'my run' \"0.5 0.5\""]
    for line in offered:
        assert cloche(*shlex.split(line))[0] == DONE


def test_python_m_cloche_with_an_ascii_console(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}

    def ascii_only(*argv: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "cloche", *argv], env=env, cwd=tmp_path, capture_output=True, timeout=120)
        text = (done.stdout + done.stderr).decode("ascii")  # every sign that is not plain raises here
        assert "Traceback" not in text and "cloche itself failed" not in text, text
        return done.returncode, text

    code, text = ascii_only("train", "spirals", *POINTS)
    assert code == DONE and "epoch 2/2 " + "=" * 20 in text and "train 70 - validation 10 - test 20" in text
    assert ascii_only("train", "--help")[1].startswith("usage: cloche train")
    code, text = ascii_only("train", "digits", "--set", "optim.lerning_rate=0.01")
    assert code == WRONG_INPUT and "no such key   -> optim.lr" in text


def test_json_keeps_its_letters_on_an_ascii_console(made, tmp_path):
    done = command("predict", str(made / "curve"), "x\u0915", "--json", env={"PYTHONIOENCODING": "ascii"}, cwd=tmp_path)
    assert done.returncode == WRONG_INPUT and json.loads(done.stdout)["error"]["found"] == "x\u0915"


# --- the machine ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_device_that_is_absent(device, cloche, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip(f"not run: needs a machine without {device}")
    code, _out, told = cloche("train", "spirals", "--set", f"train.device={device}")
    assert code == WRONG_INPUT and f"train.device = {device}, but there is no such device here" in told
    assert re.search(r"PyTorch \S+ sees \d+ CUDA devices", told) and "leave train.device out to use what there is" in told
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_cannot_be_made(cloche, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, text in (
        ("file", "file is a file, not a folder for a run"),
        ("file/run", "cannot make the folder file/run\n  Not a directory"),
    ):
        code, _out, told = cloche("train", "spirals", *POINTS, "--out", out)
        assert code == WRONG_INPUT and text in told and "choose another with --out" in told
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_folder_with_other_files_in_it(cloche, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    code, _out, told = cloche("train", "spirals", *POINTS, "--out", "mine", "--again")
    assert code == WRONG_INPUT and "mine holds files that are not a run's\n  thesis.tex" in told and "choose another with --out" in told
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_cache_folder_that_cannot_be_written(cloche, tmp_path, monkeypatch):
    """F8: the store is held in memory, and that is said."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("CLOCHE_CACHE", str(tmp_path / "file/cache"))
    code, _out, told = cloche("train", "spirals", *POINTS)
    assert code == DONE and "the store is held in memory this time: " in told and "epoch 2/2" in told


@posix
@pytest.mark.parametrize("limit", [100, 20_000], ids=["nothing fits", "the recipe fits, a checkpoint does not"])
def test_a_full_disk_and_the_same_command_again(limit, cloche, made, tmp_path):
    words = ["train", "spirals", *POINTS, "--out", "run"]
    first = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = command(*words, first=first, cwd=tmp_path, env={"CLOCHE_CACHE": str(tmp_path / "cache")})
    told = done.stderr.decode()
    assert done.returncode == STOPPED and "Traceback" not in told and done.stdout == b"", told
    assert re.search(r"cannot save run/[\w./-]+: no file may be that large here \(ulimit -f\)\n", told), told
    assert re.search(
        r"  [\d.]+ kB needed, [\d.]+ [kMG]B free; nothing was written(; no step is saved yet)?\n", told.replace("\u00a0", " ")
    ), told
    assert "Free space, then type the same command again.\n  cloche train spirals " in told
    code, _out, told = cloche(*words)
    assert code == DONE and "runs/" not in told and (tmp_path / "run/report/index.html").exists()
    for name in ("model.safetensors", "events.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (made / "points" / name).read_bytes()


@posix
def test_a_broken_pipe_does_not_end_a_run(made, tmp_path):
    """F19: whoever read stderr and stdout has left before the first line."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = command("train", "spirals", *POINTS, "--json", "--out", "run", cwd=tmp_path, stdout=write, stderr=write)
    finally:
        os.close(write)
    assert done.returncode == DONE
    assert (tmp_path / "run/model.safetensors").read_bytes() == (made / "points/model.safetensors").read_bytes()
    assert (tmp_path / "run/manifest.json").exists() and not list(tmp_path.glob("cloche-fault-*"))


@posix
@pytest.mark.parametrize("words, wanted", [(["list"], DONE), (["evaluate", "nowhere", "--json"], WRONG_INPUT), (["--help"], DONE)])
def test_a_broken_pipe_keeps_the_exit_code(words, wanted, tmp_path):
    read, write = os.pipe()
    os.close(read)
    try:
        done = command(*words, cwd=tmp_path, stdout=write)
    finally:
        os.close(write)
    assert done.returncode == wanted and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_finds_no_room_is_a_fault(made, tmp_path):
    with open("/dev/full", "wb") as full:
        done = command("evaluate", str(made / "points"), "--json", cwd=tmp_path, stdout=full)
    assert done.returncode == FAILED and b"No space left on device" in done.stderr and b"Traceback" not in done.stderr


def test_every_fault_of_ours_leaves_its_trace_in_a_file(capsys, tmp_path, monkeypatch):
    """A bug is called a bug: exit 1, one sentence on the screen, the trace for the report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cloche.use.catalogue.catalogue", lambda what: {}["bug"])
    assert cli.run(["list"]) == FAILED
    told = capsys.readouterr().err
    (trace,) = tmp_path.iterdir()
    assert told == f"cloche itself failed: KeyError: 'bug'\n  the trace is in {trace.name}\n  please report it\n"
    assert "Traceback" in trace.read_text() and "KeyError" in trace.read_text()


def test_interrupted(capsys, tmp_path, monkeypatch):
    def interrupt(what):
        raise KeyboardInterrupt

    monkeypatch.setattr("cloche.use.catalogue.catalogue", interrupt)
    assert cli.run(["list", "--json"]) == 130
    assert one_object(capsys.readouterr().out)["error"]["code"] == "interrupted"


def test_folds_and_seeds_need_two(cloche):
    for words in (["--folds", "-2"], ["--seeds", "1"], ["--folds", "3", "--seeds", "3"]):
        code, _out, told = cloche("train", "spirals", *POINTS, *words)
        assert code == WRONG_INPUT and "--folds or --seeds needs a number from 2 on" in told and "for example --folds 5" in told


def test_folds_test_every_row_once(cloche):
    code, out, _told = cloche("train", "spirals", *POINTS, "--folds", "2", "--json")
    found = one_object(out)
    assert code == DONE and found["n"] == 100 and found["by"] == "fold" and len(found["each"]) == 2
    a, b = (each["accuracy"] for each in found["each"])
    assert found["metrics"]["accuracy"] == pytest.approx((a + b) / 2)


def test_check_measures_this_machine(cloche):
    code, out, _err = cloche("check", "--json")
    found = json.loads(out)
    assert code == DONE and found["limits"]["fp32"] > 1e8 and found["limits"]["copy"] > 1e8 and found["cores"] >= 1
    code, out, _err = cloche("check")
    assert code == DONE and "GFLOP/s" in out and "GB/s" in out and out.splitlines()[-1].strip()


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"threads": 1}, "PyTorch uses 1 of 4 cores"),
        ({"load": 3.5}, "load 3.5"),
        ({"allocator": False}, "CLOCHE_ALLOCATOR"),
        ({"limits": {"fp32": 1e11}}, "does not multiply bfloat16"),
        ({}, ""),
    ],
)
def test_check_says_what_would_help_and_nothing_else(facts, said):
    from cloche.use.check import _advice

    fine = {"threads": 4, "cores": 4, "load": 0.1, "allocator": True, "gpus": [], "torch": "2.13.0+cpu", "limits": {"bf16": 1e12}}
    found = _advice(fine | facts)
    assert (len(found) == 1 and said in found[0]) if said else found == []
