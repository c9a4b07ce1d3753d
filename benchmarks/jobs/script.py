"""Other people's training scripts, run from a copy in the working folder: as they are, or after edits that are told by their text.

Their own log is read, so that nothing is put between their steps; a script that cannot be told to stop is stopped by its log.
"""

from collections.abc import Iterable
import io
import json
from pathlib import Path
import re
import statistics
import sys

Edits = Iterable[tuple[str, str, str]]  # file, what stands there, what is to stand there


class Enough(BaseException):
    """The log has told all steps. No `except` of a script may take it for a fault."""


class Log(io.TextIOBase):
    """What a script prints; the numbers of the lines that match `pattern`, and Enough after `most` of them (0: never)."""

    def __init__(self, pattern: str, most: int = 0) -> None:
        self.pattern, self.most, self.line, self.found = re.compile(pattern), most, "", []

    def write(self, text: str) -> int:
        *whole, self.line = (self.line + text).split("\n")
        for line in whole:
            print(line, file=sys.stderr)
            if match := self.pattern.search(line):
                self.found.append([float(n) for n in match.groups()])
        if self.most and len(self.found) >= self.most:
            raise Enough
        return len(text)


def copy(folder: Path, names: Iterable[str], edits: Edits = ()) -> None:
    """The named files of `folder` into the working folder, edited. Raises: ValueError where there is nothing to edit."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    for name, old, new in edits:
        if old not in texts[name]:
            raise ValueError(f"{name} holds no {old!r}: another version of it?")
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


def run(name: str, arguments: list[str], log: Log) -> dict:
    """Runs a script of the working folder as a program, its output into the log. Returns: its global names."""
    scope = {"__name__": "__main__", "__file__": name}
    sys.argv, sys.path[0], sys.stdout, before = [name, *arguments], str(Path.cwd()), log, sys.stdout
    try:
        exec(compile(Path(name).read_text(encoding="utf-8"), name, "exec"), scope)
    except Enough:
        pass
    finally:
        sys.stdout = before
    return scope


def median(step_s: list[float]) -> float:
    """Of the steps that cloche takes too: without the first ten, where there are more than twenty, else without the first."""
    return statistics.median(step_s[10:60] if len(step_s) > 20 else step_s[1:])


def tell(step_s: list[float], losses: list[float], unit: str, per_step: int, flops: float, params: int, **more: object) -> None:
    """One line of JSON. flops: of one unit, forward and backward."""
    typical_s = median(step_s)
    figures = {f"{unit}_per_s": per_step / typical_s, "ms_per_step": 1000 * typical_s, "loss": statistics.mean(losses[1:])}
    print(json.dumps(figures | {"steps": len(step_s), "params": params, "flops": flops, "losses": losses, **more}))
