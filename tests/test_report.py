"""The page of a run: true to results.json, whole without a network, safe with any name, and readable on a phone."""

from html.parser import HTMLParser
import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import cloche
from cloche.errors import UserError
from cloche.files import read_json
from cloche.use import draw
from cloche.use.report import report, short, verdict, write_report
from cloche.use.train import Options, train
from cloche.words import number, percent

HOSTILE = "<img onerror=x>"
SETS = {"train.precision": "fp32", "train.layout": "plain", "train.matmul": "default", "train.device": "cpu"}


def small(tmp_path_factory, recipe, **sets):
    path = tmp_path_factory.mktemp(recipe) / recipe
    return train(recipe, sets={**SETS, **{k.replace("__", "."): v for k, v in sets.items()}}, options=Options(out=str(path), quiet=True))


@pytest.fixture(scope="module")
def spirals(tmp_path_factory):
    return small(tmp_path_factory, "spirals", train__epochs=4, data__rows=200, net__widths=[8])


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    return small(tmp_path_factory, "curve", train__epochs=4, data__rows=200, net__widths=[8])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return small(tmp_path_factory, "digits-mlp", train__epochs=1, net__widths=[8], data__channels=3)


def page_of(model) -> str:
    return (model.path / "report" / "index.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, as one line."""
    parts: list[str] = []
    reader = HTMLParser()
    reader.handle_data = parts.append  # type: ignore[method-assign]
    reader.feed(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(" ".join(parts).split())


def test_score_interval_and_baseline_are_those_of_the_results(spirals, curve):
    r = spirals.results
    text, (low, high) = text_of(page_of(spirals)), r["interval"]
    for said in (percent(r["metrics"]["accuracy"]), f"{percent(low)} – {percent(high)}", f"n = {r['n']}", f"seed {r['seed']}"):
        assert " ".join(said.split()) in text
    assert re.fullmatch('always answering "[^"]+"', r["baseline"]["answer"])
    assert " ".join(f"{r['baseline']['answer']}: {percent(r['baseline']['value'])}".split()) in text
    r = curve.results
    text = text_of(page_of(curve))
    assert number(r["metrics"]["mse"], 4) in text and number(r["baseline"]["value"], 4) in text
    assert f"{number(r['interval'][0], 4)} – {number(r['interval'][1], 4)}" in text


@pytest.mark.parametrize("name", ["spirals", "curve", "digits"])
def test_nothing_is_fetched_and_nothing_can_run(name, request):
    page = page_of(request.getfixturevalue(name))
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(\s*["']?([^"')]*)|@import""", page)
    assert sources and all((a or b).startswith(("data:image/png;base64,", "#")) for a, b in sources)
    assert "<script" not in page.lower() and not re.search(r"<[^>]*\son\w+\s*=", page)
    assert "default-src 'none'" in page
    assert not re.search(r"_\(\"|<!--|\$[a-z]", page), "a block of the template was left unfilled"


def test_sections_follow_what_the_run_has(spirals, curve, digits):
    heads = {name: re.findall(r"<h2>(.*?)</h2>", page_of(m)) for name, m in (("spirals", spirals), ("curve", curve), ("digits", digits))}
    for always in ("What it learned from", "How it learned", "The layers", "The recipe", "The machine", "The same again"):
        assert all(always in found for found in heads.values())
    assert "What it answers where" in heads["spirals"] and "The fitted curve" in heads["curve"]
    assert "Which class is read as which" in heads["digits"] and "Class by class" not in heads["curve"]
    assert page_of(digits).count("<img ") == len(digits.results["extras"]["wrong"]) > 0


def test_per_class_confusion_and_layers_are_those_of_the_results(digits):
    r, page = digits.results, page_of(digits)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><td>(?!</td>).*?</tr>", page)]
    for k, label in enumerate(digits.facts["labels"]):
        row = next(c for c in cells if c[0] == label and len(c) == 6)
        assert row[1:4] == [percent(r["per_class"][name][k]) for name in ("precision", "recall", "f1")]
        assert row[4:] == [number(r["per_class"]["support"][k]), number(r["extras"]["counts"][k])]
        counts = re.search(rf"<tr><th>{label}</th>(.*?)</tr>", page)[1]
        assert [int(n or 0) for n in re.findall(r"<td[^>]*>(.*?)</td>", counts)] == r["confusion"][k]
    assert sum(r["extras"]["counts"]) == digits.facts["parts"]["train"]
    assert sum(row["params"] for row in r["layers"]) == digits.facts["parameters"]


def test_the_most_wrong_are_wrong_and_shown_in_natural_colours(digits):
    import base64
    import io

    from PIL import Image

    data = digits.data()
    for w in digits.results["extras"]["wrong"]:
        assert w["true"] == data.store.label[w["ids"]] != w["predicted"]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(w["image"]))).convert("L"), float)
        stored = data.store.fields["image"][w["ids"], :, :, 0].numpy().astype(float)  # the net sees 8×8, as it is stored
        assert shown.shape == (8, 8) and np.abs(shown - stored).max() < 8


def test_the_surface_and_the_curve_are_what_the_net_answers(spirals, curve):
    import base64

    plane = spirals.results["extras"]["plane"]
    best = np.frombuffer(base64.b64decode(plane["best"]), np.uint8).reshape(120, 120)
    left, right, bottom, top = plane["box"]
    for row, column in ((0, 0), (60, 30), (119, 119)):
        x, y = left + (right - left) * column / 119, bottom + (top - bottom) * row / 119
        assert spirals.predict([[x, y]])[0]["label"] == spirals.facts["labels"][best[row, column]]
    share = np.mean(np.array(plane["label"]) == np.array(plane["answer"]))
    assert share == pytest.approx(spirals.results["metrics"]["accuracy"])
    plane = curve.results["extras"]["plane"]
    for i in (0, 77, 199):
        x = np.linspace(*plane["box"], 200)[i]
        assert curve.predict([[x]])[0]["value"] == pytest.approx(plane["lines"][0][i], abs=1e-3)


def test_extras_are_compact(spirals, curve, digits):
    assert all(len(json.dumps(m.results["extras"])) < 200_000 for m in (spirals, curve, digits))


def renamed(model, folder, label, name):
    """A copy of a run in which a class, its folder and the recipe's texts carry a hostile name."""
    shutil.copytree(model.path, folder / name)
    path = folder / name
    facts, results = read_json(path / "facts.json"), read_json(path / "results.json")
    facts["labels"][0] = facts["source"] = label
    facts["left_out"] = [[label, label]]
    results["baseline"]["answer"] = label
    for w in results["extras"]["wrong"]:
        w["name"] = label
    (path / "facts.json").write_text(json.dumps(facts))
    (path / "results.json").write_text(json.dumps(results))
    (path / "recipe.toml").write_text(f"# {label} </pre> $title\n" + (path / "recipe.toml").read_text())
    return write_report(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["spirals", "digits"])
def test_names_from_the_data_are_text_and_never_markup(name, request, tmp_path):
    page = renamed(request.getfixturevalue(name), tmp_path, HOSTILE, 'a"><b>&run')
    assert HOSTILE not in page and "&lt;img onerror=x&gt;" in page
    assert "<b>&run" not in page and "&lt;/pre&gt; $title" in page
    assert text_of(page).count(HOSTILE) >= 4


def test_the_same_run_gives_the_same_bytes(spirals):
    first = page_of(spirals)
    assert report(spirals.path) == spirals.path / "report" / "index.html"
    assert page_of(spirals) == first


def test_report_refuses_what_is_no_finished_run(tmp_path):
    with pytest.raises(UserError, match="no-such"):
        report(tmp_path / "no-such")


class Own:
    """A person's own task: absolute errors; it tells nothing of single rows but their loss."""

    face, choose, headline, ports = "maps", ("closeness", 1), "closeness", {}

    def count(self, chunk):
        return chunk.weight.sum()

    def errors(self, nets, chunk):
        return (nets["net"](chunk.data["columns"]) - chunk.data["label"]).abs().mean(1)

    def loss(self, nets, chunk, carry):
        return (self.errors(nets, chunk) * chunk.weight).sum(), None, {}

    def measure(self, nets, chunk, carry):
        errors = self.errors(nets, chunk)
        return {"loss": (errors * chunk.weight).sum(), "n": chunk.weight.sum()}, None, {"loss": errors}

    def answer(self, nets, chunk):
        return nets["net"](chunk.data["columns"]).tolist()

    def figures(self, sums):
        from cloche.tasks.metrics import Figure

        error, n = float(sums["loss"] / sums["n"]), int(sums["n"])
        return {"closeness": Figure(1 - error, n=n), "loss": Figure(error, n=n)}


@pytest.mark.parametrize("own", [False, True])
def test_runs_of_fit_have_a_page_too(own, tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    y = x[:, :1] * 2 if own else np.stack([x[:, 0] > 0, x[:, 1] > 0], 1).astype(np.int64)
    sets = {**SETS, "train.epochs": 3}
    model = cloche.fit(nn.Sequential(nn.Linear(2, 2 - own)), x, y, out=str(tmp_path / "fit"), task=Own() if own else None, sets=sets)
    text = text_of(page_of(model))
    assert "cloche.fit(Sequential(), x, y" in text and "cloche train" not in text
    assert (f"{short(model.results['metrics']['loss'])}" in text) and ("closeness on the test part" in text) is own
    assert ("Class by class" in text) is not own and "Which class is read as which" not in text


# --- the verdict ----------------------------------------------------------------------------------------------------------------


def epochs(train, validation=None, **more):
    rows = [{"step": 10 * (i + 1), "train_loss": t} for i, t in enumerate(train)]
    for i, v in enumerate(validation or []):
        rows[i]["validation_loss"] = v
    rows[-1] |= more
    return rows


FALLING = [1.0, 0.5, 0.2, 0.1, 0.05, 0.05, 0.03, 0.02, 0.011, 0.01]
RISING = [0.9, 0.5, 0.2, 0.1, 0.09, 0.081, 0.09, 0.1, 0.112, 0.112]
SLOW = [1, 0.9, 0.8, 0.7, 0.6]
LEVEL = [1.0, 0.4, 0.2, 0.12, 0.101, 0.1, 0.1, 0.1, 0.1, 0.1]


VERDICTS = [  # kind, evidence, epochs, results
    ("overfitting", r"epoch 6 \(0.0810\) and rose to 0.112 .* from 0.0500 to 0.0105; .* epoch 10", epochs(FALLING, RISING), {}),
    ("overfitting", r"epoch 10, where it was 0.112", epochs(FALLING, RISING), {"best_step": 100}),
    ("stopped early enough", r"epoch 6 \(0.0810\) .* epoch 6, where it was 0.0810", epochs(FALLING, RISING), {"best_step": 60}),
    ("overfitting", r"the validation loss is 0.400, the training loss only 0.100", epochs(LEVEL, [max(v, 0.4) for v in LEVEL]), {}),
    ("overfitting", r"test loss \(there is no .*\) is 0.500, .* only 0.100", epochs(LEVEL), {"part": "test", "metrics": {"loss": 0.5}}),
    ("underfitting", r"training loss still fell by 14.% .* validation loss by 10.%", epochs(SLOW, [1, 0.95, 0.9, 0.8, 0.72]), {}),
    ("underfitting", r"still fell by 14.% .*\(there is no validation part\)", epochs(SLOW), {}),
    (
        "underfitting",
        r"levelled off 2.% of the way",
        epochs([2.3] * 4, [2.3] * 4, train_right=0.12),
        {"headline": "accuracy", "baseline": {"value": 0.1}},
    ),
    ("underfitting", r"levelled off 10.% of the way", epochs([0.9] * 5, [0.9] * 5), {"headline": "mse", "baseline": {"value": 1.0}}),
    ("unstable", r"0.100 after epoch 3 and 2.00 at the end", epochs([1, 0.5, 0.1, 0.5, 2]), {}),
    ("unstable", r"not a finite number", epochs([1, 0.5, float("inf")]), {}),
    ("too short to judge", r"fewer than 3 epochs", epochs([1, 0.5]), {}),
    ("well fitted", r"epoch 7\) the training loss is 0.100, the validation loss 0.100", epochs(LEVEL, LEVEL), {"best_step": 70}),
    ("well fitted", r"levelled off at 0.100; there is nothing to compare", epochs(LEVEL), {"part": "train", "metrics": {"loss": 0.1}}),
    ("well fitted", r"training loss is 0.00000100", epochs([1, 0.01, 1e-6, 2e-6, 1e-6], [1, 0.01, 1e-6, 3e-6, 2e-6]), {}),
]


@pytest.mark.parametrize("kind, evidence, given, results", VERDICTS)
def test_verdict(kind, evidence, given, results):
    found = verdict(given, results)
    assert found[0] == kind and re.search(evidence, found[1]), found


def test_short_keeps_three_digits():
    assert [short(v) for v in (0.0, 0.0123456, 1.5, 123.4, -0.5, 123456.0)] == ["0", "0.0123", "1.50", "123", "-0.500", "123\u00a0456"]


def test_svg_text_is_escaped_and_dollars_are_no_formula():
    lines = {f"$x_1$ {HOSTILE}": ([1, 2, 3], [1.0, 2.0, 3.0])}
    found = draw.svg(draw.curves(lines, "epoch", "loss"))
    assert "$x_1$ &lt;img onerror=x&gt;" in found and found.startswith("<svg") and "var(--c0, #2a6fbb)" in found
    assert found == draw.svg(draw.curves(lines, "epoch", "loss")) and "<metadata" not in found
    assert draw.png(draw.curves(lines, "", "")).startswith(b"\x89PNG")


# --- in a browser ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", *(f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync"))]
    with api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=shutil.which("chromium"), args=quiet)
        yield found
        found.close()


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("name", ["spirals", "curve", "digits"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(name, scheme, request, browser):
    model = request.getfixturevalue(name)
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: said.append(m.text))
    page.goto((model.path / "report" / "index.html").resolve().as_uri())
    assert [u for u in asked if not u.startswith(("file:", "data:"))] == [] and said == []
    for width in (360, 1400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [svg.bounding_box() for svg in page.locator("figure svg").all()]
        assert len(boxes) >= 2 and all(b["width"] > 250 and b["height"] > 150 for b in boxes)
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    # the figures' text and lines stand out from the ground: they take the page's colours
    ink = "e => getComputedStyle(e).fill.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b, 0)"
    light = [page.evaluate(f"e => ({ink})(e)", e.element_handle()) for e in page.locator("figure svg text").all()[:5]]
    assert all(v > 400 for v in light) if scheme == "dark" else all(v < 450 for v in light)
    page.close()
