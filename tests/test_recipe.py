"""A recipe as a person gets it wrong: every fault at once, what was found, the way out; and a right one stays itself through TOML."""

from importlib.util import find_spec
import json
import math
from pathlib import Path
import re
import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import torch

from cloche import cli
from cloche.config import ALIASES, RecipeError, keys_of
from cloche.data.read.builtin import BUILTIN
from cloche.errors import WRONG_INPUT
from cloche.nets import NETS
from cloche.nets.resnet import ResnetConfig
from cloche.recipe import SINGLE, TABLES, change, find, parse, parse_set, schema, shipped

HEAD = "The recipe has one fault; nothing was started."


@pytest.fixture(autouse=True)
def one_thread():
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """A command that is refused as the person's input: stderr. Nothing is left behind, no trace, no run folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = cli.run(list(argv))
        out, err = capsys.readouterr()
        assert code == WRONG_INPUT, err
        assert "Traceback" not in out + err and "cloche itself failed" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


# --- LOOK.md's slip of the pen, to the letter ---------------------------------------------------------------------------------------


def test_a_slip_of_the_pen(refused):
    assert refused("train", "digits", *sets("optim.lerning_rate=0.01", "net.kind=cn")) == (
        "The recipe has 2 faults; nothing was started.\n"
        "  optim.lerning_rate   no such key   → optim.lr   (the learning rate, now 0.001)\n"
        f'  net.kind = "cn"      no such net   → "cnn"      (also {", ".join(k for k in NETS if k != "cnn")}: cloche list nets)\n'
        "Try:  cloche train digits --set optim.lr=0.01 --set net.kind=cnn\n"
    )


def test_the_command_that_is_tried_is_right(refused):
    """What "Try:" says, typed: no fault of the recipe is left (the run is stopped by another wall: a file in its place)."""
    told = refused("train", "digits", *sets("optim.lerning_rate=0.01", "net.kind=mpl", "net.dropuot=0.25"), "--epochs", "3")
    words = told.splitlines()[-1].removeprefix("Try:  cloche ").split()
    assert words == ["train", "digits", *sets("optim.lr=0.01", "net.kind=mlp", "net.dropout=0.25"), "--epochs", "3"]
    recipe = parse(change(find("digits", None)[1], dict(parse_set(w) for w in words if "=" in w)))
    assert (recipe.optim.lr, recipe.net.kind, recipe.net.dropout) == (0.01, "mlp", 0.25)


def test_the_faults_come_in_the_order_in_which_they_were_typed(refused):
    told = refused("train", "digits", *sets("train.batch=0", "net.kind=cn", "data.pixels=0", "optim.lerning_rate=1"))
    assert re.findall(r"^  (\S+)", told, re.M) == ["train.batch", "net.kind", "data.pixels", "optim.lerning_rate"]
    assert "The recipe has 4 faults" in told and "Try:" not in told  # nobody knows which batch was meant


def test_faults_of_the_file_and_of_the_command_are_told_together(refused, tmp_path):
    Path("my.toml").write_text('format = 1\n[data]\nsource = "spirals"\n[net]\nkind = "mpl"\n[train]\nepochs = 3\nbtach = 8\n')
    told = refused("train", "my.toml", *sets("optim.lr=fast"))
    assert "The recipe has 3 faults" in told
    for text in ('net.kind = "mpl"', "train.btach", "→ train.batch", 'optim.lr = "fast"'):
        assert text in told
    assert "Try:" not in told  # --set cannot take a key out of a file


def test_a_fault_of_the_file_that_set_overrides(refused):
    Path("my.toml").write_text('format = 1\n[data]\nsource = "spirals"\n[net]\nkind = "mpl"\n[train]\nepochs = 3\n')
    assert refused("train", "my.toml").splitlines()[-1] == "Try:  cloche train my.toml --set net.kind=mlp"


# --- keys ---------------------------------------------------------------------------------------------------------------------------

FAULTS = {
    # a key that does not exist
    "optim.lerning_rate=0.1": r"optim\.lerning_rate   no such key   → optim\.lr .*now 0\.001",
    "net.kin=mlp": r"net\.kin   no such key   → net\.kind",
    "data.augment.rotat=5": r"data\.augment\.rotat   no such key   → data\.augment\.rotate",
    "net.foo=1": r"net\.foo   no such key   → see the keys: cloche list nets",
    "foo=1": r"foo   no such key   → see the keys: cloche list --help",
    "foo.bar=1": r"foo   no such table   → data, net, task, optim, train",
    "data.rows=100": r"data\.rows   no such key",  # belongs to the other kind of data
    # what people of other libraries write
    "learning_rate=0.1": r"learning_rate   no such key   → optim\.lr",
    "optim.learning_rate=0.1": r"optim\.learning_rate   no such key   → optim\.lr",
    "batch_size=8": r"batch_size   no such key   → train\.batch",
    "train.batch_size=8": r"train\.batch_size   no such key   → train\.batch",
    "model=mlp": r"model   no such key   → net\.kind",
    "model.kind=mlp": r"model\.kind   no such table   → net\.kind",
    "epochs=3": r"epochs   no such key   → train\.epochs .*now 15",
    # a value of another type
    'optim.lr="fast"': r'optim\.lr = "fast"   must be a number   → for example 0\.001',
    "optim.lr=fast": r'optim\.lr = "fast"   must be a number   → for example 0\.001',
    "train.batch=2.5": r"train\.batch = 2\.5   must be a whole number   → for example 64",
    "train.epochs=many": r'train\.epochs = "many"   must be a whole number$',
    "data.normalize=1": r"data\.normalize = 1   must be true or false   → for example true",
    "data.source=5": r"data\.source = 5   must be text in quotes",
    "data.augment=5": r"data\.augment = 5   must be a table",
    "net.stages=5": r"net\.stages = 5   must be a list in brackets   → for example \[\[32, 64\], \[128\]\]",
    "net.padding=x": r'net\.padding = "x"   must be a whole number   → for example "same"',
    "net=5": r"net = 5   must be a table",
    "train=5": r"train = 5   must be a table",
    "optim.lr.x=3": r"optim\.lr = \{ x = 3 \}   must be a number",
    # a value out of bounds, or none of the words
    "train.batch=0": r"train\.batch = 0   must be at least 1   → for example 64",
    "train.steps=0": r"train\.steps = 0   must be at least 1$",
    "net.dropout=1": r"net\.dropout = 1   must be less than 1   → for example 0\.5",
    "optim.lr=nan": r"optim\.lr = nan   must be a finite number",
    "optim.lr=inf": r"optim\.lr = inf   must be a finite number",
    "optim.lr=-1": r"optim\.lr = -1   must be more than 0   → for example 0\.001",
    "data.pixels=0": r"data\.pixels = 0   must be at least 1   → for example 48",
    "data.channels=2": r"data\.channels = 2   not one of 1, 3",
    "net.stages=[]": r"net\.stages = \[\]   too short, needs 1 or more",
    "net.stages=[[0]]": r"net\.stages\.0\.0 = 0   must be at least 1",
    "net.activation=rely": r'net\.activation = "rely"   not one of relu, .*→ "relu"',
    "train.device=gpu": r'train\.device = "gpu"   not allowed here   → .*auto, cpu, cuda',
    "optim.kind=adma": r'optim\.kind = "adma"   no such optimizer   → "adam"',
    "net.kind=5": r"net\.kind = 5   no such net   → cnn, mlp",
}


@pytest.mark.parametrize("pair", FAULTS)
def test_a_fault_names_the_key_the_value_and_the_way_out(pair, refused):
    told = refused("train", "digits", "--set", pair)
    assert told.startswith(HEAD + "\n  ")
    assert re.search(FAULTS[pair], told, re.M), told


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_is_told_and_never_accepted(alias):
    """At the top, and in the table that it would stand in."""
    raw = find("recipe:digits", None)[1]
    table, _dot, name = ALIASES[alias].partition(".")
    for key in (alias, f"{table}.{alias}"):
        if key in ("task.loss", "data.augment") or key.rpartition(".")[2] == name:  # the alias is the key's own name
            continue
        with pytest.raises(RecipeError) as caught:
            parse(change(raw, {key: "x"}))
        assert any(f.key == key and f.do.partition(" ")[0] == ALIASES[alias] for f in caught.value.faults), caught.value


def test_every_alias_leads_to_a_key_that_exists():
    known = {k for t, (kinds, *_rest) in TABLES.items() for c in kinds.values() for k in keys_of(c, t)}
    known |= {k for t, c in SINGLE.items() for k in keys_of(c, t)}
    assert not set(ALIASES.values()) - known


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3", "a b=3", ""])
def test_set_without_a_key_or_an_equals_sign(text, refused):
    told = refused("train", "digits", "--set", text)
    assert "--set needs key=value" in told and "for example --set optim.lr=0.01" in told and text in told


def test_set_of_brackets_without_end(refused):
    assert re.search(r"net\.stages = .*must be a list", refused("train", "digits", "--set", "net.stages=" + "[" * 5000))


@pytest.mark.parametrize("words", [sets("train.epochs=3", "train.steps=4"), ["--epochs", "3", *sets("train.steps=4")]])
def test_epochs_and_steps_together(words, refused):
    told = refused("train", "digits", *words)
    assert "epochs = 3 and steps = 4   set train.epochs or train.steps, exactly one" in told


def test_epochs_and_steps_together_in_a_file(refused):
    Path("my.toml").write_text('format = 1\n[data]\nsource = "spirals"\n[net]\nkind = "mlp"\n[train]\nepochs = 3\nsteps = 9\n')
    assert "epochs = 3 and steps = 9" in refused("train", "my.toml")


@pytest.mark.parametrize("key", ["train.epochs", "train.steps"])
def test_one_of_them_unsets_the_other(key):
    for name in ("digits", "spirals"):
        train = parse(change(find(f"recipe:{name}", None)[1], {key: 7})).train
        assert {"train.epochs": train.epochs, "train.steps": train.steps} == {"train.epochs": None, "train.steps": None, key: 7}


def test_the_order_of_set_does_not_matter():
    """net.kind takes the other net's keys away: those of the recipe, never one that was typed."""
    raw = find("recipe:digits", None)[1]
    a, b = {"net.kind": "mlp", "net.widths": [8], "net.dropout": 0.3}, {"net.dropout": 0.3, "net.widths": [8], "net.kind": "mlp"}
    assert parse(change(raw, a)) == parse(change(raw, b))
    assert parse(change(raw, b)).net.widths == (8,)


# --- what only the data can tell ------------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    ("spirals", sets("net.kind=cnn"), r"does not fit the task classify on data of the kind columns.*mlp"),
    ("digits", sets("data.pixels=6", "net.stages=[[4],[4],[4]]"), r"stage 3 of net\.stages leaves nothing of a picture with 6 pixels"),
    ("digits", sets("task.kind=regress"), r'task\.kind = "regress"   the labels of this data are classes   → "classify"'),
    ("curve", sets("task.kind=classify"), r'task\.kind = "classify"   the labels of this data are numbers   → "regress"'),
    ("spirals", sets("task.kind=own", "task.name=x"), r'task\.kind = "own"   is for cloche\.fit in Python   → classify, regress'),
    ("spirals", sets("net.widths=[1000000000000]"), r"allocate 8000000000000 bytes.*→ make the net smaller"),
    ("spirals", sets("net.norm=batch", "train.batch=1"), r"train\.batch = 1   batch normalisation needs at least two rows"),
]


@pytest.mark.parametrize("name, words, text", IMPOSSIBLE, ids=lambda v: v if isinstance(v, str) and v.isalpha() else "")
def test_what_is_impossible_for_this_data(name, words, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", name, *words]) == WRONG_INPUT
    told = capsys.readouterr().err
    assert HEAD in told and re.search(text, told) and "Traceback" not in told
    assert not (tmp_path / "runs" / name / "facts.json").exists()


def test_the_task_that_fits_is_tried(refused):
    assert refused("train", "curve", *sets("task.kind=classify")).splitlines()[-1] == "Try:  cloche train curve --set task.kind=regress"


# --- names and files --------------------------------------------------------------------------------------------------------------


def test_an_unknown_word_and_the_nearest_name(refused):
    told = refused("train", "digts")
    assert 'there is no recipe "digts"' in told and 'the nearest is "digits"' in told and ", ".join(shipped()) in told


def test_an_unknown_word_near_a_folder_here(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    assert 'the nearest is "photos"' in refused("train", "photoz")


@pytest.mark.parametrize("word", ["xyzzy", ""])
def test_an_unknown_word_near_nothing(word, refused):
    told = refused("train", word)
    assert f'there is no recipe "{word}"' in told and "or give a .toml file or a path to your data" in told


def test_a_word_that_is_a_recipe_and_a_folder(refused, tmp_path):
    (tmp_path / "digits").mkdir()
    told = refused("train", "digits")
    assert '"digits" is a recipe, and a folder here has that name too' in told
    assert "write recipe:digits for the recipe, ./digits for the folder" in told
    assert find("recipe:digits", None)[0] == "digits"
    assert "digits has no class folders" in refused("train", "./digits")


GOOD = 'format = 1\n[data]\nsource = "spirals"\n[net]\nkind = "mlp"\n[train]\nepochs = 3\n'
FILES = {
    "no TOML": (b"hello", r"my\.toml is not a recipe: .*line 1|my\.toml is not a recipe: .*end of document", "a recipe is a TOML file"),
    "a key twice": (GOOD.encode() + b"epochs = 4\n", r"my\.toml is not a recipe: .*", "a recipe is a TOML file"),
    "not UTF-8": (GOOD.encode() + b"# \xff\n", rf"my\.toml is not UTF-8\n  byte {len(GOOD) + 2}", "save it as UTF-8"),
    "nested": (b"a = " + b"[" * 5000, r"my\.toml is not a recipe: maximum recursion depth", "a recipe is a TOML file"),
    "empty": (b"", r"the recipe my is of another format\n  format = 1 expected, None found", "write format = 1 into its first line"),
    "newer": (GOOD.replace("= 1", "= 2", 1).encode(), r"another format\n  format = 1 expected, 2 found", "Update cloche."),
    "no tables": (b"format = 1\n", rf"net\.kind +is missing +→ {', '.join(NETS)}: cloche list nets", "train.epochs"),
    "no source": (
        GOOD.replace('source = "spirals"', "").encode(),
        r"data\.source +is missing +→ set it: --set data\.source=…",
        "data.source",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_file_that_is_none(name, refused):
    content, text, way = FILES[name]
    Path("my.toml").write_bytes(content)
    told = refused("train", "my.toml")
    assert re.search(text, told) and way in told, told


def test_a_recipe_file_that_is_missing_or_a_folder(refused):
    told = refused("train", "my.toml")
    assert "there is no file my.toml" in told and f"the shipped recipes are {', '.join(shipped())}" in told
    Path("my.toml").mkdir()
    assert re.search(r"my\.toml cannot be read\n  .*[Dd]irectory", refused("train", "my.toml"))


# --- a right one ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_itself_through_toml(name, monkeypatch):
    monkeypatch.setattr("cloche.recipe.kind_of", kind_of)  # two of them name folders that a person has to have
    recipe = parse(find(f"recipe:{name}", None)[1])
    assert parse(tomllib.loads(recipe.toml())) == recipe


def kind_of(source: str) -> str:
    return BUILTIN[source][0] if source in BUILTIN else "pictures"


def floats(low: float, high: float, **more: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **more)


SHARE = floats(0, 1, exclude_max=True)
VALUES = st.fixed_dictionaries(
    {
        "data.source": st.just("digits"),
        "data.pixels": st.integers(1, 4096),
        "data.channels": st.sampled_from([1, 3]),
        "data.validation": SHARE,
        "data.normalize": st.booleans(),
        "data.augment": st.fixed_dictionaries({"rotate": floats(0, 180), "brightness": SHARE, "mirror": st.booleans()}),
        "net": st.one_of(
            st.fixed_dictionaries({"kind": st.just("mlp"), "widths": st.lists(st.integers(1, 10**6), max_size=4), "dropout": SHARE}),
            st.fixed_dictionaries(
                {
                    "kind": st.just("cnn"),
                    "stages": st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=3), min_size=1, max_size=3),
                    "padding": st.one_of(st.just("same"), st.integers(0, 99)),
                    "norm": st.sampled_from(["none", "batch"]),
                }
            ),
        ),
        "optim": st.fixed_dictionaries(
            {"kind": st.sampled_from(["adam", "sgd"]), "lr": floats(0, 1e300, exclude_min=True), "clip": floats(0, 9)}
        ),
        "train.seed": st.integers(0, 2**31 - 1),
        "train.epochs": st.integers(1, 2**63 - 1),
        "train.batch": st.integers(1, 2**63 - 1),
    }
)


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_any_values_stay_themselves_through_toml(values):
    raw = change({"format": 1, "data": {}, "net": {}, "task": {}, "optim": {}, "train": {}}, values)
    recipe = parse(raw)
    again = parse(tomllib.loads(recipe.toml()))
    assert again == recipe
    assert math.copysign(1, again.optim.lr) == 1 and again.optim.lr == values["optim"]["lr"]
    assert again.toml() == recipe.toml()


@given(st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_text_as_a_value_is_a_value_or_a_fault(text):
    """Never another exception, whatever stands behind the equals sign."""
    key, value = parse_set("optim.lr=" + text)
    try:
        lr = parse(change(find("recipe:digits", None)[1], {key: value})).optim.lr
        assert math.isfinite(lr) and lr > 0
    except RecipeError as fault:
        assert [f.key.split(" = ")[0].split(".")[:2] for f in fault.faults] == [["optim", "lr"]]


# --- the size of a net ------------------------------------------------------------------------------------------------------------


def resnet(net, **train):
    return {"format": 1, "data": {"source": "digits"}, "net": {"kind": "resnet", **net}, "train": {"epochs": 1, **train}}


@pytest.mark.parametrize(
    "net, train, wanted",
    [
        ({}, {}, (32, (2, 2, 2), 64)),
        ({"size": "xs"}, {}, (16, (1, 1, 1), 64)),
        ({"size": "m"}, {}, (64, (2, 2, 2), 128)),
        ({"size": "m", "width": 8}, {}, (8, (2, 2, 2), 128)),
        ({"size": "m", "blocks": [3]}, {"batch": 32}, (64, (3,), 32)),
    ],
)
def test_a_key_as_written_goes_before_the_size_and_the_size_before_the_default(net, train, wanted):
    recipe = parse(resnet(net, **train))
    assert (recipe.net.width, recipe.net.blocks, recipe.train.batch) == wanted
    assert parse(tomllib.loads(recipe.toml())) == recipe


def test_a_size_is_written_out_and_not_asked_again(monkeypatch):
    written = tomllib.loads(parse(resnet({"size": "s"})).toml())
    monkeypatch.setattr(ResnetConfig, "sizes", {"s": {"net.width": 99, "train.batch": 7}})
    assert parse(written).net.width == 32 and parse(written).train.batch == 64


def test_another_size_takes_the_place_of_what_the_first_had_set_and_of_nothing_else():
    written = tomllib.loads(parse(resnet({"size": "s", "blocks": [3]})).toml())
    for sets in ({"net.size": "m"}, {"net.width": 5, "net.size": "m"}):
        recipe = parse(change(written, sets))
        assert (recipe.net.width, recipe.net.blocks, recipe.train.batch) == (sets.get("net.width", 64), (3,), 128)


@pytest.mark.parametrize("size", ["xxl", 3, ["s"]])
def test_an_unknown_size_is_one_fault(size):
    with pytest.raises(RecipeError, match=r"net\.size = .*not one of xs, s, m, l") as caught:
        parse(resnet({"size": size}))
    assert len(caught.value.faults) == 1


# --- the schema -------------------------------------------------------------------------------------------------------------------


def conforms(value, rule, defs=None) -> bool:
    """Enough of JSON Schema for ours: types, bounds, choices, tables and lists."""
    defs = {**(defs or {}), **rule.get("$defs", {})}
    if "$ref" in rule:
        return conforms(value, defs[rule["$ref"].rsplit("/", 1)[1]], defs)
    for way, enough in (("anyOf", any), ("oneOf", lambda found: sum(found) == 1)):
        if way in rule and not enough([conforms(value, r, defs) for r in rule[way]]):
            return False
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    if "type" in rule and (not isinstance(value, types[rule["type"]]) or isinstance(value, bool) != (rule["type"] == "boolean")):
        return False
    if "const" in rule and value != rule["const"] or "enum" in rule and value not in rule["enum"]:
        return False
    if isinstance(value, dict):
        known = rule.get("properties", {})
        if not rule.get("additionalProperties", True) and value.keys() - known.keys() or set(rule.get("required", ())) - value.keys():
            return False
        return all(conforms(v, known[k], defs) for k, v in value.items() if k in known)
    if isinstance(value, list):
        return len(value) >= rule.get("minItems", 0) and all(conforms(v, rule.get("items", {}), defs) for v in value)
    if isinstance(value, int | float):
        low = value >= rule.get("minimum", -math.inf) and value > rule.get("exclusiveMinimum", -math.inf)
        return low and value <= rule.get("maximum", math.inf) and value < rule.get("exclusiveMaximum", math.inf)
    return True


def valid(raw: dict) -> bool:
    if find_spec("jsonschema"):
        import jsonschema

        return jsonschema.Draft202012Validator(schema()).is_valid(raw)
    return conforms(raw, schema())


def with_kinds(raw: dict) -> dict:
    """A source that says what it is need not say it twice; the schema of a table can only go by `kind`."""
    return {**raw, "data": {"kind": kind_of(raw["data"]["source"]), **raw["data"]}}


@pytest.mark.parametrize("name", shipped())
def test_the_schema_takes_every_shipped_recipe(name):
    assert valid(with_kinds(find(f"recipe:{name}", None)[1]))


REFUSED = [("net.kind", "cn"), ("train.batch", 0), ("optim.lr", "fast"), ("net.widths", 5), ("foo", 1), ("train.foo", 1)]


@pytest.mark.parametrize("key, value", REFUSED)
def test_the_schema_refuses_what_cloche_refuses(key, value):
    raw = change(find("recipe:spirals", None)[1], {key: value})
    assert not valid(with_kinds(raw))
    with pytest.raises(RecipeError, match=re.escape(key)):
        parse(raw)


def test_the_schema_by_command_is_one_json_object(capsys):
    assert cli.run(["list", "schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == schema() == json.loads(json.dumps(schema()))
