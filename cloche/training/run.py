"""The run folder while it is being trained: opened, compared, appended to, saved and finished. The contract between verbs.

recipe.toml, prepare.json and facts.json stand before the first step; events.jsonl grows; checkpoints/step-N are whole or absent;
manifest.json comes last of all and marks a finished run.
"""

import json
import os
from pathlib import Path
import re
import shutil
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from torch import Tensor

from cloche import files, trust
from cloche.config import Frozen, show
from cloche.errors import FAILED, UserError
from cloche.tasks.metrics import NAMES
from cloche.training.log import say
from cloche.words import _, listed

KIND, FORMAT, KEEP = "cloche run", 1, 2
SEALED = ("recipe.toml", "prepare.json", "facts.json", "model.safetensors", "results.json")  # what the manifest vouches for
# in the order in which --again removes them: cut short anywhere, what is left is still a run's, and no finished one
OURS = ("manifest.json", "checkpoints", "events.jsonl", "report", "README.md", *SEALED[::-1])
MOST_LOG_BYTES = 256 << 20  # a year of steps
EXACT = ("fingerprint", "threads", "device", "torch", "cloche")  # facts that bits depend on


Count = Annotated[int, Field(ge=0, lt=2**53)]
Size = Annotated[float, Field(ge=0, lt=1e18)]


class Facts(Frozen):
    """What facts.json has to be for the verbs to read it."""

    model_config = ConfigDict(extra="allow")

    source: str
    fingerprint: str
    kind: str
    labels: list[str]
    outputs: Count
    multi: bool
    n: Count
    parts: dict[Literal["train", "validation", "test"], Count]
    left_out: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    device: str
    torch: str
    cloche: str
    threads: Count
    parameters: Count
    flops: Size


class Results(Frozen):
    """What results.json has to be; of what the page alone shows, `write_report` finds out."""

    model_config = ConfigDict(extra="allow")

    part: Literal["train", "validation", "test"]
    headline: Literal[tuple(NAMES)]  # type: ignore[valid-type]
    metrics: dict[str, float]
    interval: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    baselines: dict[str, float]
    n: Count
    seed: Count
    seconds: Size
    per_class: dict[Literal["precision", "recall", "f1", "support", "predicted"], list[float]] | None = None
    confusion: list[list[Count]] | None = None
    speed: dict[str, Size]

    @model_validator(mode="after")
    def _one_each(self, info: ValidationInfo) -> "Results":
        k, table, matrix = len((info.context or {"labels": []})["labels"]), self.per_class, self.confusion or []
        if self.headline not in self.metrics or (table and (len(table) < 5 or {len(v) for v in table.values()} != {k})):
            raise ValueError("the figures of each class do not fit")
        if {len(matrix), *map(len, matrix)} - {0, k} or (self.interval[0] is None) != (self.interval[1] is None):
            raise ValueError("the confusion matrix does not fit")
        return self


class Numbers(Frozen):
    """What the place.json of a checkpoint has to be."""

    place: dict[Literal["step", "epoch", "index"], Count] = Field(min_length=3)
    best_value: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    best_step: Count
    waited: Count
    optim: str
    seconds: Size
    events_bytes: Count


def read_facts(path: Path) -> dict[str, Any]:
    return checked(Facts, path / "facts.json")


def checked(kind: type[Frozen], path: Path, context: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON of a run folder, if it is of this kind. Raises: UserError "damaged" naming the field."""
    found = files.read_json(path)
    try:
        kind.model_validate(found, context=context)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise files.damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]) from None
    return found


class Run:
    """A run folder that this process holds the lock of."""

    def __init__(self, path: Path) -> None:
        self.path, self.log = path, path / "events.jsonl"
        self.lock: files.Lock | None = None
        self.mute = False  # the log cannot be written, and that was said
        self.last_saved = -1  # the step of the newest checkpoint
        self.best_step = 0
        self.spent_s = 0.0  # by the processes before this one
        self.looping = False  # while it is true, a signal only sets `stop`
        self.stop = ""  # the name of the signal: the loop saves and ends

    def open(self, recipe: dict[str, Any], facts: dict[str, Any], again: bool, allow: tuple[str, ...]) -> dict[str, Any] | None:
        """Take the folder; say whether there is something to go on from.

        Args:
            recipe: the resolved recipe; facts: what it was resolved from.
            again: start anew. allow: dotted names of fields that may differ from the run's.
        Returns: the recipe that the folder was begun with (measured choices included), or None for a new run.
        Raises: UserError naming every field that differs, or the process that holds the folder.
        """
        choose = _("choose another with --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(_("{path} is a file, not a folder for a run").format(path=self.path), "", choose)
        here = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.is_dir() else []
        if here and "recipe.toml" not in here:
            raise UserError(_("{path} holds files that are not a run's").format(path=self.path), listed(here), choose)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(
                _("cannot make the folder {path}").format(path=self.path), fault.strerror or "", choose, name="read-only"
            ) from None
        for name in (".lock", *OURS):
            files.inside(self.path, name, manifest=True)
        self.lock = files.Lock(self.path)
        self.lock.__enter__()
        for folder in filter(Path.is_dir, (self.path, self.path / "checkpoints")):
            files.sweep(folder)
        if again:
            self._clear()
        if not (self.path / "facts.json").exists():
            return None
        try:
            found, old = trust.read_toml(self.path / "recipe.toml"), read_facts(self.path)
        except UserError as fault:
            fault.do = _("start anew with --again")
            raise
        with trust.believing(self.path / "recipe.toml"):
            self._compare(found, recipe, old, facts, allow)
        return found

    def close(self) -> None:
        if self.lock is not None:
            self.lock.__exit__(None, None, None)
            self.lock = None

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").exists()

    def begin(self, recipe: str, facts: dict[str, Any], prepare: dict[str, Any]) -> None:
        """What stands before the first step. facts.json comes last: its presence says that the others are there."""
        files.durable_write(self.path / "recipe.toml", recipe.encode())
        files.write_json(self.path / "prepare.json", prepare)
        files.write_json(self.path / "facts.json", facts)

    def event(self, **event: Any) -> None:
        """One line in events.jsonl. A full disk does not end the run here; the next checkpoint will say it."""
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
        if self.log.exists():
            with self.log.open("rb+") as f:  # as durable as the checkpoint that counts its bytes
                os.fsync(f.fileno())
        numbers = {**numbers, "events_bytes": self.log.stat().st_size if self.log.exists() else 0}
        (self.path / "checkpoints").mkdir(exist_ok=True)
        parts = {"state.safetensors": files.tensor_file(tensors, {}), "place.json": json.dumps(numbers).encode()}
        files.write_folder(self.path / "checkpoints" / f"step-{step}", parts, "cloche checkpoint", {})
        self.last_saved = step
        for _step, folder in self._checkpoints()[:-KEEP]:
            shutil.rmtree(folder, ignore_errors=True)  # a scanner may hold it; the next save tries again

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
        if self.log.exists():
            os.truncate(self.log, min(keep, self.log.stat().st_size))
        return state

    def finish(self, model: dict[str, Tensor], results: dict[str, Any], card: str) -> None:
        """The trained weights and the results; the manifest, which makes it a finished run, comes last."""
        files.durable_write(self.path / "model.safetensors", files.tensor_file(model, {}))
        files.write_json(self.path / "results.json", results)
        files.durable_write(self.path / "README.md", card.encode())
        files.write_manifest(self.path, KIND, list(SEALED))
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # the weights are durable by now

    def _checkpoints(self) -> list[tuple[int, Path]]:
        folder = self.path / "checkpoints"
        return sorted((int(m[1]), p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := re.fullmatch(r"step-(\d+)", p.name)))

    def _clear(self) -> None:
        """Remove what a run leaves, and nothing else. The manifest goes first: a half-cleared folder is not a finished run."""
        for path in (self.path / name for name in OURS):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

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
