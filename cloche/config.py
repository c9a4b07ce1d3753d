"""The frozen base of every table of a recipe, and how its faults are told: all at once, each with the nearest name.

An unknown key is never ignored: it is an error that names the key one probably meant.
"""

from collections.abc import Iterable
from dataclasses import dataclass
import difflib
import shlex
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from cloche.errors import UserError
from cloche.words import _, _n

# What people of other libraries write for our keys. Told, never silently accepted.
ALIASES = {
    alias: key
    for key, aliases in {
        "data.source": "path dataset", "data.pixels": "image_size img_size size resize", "data.validation": "val_split",
        "data.test": "test_split test_size", "data.augment": "augmentation", "net.kind": "model network arch type",
        "net.dropout": "dropout_rate", "net.hidden": "hidden_size", "net.widths": "hidden_sizes layers hidden_layers",
        "net.stages": "filters", "net.kernel": "kernel_size", "net.norm": "batch_norm", "task.loss": "criterion",
        "optim.kind": "optimizer optimiser", "optim.lr": "learning_rate lr eta alpha", "optim.weight_decay": "wd l2",
        "optim.schedule": "scheduler lr_scheduler", "optim.clip": "grad_clip max_grad_norm", "train.batch": "batch_size bs",
        "train.epochs": "num_epochs n_epochs max_epochs epoch", "train.steps": "max_steps iterations",
        "train.seed": "random_state random_seed", "train.chunks": "accumulate grad_accum gradient_accumulation_steps",
        "train.precision": "amp dtype", "train.patience": "early_stopping", "train.device": "gpu",
    }.items()
    for alias in aliases.split()
}  # fmt: skip

PLACES = {"data": "data", "net": "nets", "task": "tasks", "optim": "optim", "train": "train"}  # table → where `cloche list` shows its keys
EXPECTED = {  # what pydantic finds wrong → what is told; its own words for the bound fill the gap
    "greater_than": _("must be more than {gt}"),
    "greater_than_equal": _("must be at least {ge}"),
    "less_than": _("must be less than {lt}"),
    "less_than_equal": _("must be at most {le}"),
    "too_short": _("too short, needs {min_length} or more"),
    "finite_number": _("must be a finite number"),
    "string_pattern_mismatch": _("not allowed here"),
}
LIST, TABLE = _("a list in brackets"), _("a table")
TYPES = {"int": _("a whole number"), "float": _("a number"), "string": _("text in quotes"), "bool": _("true or false")}
TYPES |= {"tuple": LIST, "list": LIST, "model": TABLE, "dict": TABLE}


class Frozen(BaseModel):
    """A table of a recipe: complete before anything is built, never changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NetConfig(Frozen):
    """The table of a net. A field that holds another net's table is a net that trains along, under the field's name.

    faces: the ways in which the net can be called. reads: the kinds of port that it takes, where not any. carries: whether it hands a
    state on to the rows that follow. any_side: whether it takes pictures of another side than it was built for. sizes: what each
    `size` sets in the tables of a recipe, where nothing is set.
    """

    faces: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    carries: ClassVar[bool] = False
    any_side: ClassVar[bool] = False
    sizes: ClassVar[dict[str, dict[str, Any]]] = {}


class TaskConfig(Frozen):
    """The table of a task. fits: the kinds of data that it is for."""

    fits: ClassVar[tuple[str, ...]] = ()

    def resolve(self, facts: dict[str, Any]) -> "TaskConfig":
        """The table without "auto"; a task that leaves nothing open returns it as it is."""
        return self


@dataclass(frozen=True)
class Port:
    """What goes into a net or comes out of it.

    kind: "vector" | "image" | "series" | "tokens" | "memory". shape: without B, None where it varies. size: classes or vocabulary.
    """

    kind: str
    shape: tuple[int | None, ...]
    size: int = 0


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe: the key as written, what is wrong with it, the way out, and the argument that mends it."""

    key: str
    wrong: str
    do: str = ""
    mend: tuple[str, str] = ("", "")  # ("optim.lr", "0.01") where the person's intent is clear


class RecipeError(UserError):
    """All faults of a recipe, shown together. command: the one that mends them all, where that is known."""

    def __init__(self, faults: Iterable[Fault], command: str = "") -> None:
        self.faults = tuple(faults)
        head = _n("The recipe has one fault; nothing was started.", "The recipe has {n} faults; nothing was started.", len(self.faults))
        cells = [(f.key, f.wrong, *f"{'→ ' if f.do else ''}{f.do}".partition("   ")[::2]) for f in self.faults]
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = ["   ".join(f"{cell:<{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in cells]
        do = command and _("Try:  {command}").format(command=command)
        super().__init__(head.format(n=len(self.faults)), "\n  ".join(rows), do, name="recipe")

    def retold(self, words: list[str]) -> "RecipeError":
        """The faults in the order in which they were typed, and the command that mends them all, where every one can be mended by --set."""
        keys = [f.key.split(" = ")[0] for f in self.faults]
        typed = {w.partition("=")[0].strip(): n for n, w in enumerate(words) if words[n - 1] == "--set"}
        can = all(f.mend[1] and (key in typed or key == f.mend[0]) for f, key in zip(self.faults, keys, strict=True))
        mended = dict(enumerate(words))
        for f, key in zip(self.faults, keys, strict=True):
            mended[typed.get(key, f"set {key}")] = f"{'' if key in typed else '--set '}{'='.join(f.mend)}"
        command = "cloche " + " ".join(w if w.startswith("--set ") else shlex.quote(w) for w in mended.values())
        order = sorted(zip(keys, self.faults, strict=True), key=lambda pair: typed.get(pair[0], len(words)))
        return RecipeError([f for _key, f in order], can * command)

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, f"  {self.found}", self.do) if line)


def instead(key: str, value: Any, wrong: str, better: str) -> Fault:
    """The fault of one word where another is meant."""
    return Fault(f"{key} = {show(value)}", wrong, better and f'"{better}"', (key, better))


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that a person most likely meant, "" when none is near."""
    return next(iter(difflib.get_close_matches(name.lower(), list(names), 1, 0.6)), "")


def keys_of(config: type[BaseModel], prefix: str) -> dict[str, Any]:
    """Every dotted key of a table → its field, tables inside tables included."""
    out = {}
    for name, field in config.model_fields.items():
        out[f"{prefix}.{name}"] = field
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if inner:
            out |= keys_of(inner, f"{prefix}.{name}")
    return out


def unknown(key: str, value: Any, known: dict[str, Any], raw: dict[str, Any]) -> Fault:
    """The fault of a key that does not exist: its alias, else the nearest name, else how to see them all. raw: the tables."""
    table, _dot, last = key.rpartition(".")
    here = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == table or not table}
    target = ALIASES.get(last.lower()) or here.get(nearest(last, here)) or ALIASES.get(nearest(last, ALIASES))
    if not target:
        return Fault(key, _("no such key"), _("see the keys: cloche list {table}").format(table=PLACES.get(table.split(".")[0], "--help")))
    field, told, (home, _dot, name) = known.get(target), target, target.partition(".")
    if field is not None and field.description:
        now = raw[home].get(name) if isinstance(raw.get(home), dict) else None
        now = show(now if now is not None else "" if field.is_required() else field.default)
        told = _("{key}   ({meaning}, now {value})").format(key=target, meaning=field.description, value=now)
    return Fault(key, _("no such key"), told, (target, value if isinstance(value, str) else show(value)))


def wrong_kind(key: str, value: Any, kinds: dict[str, Any], noun: str) -> Fault:
    """The fault of `net.kind = "cn"`: the nearest kind and all others."""
    near = nearest(str(value), kinds)
    others = _("{others}: cloche list {table}").format(others=", ".join(k for k in kinds if k != near), table=PLACES[key.split(".")[0]])
    way = _('"{near}"   (also {others})').format(near=near, others=others) if near else others
    key, wrong = (f"{key} = {show(value)}", _("no such {noun}").format(noun=noun)) if value else (key, _("is missing"))
    return Fault(key, wrong, way, (key.split(" = ")[0], near))


def faults_of(error: ValidationError, table: str, config: type[BaseModel], raw: dict[str, Any]) -> list[Fault]:
    """pydantic's errors in our words."""
    known, out = keys_of(config, table), []
    for e in error.errors():
        place = [str(p) for p in e["loc"] if not str(p).startswith(("function-", "constrained-", "literal["))]  # tags of a union
        key, value, kind, more = ".".join([table, *place]), e.get("input"), e["type"], e.get("ctx", {})
        if kind == "extra_forbidden":
            out.append(unknown(key, value, known, raw))
        elif kind == "missing":
            out.append(Fault(key, _("is missing"), _("set it: --set {key}=…").format(key=key)))
        elif kind == "literal_error":
            allowed = choices(known.get(key))
            told = _("not one of {allowed}").format(allowed=", ".join(allowed))
            out.append(instead(key, value, told, nearest(str(value), allowed)))
        else:
            told = EXPECTED.get(kind) or _("must be {type}").format(type=TYPES.get(kind.partition("_")[0], kind))
            field, way = known.get(key), ""
            if kind == "string_pattern_mismatch":
                way = field.description
            elif field and not field.is_required() and field.default is not None:
                way = _("for example {value}").format(value=show(field.default))
            out.append(Fault(f"{key} = {show(value)}", told.format(**{k: show(v) for k, v in more.items()}), way))
    # a list with a bad entry is "too short" as well, and each member of a union has its say: the innermost first word counts
    return list({f.key: f for f in reversed(out) if not any(o.key.startswith(f.key.split(" = ")[0] + ".") for o in out)}.values())


def choices(field: Any) -> list[str]:
    """The words that a key allows."""
    flat = [v for t in (field.annotation, *get_args(field.annotation)) if getattr(t, "__origin__", None) is Literal for v in get_args(t)]
    return [str(v) for v in dict.fromkeys(flat)]


def show(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + " }"
    if isinstance(value, BaseModel):
        return show(value.model_dump())
    return f"{value:g}" if isinstance(value, float) else str(value)
