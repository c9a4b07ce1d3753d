"""cloche in Python, as a person writes it: train, load, evaluate, and fit with one's own module and arrays."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
import torch
from torch import nn

import cloche
from cloche import cli
from cloche.errors import FAILED, WRONG_INPUT, UserError
from cloche.use import report
from cloche.use.train import Options

QUICK = {"train.epochs": 25, "train.batch": 16, "optim.lr": 0.01, "train.device": "cpu"}
X, Y = load_iris(return_X_y=True)
X = X.astype(np.float32)


pytestmark = pytest.mark.usefixtures("quiet_machine")


def perceptron(outputs: int = 3, inputs: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """A run that `cloche.fit` left."""
    out = tmp_path_factory.mktemp("iris") / "run"
    return cloche.fit(perceptron(), X, Y, out=str(out), sets=QUICK)


@pytest.fixture(scope="module")
def spirals(tmp_path_factory):
    out = tmp_path_factory.mktemp("spirals") / "run"
    return cloche.train(
        "spirals", sets={"data.rows": 200, "train.epochs": 10, "train.device": "cpu"}, options=Options(out=str(out), quiet=True)
    )


# --- train, load, evaluate ------------------------------------------------------------------------------------------------------


def test_the_public_names():
    assert set(cloche.__all__) == {"evaluate", "explain", "fit", "load", "train"}
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        cloche.trian  # noqa: B018
    first = list(inspect.signature(cloche.fit).parameters)[:3]
    assert first == ["module", "x", "y"]


def test_train_returns_a_model_and_leaves_a_run(spirals):
    model = spirals
    assert {
        "recipe.toml",
        "facts.json",
        "prepare.json",
        "model.safetensors",
        "results.json",
        "events.jsonl",
        "README.md",
        "manifest.json",
    } <= {p.name for p in model.path.iterdir()}
    assert model.results["part"] == "test" and model.results["n"] == model.facts["parts"]["test"] == 40
    low, high = model.results["interval"]
    assert 0 <= low < model.results["metrics"]["accuracy"] < high <= 1
    assert model.results["baseline"]["value"] == pytest.approx(0.5, abs=0.05)
    assert not model.net.training and not any(p.requires_grad for p in model.net.parameters())


def test_load_gives_the_same_model(spirals):
    model = cloche.load(spirals.path)
    assert model.results == spirals.results
    assert all(torch.equal(a, b) for a, b in zip(model.net.state_dict().values(), spirals.net.state_dict().values(), strict=True))
    rows = [[0.5, -0.2], "0.1 0.3", "0.1,0.3"]
    assert model.predict(rows) == spirals.predict(rows)
    assert model.predict(rows)[1] == model.predict(rows)[2]
    assert cloche.evaluate(spirals.path) == spirals.results
    assert cloche.evaluate(str(spirals.path))["metrics"] == spirals.results["metrics"]


def test_evaluate_on_its_own_data_judges_only_the_test_part(spirals):
    found = cloche.evaluate(spirals.path, "spirals")
    assert found["part"] == "test" and found["n"] == 40
    assert found["metrics"] == pytest.approx(spirals.results["metrics"])
    assert found["metrics"]["accuracy"] > 0.5


def test_train_again_only_loads(spirals):
    before = (spirals.path / "model.safetensors").stat().st_mtime_ns
    model = cloche.train(
        "spirals", sets={"data.rows": 200, "train.epochs": 10, "train.device": "cpu"}, options=Options(out=str(spirals.path), quiet=True)
    )
    assert model.results == spirals.results and (spirals.path / "model.safetensors").stat().st_mtime_ns == before


def test_the_digits_by_path_of_a_recipe_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(
        'format = 1\n[data]\nsource = "digits"\npixels = 8\nchannels = 1\n[net]\nkind = "mlp"\nwidths = [8]\n[train]\nsteps = 5\n'
    )
    model = cloche.train(
        "my.toml", sets={"train.precision": "fp32", "train.layout": "plain", "train.matmul": "default"}, options=Options(quiet=True)
    )
    assert model.path == Path("runs/my") and model.results["steps"] == 5
    picture = np.zeros((8, 8), np.uint8)
    (answer,) = model.predict([picture])
    assert answer["label"] in model.facts["labels"] and sum(answer["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "run, text",
    [("nowhere", "there is no run folder nowhere"), ("spirals", "there is no run folder spirals")],
)
def test_load_of_what_is_no_run(run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text) as caught:
        cloche.load(run)
    assert caught.value.code == WRONG_INPUT
    assert run == "nowhere" or "cloche train spirals" in caught.value.do


def test_load_of_an_unfinished_run(tmp_path):
    (tmp_path / "facts.json").write_text("{}")
    with pytest.raises(UserError, match=f"the run {tmp_path} is not finished"):
        cloche.load(tmp_path)


# --- fit ------------------------------------------------------------------------------------------------------------------------


def test_fit_learns_iris_and_leaves_a_run(iris):
    assert iris.results["metrics"]["accuracy"] > 0.9
    assert iris.facts["parts"] == {"train": 105, "validation": 15, "test": 30} and iris.results["n"] == 30
    assert iris.recipe.net.kind == "module" and iris.recipe.net.name == "Sequential" and iris.recipe.task.kind == "classify"
    assert {"recipe.toml", "model.safetensors", "results.json", "manifest.json"} <= {p.name for p in iris.path.iterdir()}
    for file in iris.path.rglob("*"):  # weights, words and numbers; no code
        assert (
            not file.is_file()
            or file.suffix in (".toml", ".json", ".jsonl", ".safetensors", ".md", ".html", ".png", ".svg", "")
            and file.suffix != ".py"
        )


def test_predict_with_the_module_passed_again_is_the_module(iris):
    module = perceptron()
    model = cloche.load(iris.path, module=module)
    answers = model.predict(list(X))
    with torch.no_grad():
        wanted = torch.softmax(iris.net(torch.from_numpy(X)), 1).numpy()
    found = np.array([[a["probabilities"][str(k)] for k in range(3)] for a in answers])
    assert np.allclose(found, wanted, atol=1e-6)
    assert [a["label"] for a in answers] == [str(k) for k in wanted.argmax(1)]
    assert torch.equal(module(torch.from_numpy(X)), iris.net(torch.from_numpy(X)))
    assert model.evaluate() == iris.results


def test_the_figure_is_that_of_the_module_on_the_test_rows(iris):
    """Recount it with nothing of cloche but which rows the test part has."""
    from cloche.data.read.examples import row_digests
    from cloche.data.split import split

    rows = split(row_digests(X), Y, np.zeros(150, np.uint8), 0.1, 0.2, 0)["test"]
    right = (iris.net(torch.from_numpy(X[rows])).argmax(1).numpy() == Y[rows]).mean()
    assert iris.results["metrics"]["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "5.1 3.5 1.4 0.2"], ["explain"]], ids=lambda c: c[0])
def test_a_command_says_how_to_do_it_in_python(iris, command, capsys):
    verb, *more = command
    assert cli.run([verb, str(iris.path), *more]) == WRONG_INPUT
    said = capsys.readouterr().err
    assert "your own module Sequential, whose code is not in the folder" in said
    assert f"cloche.load('{iris.path}', module=YourModule())" in said


def test_report_works_by_command(iris, capsys):
    if not hasattr(report, "report") or not (iris.path / "report/index.html").exists():
        pytest.skip("not run: the report is not there yet")
    (iris.path / "report/index.html").unlink()
    assert cli.run(["report", str(iris.path), "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert page == iris.path / "report/index.html" and "Sequential" in page.read_text()


def test_the_same_call_again_only_loads(iris):
    before = (iris.path / "model.safetensors").stat().st_mtime_ns
    model = cloche.fit(perceptron(), X, Y, out=str(iris.path), sets=QUICK)
    assert model.results == iris.results and (iris.path / "model.safetensors").stat().st_mtime_ns == before


def test_other_arrays_or_keys_in_the_same_folder_are_refused(iris, tmp_path):
    with pytest.raises(UserError, match="was begun with another recipe, data or machine") as caught:
        cloche.fit(perceptron(), X + 1, Y, out=str(iris.path), sets={**QUICK, "optim.lr": 0.5})
    assert "facts.fingerprint" in caught.value.found and "optim.lr   there 0.01   now 0.5" in caught.value.found


def test_again_trains_anew(tmp_path):
    sets = {**QUICK, "train.epochs": 2}
    first = cloche.fit(perceptron(), X, Y, out=str(tmp_path / "run"), sets=sets)
    second = cloche.fit(perceptron(), X, Y, out=str(tmp_path / "run"), sets={**sets, "train.seed": 5}, again=True)
    assert (first.results["seed"], second.results["seed"]) == (0, 5)


def test_a_module_that_was_fitted_can_be_fitted_again(tmp_path):
    """A person's own module stays trainable: the next call goes on from the weights that the last one left."""
    net = perceptron()
    for k in range(2):
        before = [p.detach().clone() for p in net.parameters()]
        cloche.fit(net, X, Y, out=str(tmp_path / str(k)), sets={**QUICK, "train.epochs": 1})
        assert all(p.requires_grad for p in net.parameters())
        assert not any(map(torch.equal, before, net.parameters()))


def test_another_module_for_this_run(iris):
    with pytest.raises(UserError, match="do not fit this net") as caught:
        cloche.load(iris.path, module=nn.Linear(4, 3))
    assert caught.value.code == FAILED and "module" in caught.value.do


def test_many_labels_at_once_are_a_yes_or_no_each(tmp_path):
    labels = np.stack([Y > 0, Y > 1, X[:, 0] > 5.8], 1).astype(np.int64)
    model = cloche.fit(perceptron(), X, labels, out=str(tmp_path / "run"), sets={**QUICK, "train.epochs": 40})
    assert model.recipe.task.loss == "bce" and model.facts["multi"]
    assert model.results["metrics"]["accuracy"] > model.results["baseline"]["value"]
    answers = model.predict(list(X[[0, 100]]))
    assert answers[0]["labels"] == [] or "1" not in answers[0]["labels"]
    assert {"0", "1"} <= set(answers[1]["labels"])
    wanted = torch.sigmoid(model.net(torch.from_numpy(X[[0]]))).flatten().tolist()
    assert [answers[0]["probabilities"][str(k)] for k in range(3)] == pytest.approx(wanted)


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_regressed(outputs, tmp_path):
    y = X[:, 3] if outputs == 1 else X[:, 2:]
    model = cloche.fit(perceptron(outputs, 2), X[:, :2], y, out=str(tmp_path / "run"), sets=QUICK)
    assert model.recipe.task.kind == "regress"
    assert 0.3 < model.results["metrics"]["r2"] <= 1
    (answer,) = model.predict([X[0, :2]])
    wanted = model.net(torch.from_numpy(X[:1, :2]))[0].tolist()
    assert (answer["values"] if outputs == 2 else [answer["value"]]) == pytest.approx(wanted)


def test_a_module_may_give_one_value_a_row_without_an_axis(tmp_path):
    """forward(x) → (B,): as the docstring of fit allows."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = perceptron(1, 2)

        def forward(self, x):
            return self.line(x)[:, 0]

    model = cloche.fit(Flat(), X[:, :2], X[:, 3], out=str(tmp_path / "flat"), sets=QUICK)
    other = cloche.fit(perceptron(1, 2), X[:, :2], X[:, 3], out=str(tmp_path / "line"), sets=QUICK)
    assert model.results["metrics"] == other.results["metrics"]


@pytest.mark.parametrize("outputs", [1, 2])
def test_two_classes_with_one_logit_or_two(outputs, tmp_path):
    """forward(x) → (B, K) logits: K = 2 is as good as the single one of BCE."""
    model = cloche.fit(perceptron(outputs), X[50:], Y[50:] - 1, out=str(tmp_path / "run"), sets=QUICK)
    assert model.results["metrics"]["accuracy"] > 0.8
    assert model.predict([X[50]])[0]["label"] in ("0", "1")


def test_yes_and_no_are_two_classes(tmp_path):
    model = cloche.fit(perceptron(1), X, Y > 0, out=str(tmp_path / "run"), sets=QUICK)
    assert len(model.facts["labels"]) == 2 and model.results["metrics"]["accuracy"] > 0.9


def test_lists_and_tensors_are_arrays_too(tmp_path):
    sets = {**QUICK, "train.epochs": 1}
    runs = [
        cloche.fit(perceptron(), x, y, out=str(tmp_path / str(n)), sets=sets)
        for n, (x, y) in enumerate([(X, Y), (torch.from_numpy(X), torch.from_numpy(Y)), (X.tolist(), Y.tolist())])
    ]
    assert runs[0].facts["fingerprint"] == runs[1].facts["fingerprint"] == runs[2].facts["fingerprint"]
    assert runs[0].results["metrics"] == runs[1].results["metrics"] == runs[2].results["metrics"]


def test_arrays_of_different_length(tmp_path):
    with pytest.raises(UserError, match="the arrays differ in length") as caught:
        cloche.fit(perceptron(), X, Y[:10], out=str(tmp_path / "run"))
    assert "150" in caught.value.found and "y: 10" in caught.value.found and caught.value.code == WRONG_INPUT
    assert not (tmp_path / "run").exists()


def test_a_label_that_is_not_finite(tmp_path):
    with pytest.raises(UserError, match="y has values that are not finite") as caught:
        cloche.fit(perceptron(1), X, np.where(np.arange(150) == 7, np.nan, 1.0), out=str(tmp_path / "run"))
    assert "row 7" in caught.value.found


@pytest.mark.parametrize(
    "y",
    [Y - 1, np.empty(0, np.int64), np.stack([Y, Y], 1), Y.astype(complex)],
    ids=["negative classes", "nothing", "labels that are not 0 or 1", "complex numbers"],
)
def test_labels_that_are_none(y, tmp_path):
    with pytest.raises(UserError) as caught:
        cloche.fit(perceptron(), X[: len(y)], y, out=str(tmp_path / "run"), sets=QUICK)
    assert caught.value.code == WRONG_INPUT and not (tmp_path / "run").exists()


def test_words_as_labels_are_the_names_of_the_classes(tmp_path):
    words = np.array(["setosa", "versicolor", "virginica"])[Y]
    model = cloche.fit(perceptron(), X, words, out=str(tmp_path / "run"), sets=QUICK)
    assert model.facts["labels"] == ["setosa", "versicolor", "virginica"]
    assert model.predict([X[0]])[0]["label"] in model.facts["labels"]


@pytest.mark.parametrize("module", [perceptron(2), perceptron(3, 5), nn.Flatten()], ids=["too few logits", "other columns", "no weights"])
def test_a_module_that_does_not_fit_the_arrays(module, tmp_path):
    with pytest.raises(UserError) as caught:
        cloche.fit(module, X, Y, out=str(tmp_path / "run"), sets=QUICK)
    assert caught.value.code == WRONG_INPUT


@pytest.mark.parametrize("sets", [{"train.epoch": 3}, {"optim.learning_rate": 0.1}, {"net.widths": [8]}, {"task.colour": 1}])
def test_an_unknown_key_is_never_ignored(sets, tmp_path):
    with pytest.raises(UserError, match="one fault|no such key|takes keys of"):
        cloche.fit(perceptron(), X, Y, out=str(tmp_path / "run"), sets={**QUICK, "train.epochs": 1, **sets})
