"""The run folder while it is being trained: opened, compared, appended to, saved and finished. The contract between verbs.

recipe.toml, prepare.json and facts.json stand before the first step; events.jsonl grows; checkpoints/step-N are whole or absent;
manifest.json comes last of all and marks a finished run.
"""

import contextlib
import json
import os
from pathlib import Path
import re
from typing import Any

import tomli_w
from torch import Tensor

from cloche import files, folders, trust
from cloche.config import show
from cloche.errors import FAILED, UserError
from cloche.training.contract import Numbers, checked, read_facts
from cloche.training.log import say
from cloche.training.parallel import Group
from cloche.words import _, listed

KIND, FORMAT, KEEP = "cloche run", 1, 2
SEALED = ("recipe.toml", "prepare.json", "facts.json", "model.safetensors", "results.json")  # what the manifest vouches for
POISONED = "nonfinite.json"
# in the order in which --again removes them: cut short anywhere, what is left is still a run's, and no finished one
OURS = ("manifest.json", POISONED, "checkpoints", "events.jsonl", "report", "README.md", *SEALED[::-1])
MOST_LOG_BYTES = 256 << 20  # a year of steps
EXACT = ("fingerprint", "threads", "device", "torch", "cloche")  # facts that bits depend on


class Run:
    """A run folder that this process holds the lock of. Of several processes the first does, the others only read."""

    def __init__(self, path: Path, group: Group | None = None) -> None:
        self.path, self.log, self.group = path, path / "events.jsonl", group or Group()
        self.lock: files.Lock | None = None
        self.mute = False  # the log cannot be written, and that was said
        self.last_saved = -1  # the step of the newest checkpoint
        self.best_step = 0
        self.spent_s = 0.0  # by the processes before this one
        self.looping = False  # while it is true, a signal only sets `stop`
        self.stop = 0  # the signal: the loop saves and ends
        self.save_s = 0.0  # seconds between two checkpoints; 0: as many as cost 1 %
        self.allow: tuple[str, ...] = ()  # dotted names of fields that may change

    def open(self, recipe: dict[str, Any], facts: dict[str, Any], again: bool, allow: tuple[str, ...]) -> dict[str, Any] | None:
        """Take the folder; say whether there is something to go on from.

        Args:
            recipe: the resolved recipe; facts: what it was resolved from.
            again: start anew. allow: dotted names of fields that may differ from the run's.
        Returns: the recipe that the folder was begun with (measured choices included), or None for a new run.
        Raises: UserError naming every field that differs, or the process that holds the folder.
        """
        self.allow = allow
        if not self.group.leads:
            self.group.wait("begun")
            return self.recipe()
        choose = _("choose another with --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(_("{path} is a file, not a folder for a run").format(path=self.path), "", choose)
        here = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.is_dir() else []
        if here and "recipe.toml" not in here:
            raise UserError(_("{path} holds files that are not a run's").format(path=self.path), listed(here), choose)
        try:
            folders.make_folder(self.path)
        except UserError as fault:
            why = getattr(fault.__cause__, "strerror", "") or fault.what
            raise UserError(_("cannot make the folder {path}").format(path=self.path), why, choose, name="read-only") from None
        for name in (".lock", *OURS):
            files.inside(self.path, name, manifest=True)
        self.lock = files.Lock(self.path)
        self.lock.__enter__()
        for folder in filter(Path.is_dir, (self.path, self.path / "checkpoints", self.path / "report")):
            files.sweep(folder)
        if again:
            self._clear()
        if not (self.path / "facts.json").exists():
            return None
        found, old = self.recipe(), read_facts(self.path)
        with trust.believing(self.path / "recipe.toml"):
            self._compare(found, recipe, old, facts, allow)
        if self.finished:
            self.group.done("begun")
        return found

    def recipe(self) -> dict[str, Any]:
        """The tables that the folder was begun with."""
        try:
            return trust.read_toml(self.path / "recipe.toml")
        except UserError as fault:
            fault.do = _("start anew with --again")
            raise

    def close(self) -> None:
        if self.lock is not None:
            self.lock.__exit__(None, None, None)
            self.lock = None

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").exists()

    def begin(self, recipe: str, facts: dict[str, Any], prepare: dict[str, Any]) -> None:
        """What stands before the first step. facts.json comes last: its presence says that the others are there."""
        if not self.group.leads:
            return
        files.durable_write(self.path / "recipe.toml", recipe.encode())
        files.write_json(self.path / "prepare.json", prepare)
        files.write_json(self.path / "facts.json", facts)
        if (path := self.path / POISONED).exists() and set(files.read_json(path)["rows"]) <= set(facts.get("skipped", [])):
            path.unlink()  # --rewind has taken them over
        self.group.done("begun")

    def left_out(self, rewind: bool) -> list[int]:
        """The rows that this run does without; with rewind also those of the step that ended it."""
        was = read_facts(self.path).get("skipped", []) if (self.path / "facts.json").exists() else []
        if not rewind or not self.group.leads:
            return was
        if not (self.path / POISONED).exists():
            raise UserError(_("{path} was not ended by a number that is not finite").format(path=self.path), "", _("leave out --rewind"))
        bad = files.read_json(self.path / POISONED)
        told = _("without the examples {ids} of step {step}, from the last checkpoint on")
        say(told.format(ids=listed(map(str, bad["rows"]), 8), step=bad["step"]))
        return sorted({*was, *bad["rows"]})

    def chunks(self, asked: int, again: bool) -> int:
        """The chunks of a step, whatever the number of processes: those the run was begun with, if it asked for the same; else
        `asked`, raised to a multiple of the processes."""
        size, begun = self.group.size, (self.path / "facts.json").exists() and not again
        if begun and read_facts(self.path).get("asked_chunks") == asked:
            asked = self.recipe()["train"]["chunks"]
        raised = -(-asked // size) * size
        if raised != asked:
            say(_("train.chunks {asked} → {n}: a multiple of the {size} processes").format(asked=asked, n=raised, size=size))
        return raised

    def amend(self, table: str, keys: dict[str, Any]) -> None:
        """Other values in recipe.toml from here on."""
        recipe = self.recipe()
        files.durable_write(self.path / "recipe.toml", tomli_w.dumps({**recipe, table: {**recipe[table], **keys}}).encode())

    def poisoned(self, step: int, rows: list[int]) -> None:
        """The rows whose step gave no finite number: what --rewind leaves out."""
        if self.group.leads:
            files.write_json(self.path / POISONED, {"step": step, "rows": rows})

    def event(self, **event: Any) -> None:
        """One line in events.jsonl. A full disk does not end the run here; the next checkpoint will say it."""
        if not self.group.leads:
            return
        before = self.log.stat().st_size if self.log.exists() else 0
        try:
            with self.log.open("a", encoding="utf-8") as f:
                f.write(json.dumps(event, ensure_ascii=False) + "\n")
        except OSError as fault:
            if self.log.exists():
                os.truncate(self.log, before)  # no half line
            if not self.mute:
                self.mute = True
                say(_("events.jsonl cannot be written ({why}); training goes on").format(why=fault.strerror))

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """A checkpoint that is whole or absent; older ones go only after it stands."""
        if not self.group.leads:
            self.last_saved = step
            return
        with self._telling_what_is_saved():
            folders.sync(self.log)  # as durable as the checkpoint that counts its bytes
            numbers = {**numbers, "events_bytes": self.log.stat().st_size}
            folders.make_folder(self.path / "checkpoints")
            parts = {"state.safetensors": files.tensor_file(tensors, {}), "place.json": json.dumps(numbers, allow_nan=False).encode()}
            files.write_folder(self.path / "checkpoints" / f"step-{step}", parts, "cloche checkpoint", {})
        self.last_saved = step
        for _step, folder in self._checkpoints()[:-KEEP]:
            with contextlib.suppress(OSError):  # a scanner may hold it; the next save tries again
                folders.remove_folder(folder)

    @contextlib.contextmanager
    def _telling_what_is_saved(self):
        """A fault of the disk also says from which step the run will go on."""
        try:
            yield
        except UserError as fault:
            good = _("the last good step is {step}").format(step=self.last_saved) if self.last_saved >= 0 else _("no step is saved yet")
            raise UserError(fault.what, "; ".join(filter(None, (fault.found, good))), fault.do, code=fault.code, name=fault.name) from fault

    def last(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, with the event log cut to where it stood then.

        Raises: UserError naming the damaged file, and the older checkpoint that is left.
        """
        found, keep = self._checkpoints(), 0
        state = None
        if found:
            self.last_saved, folder = found[-1]
            try:
                files.inside(self.path, f"checkpoints/{folder.name}")
                files.check_manifest(folder, "cloche checkpoint", thorough=False, names=("place.json", "state.safetensors"))
                numbers = checked(Numbers, folder / "place.json")
                self.spent_s = numbers["seconds"]
                state, keep = (files.read_tensors(folder / "state.safetensors")[0], numbers), numbers["events_bytes"]  # names the tensor
                files.check_manifest(folder, "cloche checkpoint")
            except UserError as fault:
                do = _("start anew with --again")
                if len(found) > 1:
                    do = _("delete {folder} and type the same command: it goes on from step {step}").format(
                        folder=folder, step=found[-2][0]
                    )
                raise UserError(fault.what, fault.found, do, code=FAILED, name=fault.name) from None
        if self.log.exists() and self.group.leads:
            os.truncate(self.log, min(keep, self.log.stat().st_size))
        return state

    def finish(self, model: dict[str, Tensor], results: dict[str, Any], card: str) -> None:
        """The trained weights and the results; the manifest, which makes it a finished run, comes last."""
        with self._telling_what_is_saved():
            files.durable_write(self.path / "model.safetensors", files.tensor_file(model, {}))
            files.write_json(self.path / "results.json", results)
            files.durable_write(self.path / "README.md", card.encode())
            files.write_manifest(self.path, KIND, list(SEALED))
        with contextlib.suppress(OSError):
            folders.remove_folder(self.path / "checkpoints")  # the weights are durable by now

    def _checkpoints(self) -> list[tuple[int, Path]]:
        folder = self.path / "checkpoints"
        return sorted((int(m[1]), p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := re.fullmatch(r"step-(\d+)", p.name)))

    def _clear(self) -> None:
        """Remove what a run leaves, and nothing else. The manifest goes first: a half-cleared folder is not a finished run."""
        for path in (self.path / name for name in OURS):
            folders.remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    def _compare(self, was: dict[str, Any], now: dict[str, Any], old: dict[str, Any], new: dict[str, Any], allow: tuple[str, ...]) -> None:
        """A finished run needs the same recipe and data; one to go on with also the same threads, device and versions."""
        old, new = (
            {**flat(r), **{f"facts.{k}": f.get(k) for k in (EXACT[:1] if self.finished else EXACT)}} for r, f in ((was, old), (now, new))
        )
        free = {k for k in old.keys() | new.keys() if k.startswith("expect.") or new.get(k) == "auto"} | {"data.source", *allow}
        strange = [k for k in allow if k not in old and k not in new]
        if strange:
            told = _("--allow-change names no field of this run: {names}").format(names=", ".join(strange))
            raise UserError(told, "", _("a field is a key such as optim.lr, or facts.threads"))
        differ = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in free]
        if differ:
            rows = [_("{key}   there {old}   now {new}").format(key=k, old=show(old.get(k)), new=show(new.get(k))) for k in differ]
            flags = " ".join(f"--allow-change {k}" for k in differ)
            raise UserError(
                _("{path} was begun with another recipe, data or machine").format(path=self.path),
                "\n  ".join(rows),
                _("another folder: --out NAME · start anew: --again · go on all the same: {flags}").format(flags=flags),
                name="changed",
            )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run; a last line cut short by a crash is dropped."""
    log = path / "events.jsonl"
    lines = files.read_bytes(files.inside(path, log.name), MOST_LOG_BYTES).decode().split("\n")[:-1] if os.path.lexists(log) else []
    return [json.loads(line) for line in lines]


def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"net": {"kind": "cnn"}} → {"net.kind": "cnn"}."""
    out: dict[str, Any] = {}
    for k, v in tables.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out
