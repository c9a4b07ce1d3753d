"""The recipe: five tables as one model. As written → parsed (all faults at once) → resolved from facts."""

from importlib import resources
from pathlib import Path
import re
import tomllib
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError
import tomli_w

from cloche.config import ALIASES, Fault, Frozen, NetConfig, RecipeError, faults_of, keys_of, nearest, show, unknown, wrong_kind
from cloche.data.kinds import DATA, KINDS
from cloche.data.read.examples import utf8
from cloche.data.store import kind_of
from cloche.errors import UserError
from cloche.nets import NETS
from cloche.tasks import TASKS
from cloche.tasks.metrics import NAMES
from cloche.training.job import TrainConfig
from cloche.training.optim import OPTIMS
from cloche.words import _

FORMAT = 1


class OwnConfig(NetConfig):
    """A person's own nn.Module or task object, passed to `cloche.fit`: the run remembers its name, never its code."""

    kind: Literal["module", "own"]
    name: str


class Expect(Frozen):
    """What a shipped recipe is held to by `make recipes`: one figure's bound over n examples, and the seconds it takes."""

    metric: Literal[tuple(NAMES)]  # type: ignore[valid-type]
    at_least: float | None = None
    at_most: float | None = None
    n: int | None = Field(None, ge=1)
    seconds: float = Field(gt=0)


class Recipe(Frozen):
    format: Literal[1] = FORMAT
    data: SerializeAsAny[Frozen]
    net: SerializeAsAny[Frozen]
    task: SerializeAsAny[Frozen]
    optim: SerializeAsAny[Frozen]
    train: TrainConfig
    expect: Expect | None = None

    def tables(self) -> dict[str, Any]:
        """Plain dicts, without keys that are not set."""
        return self.model_dump(mode="json", exclude_none=True)

    def toml(self) -> str:
        return tomli_w.dumps(self.tables())

    def but(self, **tables: dict[str, Any]) -> "Recipe":
        """A copy with some keys of some tables replaced: but(train={"precision": "bf16"})."""
        return self.model_copy(update={t: getattr(self, t).model_copy(update=keys) for t, keys in tables.items()})


# table → (its kinds, what one of them is called, the kind where none is given and nothing else tells it)
TABLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "data": (DATA, _("kind of data"), "pictures"),
    "net": (NETS | {"module": OwnConfig}, _("net"), ""),
    "task": (TASKS | {"own": OwnConfig}, _("task"), ""),
    "optim": (OPTIMS, _("optimizer"), "adam"),
}
SINGLE = {"train": TrainConfig, "expect": Expect}
RECIPES = resources.files("cloche") / "recipes"


def kinds_of(table: str) -> dict[str, type[Frozen]]:
    """The kinds that a recipe may name: all but a person's own."""
    return {kind: config for kind, config in TABLES[table][0].items() if config is not OwnConfig}


def shipped() -> list[str]:
    """The names of the recipes that come with cloche."""
    return sorted(p.name.removesuffix(".toml") for p in RECIPES.iterdir() if p.name.endswith(".toml"))


def find(name: str, data: str | None) -> tuple[str, dict[str, Any]]:
    """RECIPE as a person types it → (name of the run, tables as written).

    A bare word is a shipped recipe, `x.toml` a file, anything else a path to data; a UserError where two go by the name, or none.
    """
    word = name.removeprefix("recipe:")
    if word in shipped():
        if word == name and Path(name).is_dir():
            told = _('"{name}" is a recipe, and a folder here has that name too').format(name=name)
            raise UserError(told, "", _("write recipe:{name} for the recipe, ./{name} for the folder").format(name=name))
        raw = tomllib.loads((RECIPES / f"{word}.toml").read_text(encoding="utf-8"))
    elif name.endswith(".toml"):
        word = Path(name).stem
        if not Path(name).exists():
            do = _("the shipped recipes are {names}").format(names=", ".join(shipped()))
            raise UserError(_("there is no file {path}").format(path=name), "", do)
        try:
            raw = tomllib.loads(utf8(Path(name)))
        except (tomllib.TOMLDecodeError, RecursionError) as fault:
            told = _("{path} is not a recipe: {why}").format(path=name, why=fault)
            raise UserError(told, "", _("a recipe is a TOML file; see: cloche list recipes")) from None
    elif name and (Path(name).exists() or "/" in name or "\\" in name):
        if all((Path(name) / n).exists() for n in ("recipe.toml", "facts.json")):
            do = _("to train it anew: cloche train {path}; what it answers: cloche predict {run} INPUT")
            raise UserError(_("{path} is a run, not data").format(path=name), "", do.format(path=Path(name) / "recipe.toml", run=name))
        word, kind = Path(name).resolve().name or "data", KINDS[kind_of(name)]
        raw = tomllib.loads((RECIPES / f"{kind.recipe}.toml").read_text(encoding="utf-8"))
        raw.pop("expect", None)
        for table, _dot, key in (k.partition(".") for k in kind.ours):
            raw[table].pop(key, None)
        raw["data"]["source"] = name
    else:
        near = nearest(name, [*shipped(), *(p.name for p in Path().iterdir())])
        found = near and _('the nearest is "{near}"').format(near=near)
        do = _("the shipped ones are {names}; or give a .toml file or a path to your data").format(names=", ".join(shipped()))
        raise UserError(_('there is no recipe "{name}"').format(name=name), found, do)
    if data is not None:
        raw["data"] = {**raw.get("data", {}), "source": data}
    return re.sub(r"[^\w.-]", "_", word), raw


def change(raw: dict[str, Any], sets: dict[str, Any]) -> dict[str, Any]:
    """The tables with dotted keys set; `train.steps` unsets `train.epochs` and the other way round, `net.size` what another had set."""
    out, both = {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()}, {"train.steps", "train.epochs"}
    first = {"net.kind": 0, "net.size": 1}  # which clear, whatever the order
    for key, value in sorted(sets.items(), key=lambda item: first.get(item[0], 2)):
        *path, last = key.split(".")
        table = out
        for p in path:
            table[p] = dict(table[p]) if isinstance(table.get(p), dict) else {}
            table = table[p]
        if key in both and not both <= sets.keys():
            table.pop("epochs" if last == "steps" else "steps", None)
        if key == "net.kind" and table.get("kind") != value:  # the other net has other keys
            table.clear()
        if key == "net.size":
            for t, k, was in sized(out):
                if isinstance(out.get(t), dict) and out[t].get(k) == was:
                    del out[t][k]
        table[last] = value
    return out


def sized(raw: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """What `[net] size` sets where nothing is set: (table, key, value)."""
    net = raw["net"] if isinstance(raw.get("net"), dict) else {}
    config = NETS.get(str(net.get("kind")), NetConfig)
    return [(*key.split("."), value) for key, value in config.sizes.get(str(net.get("size")), {}).items()]


def parse_set(text: str) -> tuple[str, Any]:
    """`optim.lr=0.01` → ("optim.lr", 0.01); a word without quotes is text."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key.strip()):
        raise UserError(_("--set needs key=value"), text, _("for example --set optim.lr=0.01"))
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return key.strip(), value


def parse(raw: dict[str, Any], name: str = "") -> Recipe:
    """Tables as written → a Recipe. Raises: RecipeError with every fault; UserError for a format that this version does not read."""
    if (found := raw.get("format")) != FORMAT:
        newer = type(found) is int and found > FORMAT
        do = _("Update cloche.") if newer else _("write format = {n} into its first line").format(n=FORMAT)
        told = _("format = {n} expected, {found} found").format(n=FORMAT, found=show(found))
        raise UserError(_("the recipe {name} is of another format").format(name=name), told, do)
    for table, key, value in sized(raw):  # a key as written > the size > the default; written out, so that no later reader asks the size
        if isinstance(raw.get(table, {}), dict):
            raw = {**raw, table: {key: value, **raw.get(table, {})}}
    faults, built = [], {}
    configs = [(t, c) for t, (kinds, *_rest) in TABLES.items() for c in kinds.values()] + list(SINGLE.items())
    known = {key: field for table, config in configs for key, field in keys_of(config, table).items()}
    for table in raw.keys() - {"format", *TABLES, *SINGLE}:
        near = nearest(table, [*TABLES, *SINGLE]) or ALIASES.get(table.lower(), "").split(".")[0]
        if not isinstance(raw[table], dict):
            faults.append(unknown(table, raw[table], known, raw))
        elif near:
            faults += [Fault(f"{table}.{k}", _("no such table"), f"{near}.{k}", (f"{near}.{k}", str(v))) for k, v in raw[table].items()]
        else:
            faults.append(Fault(table, _("no such table"), ", ".join([*TABLES, *SINGLE])))
    for table, (kinds, noun, default) in TABLES.items():
        given = raw.get(table, {})
        if not isinstance(given, dict):
            faults.append(Fault(f"{table} = {show(given)}", _("must be {type}").format(type=_("a table")), f'{table}.kind = "{given}"'))
            continue
        if table == "data" and isinstance(source := given.get("source"), str) and not given.get("kind"):
            default = kind_of(source)
        elif table == "task":  # the first one that is for the data
            default = next(task for task, config in TASKS.items() if getattr(built.get("data"), "kind", "pictures") in config.fits)
        kind = given.get("kind") or default
        if kind not in kinds:
            faults.append(wrong_kind(f"{table}.kind", kind, kinds_of(table), noun))
            faults += [unknown(f"{table}.{k}", v, known, raw) for k, v in given.items() if f"{table}.{k}" not in known]
            continue
        built[table] = _table(table, kinds[kind], {**raw, table: {**given, "kind": kind}}, faults)
    for table, config in SINGLE.items():
        if table in raw or table == "train":
            built[table] = _table(table, config, raw, faults)
    train = built.get("train")
    if isinstance(train, TrainConfig) and (train.epochs is None) == (train.steps is None):
        found = " and ".join(f"{k} = {show(v)}" for k in ("epochs", "steps") if (v := getattr(train, k)) is not None)
        faults.append(Fault(f"train: {found}".rstrip(": "), _("set train.epochs or train.steps, exactly one"), "train.epochs = 10"))
    if faults:
        raise RecipeError(sorted(faults, key=lambda f: f.key))
    return Recipe(format=FORMAT, **built)


def _table(table: str, config: type[Frozen], raw: dict[str, Any], faults: list[Fault]) -> Frozen | None:
    try:
        return config.model_validate(raw.get(table, {}))
    except ValidationError as error:
        faults += faults_of(error, table, config, raw)
        return None


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    tables = {t: {"oneOf": [c.model_json_schema() for c in dict.fromkeys(kinds_of(t).values())]} for t in TABLES}
    single = {t: c.model_json_schema() for t, c in SINGLE.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cloche recipe",
        "type": "object",
        "properties": {"format": {"const": FORMAT}, **tables, **single},
        "required": ["format", "data", "net", "train"],
        "additionalProperties": False,
    }
