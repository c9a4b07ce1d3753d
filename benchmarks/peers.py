"""The environment of the peers, .bench/venv: other people's scripts and frameworks, beside cloche's own and never in it."""

import json
import math
from pathlib import Path
import re
import subprocess
import sys
import tomllib

from ab import Failed

HERE = Path(__file__).resolve().parent
ROOT, JOBS = HERE.parent, HERE / "jobs"
VENV = ROOT / ".bench" / "venv"
BASE = ("torch", "numpy", "pillow")  # with the constraints that cloche has


class NotRun(Exception):
    """Something that the benchmark needs is not there; the text names it."""


def environment(*packages: str, job: str) -> tuple[Path, dict[str, str]]:
    """The peers' interpreter and the versions in it; makes what is absent or does not work.

    Args: packages: what the job needs beside torch, torchvision, numpy and Pillow, as pip names them.
        job: the program of benchmarks/jobs that is imported for real, so that what does not load is found here.
    Raises: NotRun when one of them cannot be installed or imported.
    """
    python = VENV / "bin" / "python"
    try:
        try:
            versions(python, *BASE, "torchvision")
        except (OSError, Failed):
            _make(python)
        try:
            return python, _tried(python, packages, job)
        except Failed:
            print(f"installing {', '.join(packages) or job} in {VENV.relative_to(ROOT)}", file=sys.stderr)
            _install(python, *packages)
            return python, _tried(python, packages, job)
    except Failed as fault:
        wanted = ", ".join((*BASE, "torchvision", *packages))
        raise NotRun(f"{wanted} in {VENV.relative_to(ROOT)}, and there {fault}") from None


def _make(python: Path) -> None:
    print(f"making the peers' environment in {VENV.relative_to(ROOT)} (about a minute)", file=sys.stderr)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    checked(sys.executable, "-m", "venv", "--clear", VENV)
    _pip(python, *(d for d in declared if re.match(r"[\w.-]+", d)[0] in BASE))
    minor = int(versions(python, "torch")["torch"].split(".")[1]) + 15  # torch 2.11 goes with torchvision 0.26, 2.13 with 0.28
    # without dependencies: torchvision would bring the torch of its own build
    _pip(python, "--no-deps", f"torchvision==0.{minor}.*")


def _install(python: Path, *packages: str) -> None:
    """Held to what is there: a package that asks for another torch fails instead of bringing it."""
    held = VENV / "held.txt"
    held.write_text("".join(f"{name}=={found}\n" for name, found in versions(python, *BASE, "torchvision").items()))
    if packages:
        _pip(python, "-c", held, *packages)


def _pip(python: Path, *words: str | Path) -> None:
    checked(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words)


def _tried(python: Path, packages: tuple[str, ...], job: str) -> dict[str, str]:
    found = versions(python, *BASE, "torchvision", *packages)
    checked(python, "-c", f"import {job}", cwd=JOBS)
    return found


def versions(python: Path | str, *packages: str) -> dict[str, str]:
    """Raises: Failed naming the first that is absent; OSError where there is no such interpreter."""
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {packages!r}}}))"
    return json.loads(checked(python, "-c", code))


def checked(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command printed. Raises: Failed with its last complaint."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("WARNING", "[notice]"))]
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {complaints[-1] if complaints else 'no message'}")
    return done.stdout


def last_object(printed: str) -> dict:
    """The last JSON object that begins at the beginning of a line. Raises: Failed when there is none."""
    for start in reversed([m.start() for m in re.finditer(r"^\{", printed, re.MULTILINE)]):
        try:
            return json.JSONDecoder().raw_decode(printed, start)[0]
        except json.JSONDecodeError:
            continue
    raise Failed("stdout holds no JSON object")


def positive(answer: dict, path: str) -> float:
    """The number at a dotted path. Raises: Failed naming the path and what is there."""
    value = answer
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(value) if isinstance(value, dict) else repr(value)
            raise Failed(f"its JSON has no {path}: {key!r} is missing, there is {there or 'nothing'}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise Failed(f"{path} in its JSON is {value!r}, not a number above 0")
    return float(value)
