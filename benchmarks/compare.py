"""One comparison of a peer with cloche, and the file of results that several of them make.

A figure whose name ends in _per_s is better when it is more, any other (seconds, bytes) when it is less.
"""

from collections.abc import Callable
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import platform
import re
import shlex
import statistics
import sys
import tomllib

from ab import Failed, Side, alternate, compare
from peers import HERE, JOBS, ROOT, NotRun, checked, last_object, positive, versions

RESULTS = HERE / "results"
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "LD_PRELOAD", "CLOCHE_ALLOCATOR")  # they change speed
EQUAL = ("steps", "batch", "params")  # figures that make it another job where they differ
LOSSES_ALIKE = 1.25  # times; the losses of the same first steps from other draws


# The two sides


def peer_side(name: str, python: Path, job: str, *words: str | Path, env: dict[str, str] | None = None) -> Side:
    """A program of benchmarks/jobs in the peers' environment; its figures are the JSON that it prints."""
    command = (str(python), str(JOBS / f"{job}.py"), *map(str, words))
    return Side(name, command, lambda printed, folder: last_object(printed), env or {}, ROOT)


def cloche_side(recipe: str, steps: int, figures: dict[str, str], data: Path | None = None, *options: str) -> Side:
    """As a person starts it for the first time: no store of the data from an earlier run, hence the empty cache folder.

    Args: figures: {the peer's name of it: dotted path in the JSON of cloche train}. options: further words, --set KEY=VALUE.
    """
    found = ("--data", str(data)) if data else ()
    words = ("train", recipe, *found, "--set", f"train.steps={steps}", *options, "--json", "--out", "{tmp}/run")
    command = (sys.executable, "-m", "cloche", *words)
    return Side("cloche", command, lambda out, tmp: read_cloche(out, tmp, figures, data), {"CLOCHE_CACHE": "{tmp}/cache"}, ROOT)


def read_cloche(printed: str, folder: Path, figures: dict[str, str], data: Path | None = None) -> dict:
    """The figures under the peer's names; steps, batch, parameters and loss of the timed steps; the recipe that cloche resolved.

    Raises: Failed naming the key that is not there.
    """
    answer, run = last_object(printed), folder / "run"
    found = {name: positive(answer, path) for name, path in figures.items()}
    text = (run / "recipe.toml").read_text().replace(str(folder), "OUT")
    recipe = tomllib.loads(text.replace(str(data), "DATA") if data else text)
    facts = json.loads((run / "facts.json").read_text())
    lines = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["kind"] == "step"]
    timed = lines[1:] or lines  # a line holds train.log_steps = 10 steps: from the 11th on
    return {
        **found,
        "steps": answer.get("steps"),
        "batch": recipe["train"]["batch"],
        "params": facts["parameters"],
        "threads": facts["threads"],
        "loss": sum(e["loss"] * e["n"] for e in timed) / sum(e["n"] for e in timed),
        "speed": {k: v for k, v in answer["speed"].items() if isinstance(v, int | float | str | bool)},
        "recipe": recipe,
    }


# One comparison


def against(
    peers: list[Side], own: Side, figures: dict[str, str], rounds: int, gflop: float = 0.0, hide: tuple[Path, ...] = ()
) -> list[dict]:
    """A comparison for each peer, all in the same rounds: limits before and after, rounds, ratios, remarks.

    Args: figures: {name: its unit in words}, the first one being the rate that gflop counts; gflop: 10⁹ operations of one of its
        units, 0 where it is not known. hide: paths that are told as DATA.
    """
    before = limits()
    sides = {f"a{k}": peer for k, peer in enumerate(peers)} | {"b": own}
    played = alternate(sides, rounds, say=lambda text: print(text, file=sys.stderr))
    measured, recipes = [before, limits()], []  # cloche measures some settings itself, so that two runs may differ
    for found in [r for both in played for r in (both, both["dropped"]) if r]:
        recipe = found["b"].pop("recipe", None)
        if recipe is not None and recipe not in recipes:
            recipes.append(recipe)
    out = []
    for k, peer in enumerate(peers):
        pairs = [_pair(r, f"a{k}") | {"dropped": _pair(r["dropped"], f"a{k}") if r["dropped"] else None} for r in played]
        ratios = {name: compare(pairs, name, name.endswith("_per_s")) for name in figures}
        rates = {key: ratios[next(iter(figures))][f"{key}_median"] * gflop for key in "ab"} if gflop else {}
        top = max(v for m in measured for v in m["matmul_gflop_per_s"].values())
        out.append(
            {
                "a": peer.name,
                "b": own.name,
                "commands": {"a": plain(peer, hide), "b": plain(own, hide)},
                "figures": ratios,
                "units": figures,
                "gflop_per_s": rates,
                "share_of_top_matmul": {key: rate / top for key, rate in rates.items()},
                "limits": measured,
                "remarks": remarks(pairs, rates, top),
                "recipes": recipes,
                "rounds": pairs,
            }
        )
    return out


def _pair(found: dict, a: str) -> dict:
    return {"a": found[a], "b": found["b"]}


def plain(side: Side, hide: tuple[Path, ...]) -> str:
    """The command without this machine's paths."""
    text = shlex.join(side.command).replace(side.command[0], "python").replace("'{tmp}/run'", "OUT")
    for path in hide:
        text = text.replace(str(path), "DATA")
    return text.replace(f"{ROOT}/", "")


def remarks(pairs: list[dict], rates: dict[str, float], top: float) -> list[str]:
    """What makes the comparison doubtful, in words."""
    found = []
    for name in EQUAL:
        a, b = ({r[key][name] for r in pairs if r[key].get(name) is not None} for key in "ab")
        if a and b and (a != b or len(a) > 1):
            found.append(f"{name} of the peer: {', '.join(map(str, sorted(a)))}; of cloche: {', '.join(map(str, sorted(b)))}")
    if all("loss" in r[key] for r in pairs for key in "ab"):
        a, b = (statistics.median(r[key]["loss"] for r in pairs) for key in "ab")
        if max(a, b) > LOSSES_ALIKE * min(a, b):
            found.append(f"the loss of the timed steps is {a:.3g} of the peer and {b:.3g} of cloche")
    for key, rate in rates.items():
        if rate > top:
            found.append(f"side {key}: {rate:.0f} GFLOP/s is above the measured limit of {top:.0f}: skipped work, or a disturbed limit")
    if len(pairs) < 5:
        found.append(f"{len(pairs)} rounds: the interval says little below 5")
    return found


def spoken(comparison: dict) -> str:
    lines = [f"{comparison['b']} against {comparison['a']}:"]
    for name, unit in comparison["units"].items():
        f = comparison["figures"][name]
        pair = f"{f['b_median']:.4g} against {f['a_median']:.4g} {unit}"
        lines.append(f"  {pair}: {f['ratio']:.2f}x (95 % interval {f['low']:.2f}-{f['high']:.2f}, {f['n']} rounds)")
    return "\n".join([*lines, *(f"  note: {text}" for text in comparison["remarks"])])


# The file of results


def begun(job: str, **more: object) -> dict:
    """The head of a file of results: when, of which commit, on what. `more` stands beside it; versions of peers go into `add`."""
    return {
        "job": job,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"a": {}, "b": cloche_versions()},
        "same_torch": True,
        **more,
        "load_average_at_start": os.getloadavg(),
        "comparisons": [],
    }


def add(result: dict, peer_versions: dict[str, str], comparisons: list[dict], out: Path) -> None:
    """Comparisons into the file of results, at once, so that nothing finished is lost; and told to the person."""
    own = result["versions"]["b"]["torch"]
    result["versions"]["a"] |= peer_versions
    if peer_versions["torch"] != own and result["same_torch"]:
        result["same_torch"] = False
        print(f"note: the peers run on torch {peer_versions['torch']}, cloche on {own}", file=sys.stderr)
    result["comparisons"] += comparisons
    result["load_average_at_end"] = os.getloadavg()
    write(result, out)
    print(*map(spoken, comparisons), sep="\n", flush=True)


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)


def told(measure: Callable[[], bool | None]) -> None:
    """The end of a program: "not run: needs …" and code 0 where something is absent; 1 where a side gave no figure or a bound broke."""
    try:
        if measure() is False:
            sys.exit(1)
    except NotRun as lack:
        print(f"not run: needs {lack}")
    except Failed as fault:
        sys.exit(str(fault))


def holding(folder: Path | None, files: tuple[str, ...], what: str) -> Path:
    """The folder, resolved. Raises: NotRun where it lacks one of the files."""
    if folder is None:
        raise NotRun(f"--data FOLDER, with {what}")
    lacking = [name for name in files if not (folder / name).is_file()]
    if lacking:
        raise NotRun(f"{' and '.join(lacking)} in {folder}")
    return folder.resolve()


# The machine and what runs on it


def limits() -> dict:
    return json.loads(checked(sys.executable, HERE / "limits.py"))


def hardware() -> dict:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "settings": {name: os.environ[name] if name != "LD_PRELOAD" else "set" for name in SETTINGS if name in os.environ},
    }


def cloche_versions() -> dict[str, str]:
    """Of the interpreter that runs cloche; importing torch here also brings its files into the page cache, as a peer's trial does."""
    checked(sys.executable, "-c", "import torch, numpy, PIL")
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return {"cloche": own, "python": platform.python_version(), **versions(sys.executable, "torch", "numpy", "pillow")}


def commit() -> str:
    """The commit measured, "+ changes" where files differ from it, "unknown" outside git."""
    try:
        changed = checked("git", "status", "--porcelain", "--", "cloche", "benchmarks/*.py")
        return checked("git", "rev-parse", "HEAD").strip() + (" + changes" if changed.strip() else "")
    except (OSError, Failed):
        return "unknown"
