"""The house rules of DESIGN.md and STYLE.md, read from the source itself: who imports whom, how long, and what never stands in it."""

import ast
from pathlib import Path
import re
import subprocess
import sys
import time
import tomllib

import pytest
import torch

from cloche.build import device_of, facts_of, job_of, nets_of, open_data, task_of
from cloche.config import keys_of
from cloche.recipe import SINGLE, TABLES, change, find, parse, shipped
from cloche.training.job import Place
from cloche.training.loop import start, step
from cloche.training.parallel import Group
from cloche.training.run import Run

PACKAGE = Path(__file__).parents[1] / "cloche"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {p: ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in SOURCES}
SHORT = {p: str(p.relative_to(PACKAGE.parent)) for p in SOURCES}

# Imports go one way: a place may import what stands in its own line or above it. nets and data stand side by side.
LINES = (
    ("cloche", "errors", "words", "config", "files", "folders", "trust", "rng", "start"),
    ("nets", "data"),
    ("decode",),
    ("tasks",),
    ("training",),
    ("interop",),
    ("recipe", "build"),
    ("use",),
    ("serve",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: n for n, names in enumerate(LINES) for name in names}
EDGE = {"cloche/__init__.py", "cloche/__main__.py", "cloche/cli.py"}  # they import each verb inside its function
HEAVY = {
    ("cloche/data/read/builtin.py", "sklearn"),  # a second to load, and the store remembers its answer
    ("cloche/use/train.py", "cloche"),  # the report's matplotlib: 0.6 s that the first step need not wait for
}


def module_of(path: Path) -> str:
    """cloche/data/read/idx.py → cloche.data.read.idx."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(p) for p in SOURCES}


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Every imported module with its line; `from cloche import rng` is an import of cloche.rng."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a thing is"
            inner = [f"{node.module}.{a.name}" for a in node.names]
            out += [(name if name in MODULES else str(node.module), node.lineno) for name in inner]
    return list(dict.fromkeys(out))


def place(module: str) -> str:
    return (module.split(".") + ["cloche"])[1]


def test_imports_go_one_way():
    wrong = []
    for path, tree in TREES.items():
        me = place(module_of(path))
        if SHORT[path] in EDGE:
            continue
        for name, line in imports(tree):
            if name.split(".")[0] != "cloche":
                continue
            other = place(name)
            beside = {me, other} == {"nets", "data"}
            if LEVEL[other] > LEVEL[me] or beside:
                wrong.append(f"{SHORT[path]}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_ring_of_imports_also_not_inside_functions():
    graph = {module_of(p): [n for n, _line in imports(t) if n in MODULES] for p, t in TREES.items() if SHORT[p] not in EDGE}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a ring: " + " → ".join((*path, module))
        if module not in done and module in graph:
            for other in graph[module]:
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def optional() -> set[str]:
    """Packages of the extras that a person chooses; not those that only work on cloche needs."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [d for name, ds in project.get("optional-dependencies", {}).items() if name != "dev" for d in ds]
    return {re.split(r"[<>=\[;! ]", d)[0].replace("-", "_") for d in extras}


def test_imports_inside_functions_are_only_for_optional_packages():
    wrong = []
    for path, tree in TREES.items():
        if SHORT[path] in EDGE:
            continue
        for f in functions(tree):
            for name, line in imports(f):
                top = name.split(".")[0]
                if top not in optional() and (SHORT[path], top) not in HEAVY:
                    wrong.append(f"{SHORT[path]}:{line} imports {name} inside {f.name}()")
    assert not wrong, "\n".join(wrong)


def test_sizes_of_files_functions_and_signatures():
    wrong = []
    for path, tree in TREES.items():
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > 400:
            wrong.append(f"{SHORT[path]}: {n} lines, at most 400")
        for f in functions(tree):
            n = (f.end_lineno or 0) - f.lineno + 1
            short = f.name == "forward" or (f.name == "step" and SHORT[path] == "cloche/training/loop.py")
            if n > (40 if short else 60):
                wrong.append(f"{SHORT[path]}:{f.lineno} {f.name}(): {n} lines, at most {40 if short else 60}")
            given = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if len(given) > 8:
                wrong.append(f"{SHORT[path]}:{f.lineno} {f.name}(): {len(given)} parameters, at most 8")
    assert not wrong, "\n".join(wrong)


FORBIDDEN_WAYS = ("multiprocessing.connection", "multiprocessing.managers", "torch.package")  # modules in part, they unpickle
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "dbm", "joblib", "yaml"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen")}
FORBIDDEN_FLAGS = {"shell", "allow_pickle", "trust_remote_code"}
FORBIDDEN_METHODS = {"extractall", "read_pickle", "to_pickle", "unsafe_load"}
# pickles over sockets
FORBIDDEN_METHODS |= {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"}
FORBIDDEN_METHODS |= {"recv_object_list"}


def faults_in(tree: ast.AST) -> list[tuple[int, str]]:
    out = [(line, f"import {name}") for name, line in imports(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
    out += [(line, f"import {name}") for name, line in imports(tree) if name.startswith(FORBIDDEN_WAYS)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # under whatever name
            names = [a.name for a in node.names if a.name in FORBIDDEN_METHODS or (node.module, a.name) in FORBIDDEN_CALLS]
            names += [a.name for a in node.names if f"{node.module}.{a.name}".startswith(FORBIDDEN_WAYS)]
            out += [(node.lineno, f"from {node.module} import {name}") for name in names]
        if isinstance(node, ast.Assert):
            out.append((node.lineno, "assert"))
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            out.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(FORBIDDEN_WAYS):
            out.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_METHODS:
            out.append((node.lineno, node.attr))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in FORBIDDEN_CALLS:
            out.append((node.lineno, f"{node.value.id}.{node.attr}"))
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_FLAGS and ast.unparse(node.value) != "False":
            out.append((node.value.lineno, f"{node.arg}="))
    return out


def test_nothing_that_runs_code_or_vanishes_under_O():
    wrong = [f"{SHORT[p]}:{line} {what}" for p, tree in TREES.items() for line, what in faults_in(tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "assert x",
        "import pickle",
        "from yaml import load",
        "import marshal",
        "eval('1')",
        "exec(x)",
        "run(x, shell=True)",
        "torch.load(p)",
        "tar.extractall()",
        "np.load(p, allow_pickle=True)",
        "import shelve",
        "import dbm",
        "yaml.load(x)\nimport yaml",
        "torch.save(x, p)",
        "from torch import load",
        "os.system(x)",
        "from os import system as s",
        "import multiprocessing.connection",
        "from multiprocessing.connection import Client",
        "from multiprocessing import connection",
        "multiprocessing.connection.Client(x)",
        "dist.all_gather_object(out, x)",
        "dist.broadcast_object_list(x)",
        "torch.distributed.scatter_object_list(a, b)",
        "from torch.distributed import all_gather_object",
    ],
)
def test_the_gate_sees_what_it_should(text):
    assert faults_in(ast.parse(text))


def test_the_gate_lets_a_net_go_into_evaluation_mode():
    assert not faults_in(ast.parse("net.eval()\nnp.load(p, allow_pickle=False)\nre.compile('x')"))


def python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60, check=True)


def test_import_and_help_do_not_load_torch():
    found = python("import cloche, sys; print([m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])").stdout
    assert found.strip() == "[]"
    told = "import sys; sys.argv = ['cloche', 'train', '--help']\nfrom cloche.__main__ import main\n"
    found = python(told + "try: main()\nfinally: print('torch' in sys.modules)").stdout
    assert found.splitlines()[-1] == "False" and "RECIPE" in found


def test_help_takes_less_than_a_third_of_a_second():
    best_s = float("inf")
    for _round in range(5):
        t0 = time.perf_counter()
        found = subprocess.run([sys.executable, "-m", "cloche", "--help"], capture_output=True, text=True, check=True)
        best_s = min(best_s, time.perf_counter() - t0)
    assert "cloche train digits" in found.stdout
    assert best_s < 0.3


# --- no dead option -------------------------------------------------------------------------------------------------------------

MLP = {"data.source": "digits", "data.pixels": 8, "data.channels": 1, "net": {"kind": "mlp", "widths": [8]}}
CNN = {"data.source": "digits", "data.pixels": 12, "data.channels": 1, "net": {"kind": "cnn", "stages": [[4], [8]], "hidden": 8}}
RESNET = {"data.source": "digits", "data.pixels": 8, "data.channels": 1, "net": {"kind": "resnet", "blocks": [1]}}
POINTS = {"data.source": "spirals", "net": {"kind": "mlp", "widths": [8]}}
TONES = {"data.source": "dialtones", "data.rows": 40, "net": {"kind": "gru", "width": 8}}
SERIES = {"data.source": "airline", "net": {"kind": "gru", "width": 4}}
PAIRS = {"data.source": "dates", "data.rows": 200, "net": {"kind": "transformer", "width": 16, "heads": 2, "layers": 1}}
CAPTIONS = {"data.source": "digits-captions", "data.pixels": 8, "data.channels": 1, "net": {"kind": "unet", "width": 8, "heads": 2}}
SMALL = {"train.steps": 2, "train.precision": "fp32", "train.layout": "plain", "train.batch": 32, "train.device": "cpu"}

# key → (two values, what stands around it). Both are built and trained for two steps; the resolved recipe and what comes out of it differ.
TRIED = {
    "data.look": ((6, 12), SERIES),
    "data.horizon": ((6, 12), SERIES),
    "data.season": ((6, 12), SERIES),
    "data.origins": ((12, 24), SERIES),
    "data.log": ((False, True), SERIES),
    "net.heads": ((1, 2), PAIRS),
    "net.layers": ((1, 2), PAIRS),
    "task.smoothing": ((0.0, 0.1), MLP),  # and of translate in test_translate.py
    "net.mults": (([1], [1, 2]), CAPTIONS),
    "net.text.width": ((8, 16), CAPTIONS),
    "net.text.layers": ((1, 2), CAPTIONS),
    "data.snr_db": ((5.0, 10.0), TONES),
    "data.mels": ((16, 24), TONES),
    "net.stack": ((1, 2), TONES),
    "net.both": ((False, True), TONES),
    "data.fold": ((0, 1), MLP),
    "data.test": ((0.2, 0.3), MLP),
    "data.validation": ((0.1, 0.2), MLP),
    "data.normalize": ((True, False), MLP),
    "data.augment.rotate": ((0.0, 20.0), MLP),
    "data.augment.brightness": ((0.0, 0.3), MLP),
    "data.augment.contrast": ((0.0, 0.3), MLP),
    "data.augment.shift": ((0, 2), MLP),
    "data.augment.small": ((0.0, 0.5), RESNET),
    "data.augment.mirror": ((False, True), MLP),
    "data.pixels": ((8, 10), MLP),
    "data.channels": ((1, 3), MLP),
    "data.rows": ((200, 300), POINTS),
    "data.noise": ((0.02, 0.1), POINTS),
    "net.kind": (("mlp", "cnn"), {"data.source": "digits", "data.pixels": 12, "net": {}}),
    "net.stages": (([[4]], [[4], [8]]), CNN),
    "net.kernel": ((3, 5), CNN),
    "net.stride": ((1, 2), {**CNN, "data.pixels": 20}),
    "net.padding": (("same", 2), CNN),
    "net.pool": (("max", "average"), CNN),
    "net.hidden": ((8, 16), CNN),
    "net.norm": (("none", "batch"), CNN),
    "net.dropout": ((0.0, 0.5), CNN),
    "net.activation": (("relu", "gelu"), CNN),
    "net.widths": (([8], [8, 4]), MLP),
    "net.size": (("xs", "s"), RESNET),
    "net.blocks": (([1], [1, 1]), RESNET),
    "task.loss": (("bce", "cross_entropy"), POINTS),
    "optim.kind": (("adam", "rmsprop"), MLP),
    "optim.lr": ((1e-3, 1e-2), MLP),
    "optim.weight_decay": ((0.0, 0.1), MLP),
    "optim.schedule": (("constant", "onecycle"), MLP),
    "optim.warmup": ((0.0, 0.5), MLP),
    "optim.clip": ((0.0, 0.1), {**MLP, "optim": {"kind": "sgd"}}),
    "optim.momentum": ((0.0, 0.9), {**MLP, "optim": {"kind": "sgd"}}),
    "optim.ratio": ((0.5, 1.0), {**MLP, "optim": {"kind": "muon"}}),
    "optim.decay": ((0.9, 0.99), {**MLP, "optim": {"kind": "rmsprop"}}),
    "optim.beta1": ((0.5, 0.9), MLP),
    "optim.beta2": ((0.9, 0.999), MLP),
    "train.steps": ((1, 2), MLP),
    "train.batch": ((32, 48), MLP),
    "train.chunks": ((1, 2), {**MLP, "net": {"kind": "mlp", "widths": [8], "norm": "batch"}}),
    "train.seed": ((0, 1), MLP),
    "train.precision": (("fp32", "bf16"), MLP),
}
# These change how a run is watched, chosen or stopped, not what a step does: where each is tried.
ELSEWHERE = {
    "data.source": "every recipe",
    "data.kind": "test_both_kinds_of_data_and_both_tasks",
    "task.kind": "test_both_kinds_of_data_and_both_tasks",
    "train.epochs": "recipes",
    "train.test_batch": "test_loop.py",
    "train.exact_sum": "test_processes.py",
    "train.select": "test_loop.py, recipes",
    "train.patience": "test_loop.py",
    "train.log_steps": "test_loop.py",
    "train.ema": "test_loop.py",
    "train.matmul": "test_precision.py",
    "train.layout": "test_the_trial_chooses_a_layout, and plain everywhere",
    "train.device": "cpu here, cuda:7 in test_loop.py",
    "net.text.kind": "there is one",
    "task.beam": "test_translate.py",
    "task.guidance": "test_diffusion.py",
    "task.sampler": "test_diffusion.py",
    "task.steps": "test_diffusion.py, test_families.py",
    "task.samples": "test_diffusion.py, test_families.py",
    "task.judge": "test_diffusion.py, recipes",
    "net.name": "cloche.fit fills it: test_api.py",
    "task.name": "cloche.fit fills it: test_spine.py",
}


def all_keys() -> set[str]:
    kinds = {
        f"{t}.{k}"
        for t, (table, _noun, _default) in TABLES.items()
        for c in table.values()
        for k in (key.split(".", 1)[1] for key in keys_of(c, t))
    }
    return kinds | {k for t, c in SINGLE.items() for k in keys_of(c, t)}


def flat(tables: dict, prefix: str = "") -> dict:
    out = {}
    for k, v in tables.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


def written() -> dict[str, set[str]]:
    """key → the values that shipped recipes give it."""
    out: dict[str, set[str]] = {}
    for name in shipped():
        for k, v in flat(find(f"recipe:{name}", None)[1]).items():
            out.setdefault(k, set()).add(repr(v))
    return out


def test_every_key_is_tried_with_two_values():
    values, keys = written(), all_keys()
    leaves = {k for k in keys if not any(other.startswith(k + ".") for other in keys)}
    once = sorted(k for k in leaves if k not in TRIED and k not in ELSEWHERE and len(values.get(k, ())) < 2 and not k.startswith("expect."))
    assert not once, f"keys that no recipe and no test sets to two values: {once}"
    assert not (TRIED.keys() | ELSEWHERE.keys()) - keys, "keys in this table that no longer exist"
    # [expect] is what a recipe is held to; a Bound has both sides for any figure, so one side of each stays unused
    assert {k for k in leaves if k.startswith("expect.") and k not in values} <= {"expect.accuracy.at_most", "expect.mse.at_least"}


def recipe_of(around: dict, sets: dict) -> dict:
    raw = {"format": 1, "data": {}, "net": {}, "task": {}, "optim": {}, "train": {}}
    whole = {k: v for k, v in around.items() if "." not in k}
    return change({**raw, **whole}, {**SMALL, **{k: v for k, v in around.items() if "." in k}, **sets})


def trained(raw: dict, folder: Path) -> tuple[dict, list[torch.Tensor]]:
    """Two steps through the real build and loop: the resolved recipe, and the weights."""
    recipe = parse(raw)
    device = device_of(recipe.train.device)
    data = open_data(recipe, device)
    recipe, task = task_of(recipe, data.prepare, facts_of(recipe, data))
    nets = nets_of(recipe, task)
    job = job_of(recipe, data, task, nets, {}, Group())
    folder.mkdir()
    state, here = start(job, Run(folder))
    for n in range(job.steps):
        chunks = job.chunks(0, n, torch.tensor(7))
        step(job, state, chunks, Place(n, 0, n))
    weights = [p.detach().clone() for net in nets.values() for p in net.parameters()]
    assert here == Place(0, 0, 0) and all(torch.isfinite(p).all() for p in weights)
    return recipe.tables(), weights


@pytest.mark.parametrize("key", sorted(TRIED))
def test_each_value_of_a_key_builds_trains_and_changes_something(key, tmp_path, one_thread):
    (a, b), around = TRIED[key]
    first, weights = trained(recipe_of(around, {key: a}), tmp_path / "a")
    second, others = trained(recipe_of(around, {key: b}), tmp_path / "b")
    assert flat(first)[key] == a and flat(second)[key] == b
    same = [p.shape for p in weights] == [p.shape for p in others] and all(map(torch.equal, weights, others))
    assert not same, f"{key} = {a} and {key} = {b} train to the same bits: the key does nothing"


@pytest.mark.parametrize(
    "source, data, task", [("spirals", "columns", "classify"), ("curve", "columns", "regress"), ("digits", "pictures", "classify")]
)
def test_both_kinds_of_data_and_both_tasks(source, data, task, tmp_path, one_thread):
    found, _weights = trained(recipe_of({**POINTS, "data.source": source}, {"data.kind": data, "task.kind": task}), tmp_path / "run")
    assert (found["data"]["kind"], found["task"]["kind"]) == (data, task)


def test_the_trial_chooses_a_layout(tmp_path, one_thread):
    """train.layout: both by name, and the layout in force in the kernels."""
    for layout, form in (("plain", torch.contiguous_format), ("channels_last", torch.channels_last)):
        raw = recipe_of({**CNN, "data.channels": 3, "net": {"kind": "cnn", "stages": [[4], [8]], "hidden": 8}}, {"train.layout": layout})
        found, weights = trained(raw, tmp_path / layout)
        assert found["train"]["layout"] == layout
        assert weights[2].ndim == 4 and weights[2].is_contiguous(memory_format=form)


@pytest.fixture
def one_thread():
    """Two cores that others work on too: a second thread only waits for the first."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def test_every_fault_has_a_row_and_every_test_named_there_exists():
    here = Path(__file__).parent
    text = (here.parent / "docs/faults.md").read_text(encoding="utf-8")
    rows = {int(n): row for n, row in re.findall(r"^\| F(\d+) \|(.*)$", text, re.MULTILINE)}
    assert list(rows) == list(range(1, 38))
    named = {n: re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for n, row in rows.items()}
    assert not [n for n, tests in named.items() if not tests and "not run: " not in rows[n]]
    found = {path.name: re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE) for path in here.glob("test_*.py")}
    assert not [f"{file}::{name}" for tests in named.values() for file, name in tests if name not in found.get(file, ())]
