"""The run folder while it is being trained: opened, compared, appended to, saved and finished. The contract between verbs.

recipe.toml, facts.json and prepare.json stand before the first step; events.jsonl grows; checkpoints/step-N are
whole or absent; manifest.json comes last of all and marks a finished run.
"""

import json
import os
from pathlib import Path
import re
import shutil
import tomllib
from typing import Any

from torch import Tensor

from cloche import files
from cloche.config import show
from cloche.errors import FAILED, UserError
from cloche.words import _, listed

KIND, FORMAT = "cloche run", 1
OURS = ("recipe.toml", "facts.json", "prepare.json", "model.safetensors", "results.json", "events.jsonl", "README.md", "manifest.json", "checkpoints", "report", ".lock")
KEEP = 2


class Run:
    """A run folder that this process holds the lock of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: files.Lock | None = None
        self._events_failed = False
        self.last_saved = -1  # the step of the newest checkpoint
        self.looping = False  # while it is true, a signal only sets `stop`
        self.best_step = 0
        self.stop = ""  # set by a signal: the loop saves and ends

    def open(self, recipe: dict[str, Any], facts: dict[str, Any], again: bool, allow: tuple[str, ...]) -> dict[str, Any] | None:
        """Take the folder; say whether there is something to go on from.

        Args:
            recipe: the resolved recipe; facts: what it was resolved from.
            again: start anew. allow: dotted names of fields that may differ from the run's.
        Returns: the recipe that the folder was begun with (measured choices included), or None for a new run.
        Raises: UserError naming every field that differs, or the process that holds the folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(_("{path} is a file, not a folder for a run").format(path=self.path), "", _("choose another with --out"))
        strangers = [p.name for p in self.path.iterdir() if p.name not in OURS and not p.name.startswith(".")] if self.path.is_dir() else []
        if strangers and not (self.path / "recipe.toml").exists():
            raise UserError(
                _("{path} holds files that are not a run's").format(path=self.path), listed(strangers), _("choose another folder with --out")
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(_("cannot make the folder {path}").format(path=self.path), fault.strerror or "", _("choose another with --out"), name="read-only") from None
        self._lock = files.Lock(self.path)
        self._lock.__enter__()
        files.sweep(self.path)
        if again:
            self._clear()
        if not (self.path / "facts.json").exists():
            return None
        found = self.recipe()
        self._compare(found, recipe, files.read_json(self.path / "facts.json"), facts, allow)
        return found

    def recipe(self) -> dict[str, Any]:
        try:
            return tomllib.loads((self.path / "recipe.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise UserError(_("{path} cannot be read").format(path=self.path / "recipe.toml"), str(fault), _("start anew with --again"), code=FAILED, name="damaged") from None

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").exists()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def begin(self, recipe: str, facts: dict[str, Any], prepare: dict[str, Any]) -> None:
        """What stands before the first step. facts.json comes last: its presence says that the others are there."""
        files.durable_write(self.path / "recipe.toml", recipe.encode())
        files.write_json(self.path / "prepare.json", prepare)
        files.write_json(self.path / "facts.json", facts)

    def event(self, **event: Any) -> None:
        """One line in events.jsonl. A full disk does not end the run here: it is said once, the checkpoint will say it again."""
        try:
            with open(self.path / "events.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(event, ensure_ascii=False) + "\n")
        except OSError as fault:
            if not self._events_failed:
                self._events_failed = True
                print(_("events.jsonl cannot be written ({why}); training goes on").format(why=fault.strerror))

    def events(self) -> list[dict[str, Any]]:
        return read_events(self.path)

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """A checkpoint that is whole or absent; older ones go only after it stands."""
        log = self.path / "events.jsonl"
        numbers = {**numbers, "events_bytes": log.stat().st_size if log.exists() else 0}
        (self.path / "checkpoints").mkdir(exist_ok=True)
        parts = {"state.safetensors": files.tensor_file(tensors, {}), "place.json": json.dumps(numbers).encode()}
        files.write_folder(self.path / "checkpoints" / f"step-{step}", parts, "cloche checkpoint", {})
        self.last_saved = step
        for _step, folder in self._checkpoints()[:-KEEP]:
            shutil.rmtree(folder)

    def last(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, with the event log cut to where it stood then.

        Raises: UserError naming the damaged file, and the older checkpoint that is left.
        """
        found = self._checkpoints()
        log = self.path / "events.jsonl"
        if not found:
            if log.exists():
                os.truncate(log, 0)
            return None
        step, folder = found[-1]
        try:
            files.check_manifest(folder, "cloche checkpoint", thorough=False)
            numbers = files.read_json(folder / "place.json")
            tensors, _facts = files.read_tensors(folder / "state.safetensors")
        except UserError as fault:
            older = _("delete {folder} and type the same command: it goes on from step {step}").format(folder=folder, step=found[-2][0]) if len(found) > 1 else ""
            raise UserError(fault.what, fault.found, older or _("start anew with --again"), code=FAILED, name=fault.name) from None
        self.last_saved = step
        if log.exists():
            os.truncate(log, min(numbers["events_bytes"], log.stat().st_size))
        return tensors, numbers

    def finish(self, model: dict[str, Tensor], results: dict[str, Any], card: str) -> None:
        """The trained weights and the results; the manifest, which makes it a finished run, comes last."""
        files.durable_write(self.path / "model.safetensors", files.tensor_file(model, {}))
        files.write_json(self.path / "results.json", results)
        files.durable_write(self.path / "README.md", card.encode())
        files.write_manifest(self.path, KIND, ["recipe.toml", "facts.json", "prepare.json", "model.safetensors", "results.json"])
        for _step, folder in self._checkpoints():  # the finished run needs none; its weights are durable by now
            shutil.rmtree(folder)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        folder = self.path / "checkpoints"
        steps = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", p.name))] if folder.is_dir() else []
        return sorted(steps)

    def _clear(self) -> None:
        """Remove what a run leaves, and nothing else. The manifest goes first: a half-cleared folder is not a finished run."""
        for name in ("manifest.json", *(n for n in OURS if n != ".lock")):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _compare(self, was: dict[str, Any], now: dict[str, Any], was_facts: dict[str, Any], now_facts: dict[str, Any], allow: tuple[str, ...]) -> None:
        """A finished run needs the same recipe and data; one to go on with also the same threads, device and versions."""
        exact = ("fingerprint",) if self.finished else ("fingerprint", "threads", "device", "torch", "cloche")
        old, new = flat(was), flat(now)
        differ = [(k, old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        differ = [d for d in differ if d[2] != "auto" and not d[0].startswith("expect.") and d[0] != "data.source"]
        differ += [(f"facts.{k}", was_facts.get(k), now_facts.get(k)) for k in exact if was_facts.get(k) != now_facts.get(k)]
        differ = [d for d in differ if d[0] not in allow]
        if differ:
            rows = "\n  ".join(_("{key}   there {old}   now {new}").format(key=k, old=show(o), new=show(n)) for k, o, n in differ)
            raise UserError(
                _("{path} was begun with another recipe, data or machine").format(path=self.path),
                rows,
                _("another folder: --out NAME · start anew: --again · go on all the same: {flags}").format(flags=" ".join(f"--allow-change {d[0]}" for d in differ)),
                name="changed",
            )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run; a last line cut short by a crash is dropped."""
    log = path / "events.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"net": {"kind": "cnn"}} → {"net.kind": "cnn"}."""
    out: dict[str, Any] = {}
    for k, v in tables.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out
