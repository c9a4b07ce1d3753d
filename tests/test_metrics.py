"""Figures against scikit-learn; sums add over any cutting; fillers change nothing; intervals against worked examples."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sk
import torch
from torch import nn
import torch.nn.functional as F

from cloche.config import Port, RecipeError
from cloche.data.chunk import Chunk, Part
from cloche.data.table import Table
from cloche.tasks import TASKS
from cloche.tasks.classify import Classify, ClassifyConfig
from cloche.tasks.metrics import mean, share
from cloche.tasks.regress import Regress

pytestmark = pytest.mark.usefixtures("one_thread")


ROW = Port("vector", (4,))
NETS = {"net": nn.Identity()}  # the rows' columns are the logits


def chunk(outputs, label, weight=None):
    outputs, label = torch.as_tensor(outputs, dtype=torch.float32), torch.as_tensor(label)
    n = len(outputs)
    weight = torch.ones(n) if weight is None else torch.as_tensor(weight, dtype=torch.float32)
    return Chunk(
        {"columns": outputs, "label": label}, torch.arange(n), torch.arange(n), weight, torch.tensor(0), False, bool((weight == 0).any())
    )


def measured(task, *chunks):
    total = {}
    for c in chunks:
        sums, carry, _rows = task.measure(NETS, c, None)
        assert carry is None
        total = {k: total[k] + v if k in total else v for k, v in sums.items()}
    return total


def cases():
    """name → task, outputs (n, …), labels: random, in float32 as a net gives them."""
    g, out = np.random.default_rng(0), {}
    n, k = 200, 6
    label = g.choice([0, 1, 2, 3, 5], n, p=[0.4, 0.3, 0.2, 0.05, 0.05])  # class 4 never occurs
    logits = g.normal(size=(n, k)) * 2
    logits[:, 3] = -9  # class 3 is never predicted, class 4 is
    logits[np.arange(n), label] += 1
    out["classes"] = Classify(tuple("abcdef"), "cross_entropy", False, ROW), logits, label
    short = logits[:, :5].copy()
    short[:, 4] = -9
    kept = label < 4
    out["a class neither there nor said"] = Classify(tuple("abcde"), "cross_entropy", False, ROW), short[kept], label[kept]
    yes = (g.random(n) < 0.3).astype(np.int64)
    out["yes or no"] = Classify(("no", "yes"), "bce", False, ROW), g.normal(size=(n, 1)) + yes[:, None], yes
    many = (g.random((n, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(np.float32)  # the last label never occurs
    said = g.normal(size=(n, 4)) + 2 * many
    said[:, 2] = -3  # and the third is never said
    out["labels"] = Classify(tuple("wxyz"), "bce", True, ROW), said, many
    silent = said.copy()
    silent[:, 3] = -3
    out["a label neither there nor said"] = Classify(tuple("wxyz"), "bce", True, ROW), silent, many
    y = g.normal(size=(n, 1)).astype(np.float32) * 3 + 7
    out["number"] = Regress(ROW, 1), y + g.normal(size=(n, 1)), y
    y = g.normal(size=(n, 3)).astype(np.float32) * [1, 2, 5]
    out["numbers"] = Regress(ROW, 3), y + g.normal(size=(n, 3)), y.astype(np.float32)
    return {name: (task, np.float32(outputs), wanted) for name, (task, outputs, wanted) in out.items()}


CASES = cases()
CLASSIFIERS = [name for name, (task, _o, _l) in CASES.items() if isinstance(task, Classify)]
REGRESSORS = [name for name in CASES if name not in CLASSIFIERS]


def answers_of(task, outputs):
    """What is said, by hand, from logits."""
    if task.multi:
        return (outputs > 0).astype(int)
    return (outputs[:, 0] > 0).astype(int) if task.bce else outputs.argmax(1)


# ---- scikit-learn


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification_figures_equal_scikit_learns(name):
    task, outputs, label = CASES[name]
    sums, said = measured(task, chunk(outputs, label)), answers_of(task, outputs)
    found, table = {k: f.value for k, f in task.figures(sums).items()}, task.table(sums)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(label, said), abs=1e-12)
    everyone = range(len(task.labels))
    each = sk.precision_recall_fscore_support(label, said, labels=everyone, zero_division=0)
    for key, wanted in zip(("precision", "recall", "f1", "support"), each, strict=True):
        np.testing.assert_allclose(table[key], wanted, rtol=1e-12, err_msg=key)
    report = sk.classification_report(label, said, zero_division=0, output_dict=True)
    for average in ("macro", "weighted"):
        for key, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert found[f"{average}_{key}"] == pytest.approx(report[f"{average} avg"][theirs], abs=1e-12), (average, key)
    if not task.multi:
        np.testing.assert_array_equal(sums["confusion"], sk.confusion_matrix(label, said, labels=everyone))
        np.testing.assert_array_equal(table["predicted"], np.bincount(said, minlength=len(task.labels)))
    assert all(f.n == len(label) for f in task.figures(sums).values())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_losses_and_probabilities_equal_scikit_learns_log_loss(name):
    task, outputs, label = CASES[name]
    exact = outputs.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-exact))
    if task.multi:
        wanted, p = np.mean([sk.log_loss(label[:, k], sigmoid[:, k], labels=[0, 1]) for k in range(label.shape[1])]), sigmoid
    elif task.bce:
        p = np.hstack([1 - sigmoid, sigmoid])
        wanted = sk.log_loss(label, sigmoid[:, 0])
    else:
        p = np.exp(exact) / np.exp(exact).sum(1, keepdims=True)
        wanted = sk.log_loss(label, p, labels=range(len(task.labels)))
    c = chunk(outputs, label)
    assert task.figures(measured(task, c))["loss"].value == pytest.approx(wanted, rel=1e-6)
    total, carry, told = task.loss(NETS, c, None)
    assert (total / task.count(c)).item() == pytest.approx(wanted, rel=1e-5)
    assert carry is None and total.dtype == torch.float32
    assert told["right"].item() == task.figures(measured(task, c))["accuracy"].value * len(label)
    rows = task.measure(NETS, c, None)[2]
    np.testing.assert_allclose(rows["probability"], p.max(1), rtol=1e-5)
    np.testing.assert_allclose(task.probabilities(torch.from_numpy(outputs)), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_answer_is_the_likeliest_label_with_every_probability_in_order(name):
    task, outputs, label = CASES[name]
    said, p = answers_of(task, outputs), task.probabilities(torch.from_numpy(outputs)).numpy()
    for row, answer in enumerate(task.answer(NETS, chunk(outputs, label))):
        ranked = np.argsort(-p[row], kind="stable")
        assert list(answer["probabilities"]) == [task.labels[k] for k in ranked]
        assert list(answer["probabilities"].values()) == pytest.approx(p[row][ranked].tolist())
        if task.multi:
            assert answer["labels"] == [task.labels[k] for k in ranked if said[row, k]]
        else:
            assert answer["label"] == task.labels[said[row]]


@pytest.mark.parametrize("name", REGRESSORS)
def test_regression_figures_equal_scikit_learns(name):
    task, outputs, y = CASES[name]
    c = chunk(outputs, y)
    found = task.figures(measured(task, c))
    assert found["mse"].value == found["loss"].value == pytest.approx(sk.mean_squared_error(y, outputs), rel=1e-6)
    assert found["mae"].value == pytest.approx(sk.mean_absolute_error(y, outputs), rel=1e-6)
    assert found["r2"].value == pytest.approx(sk.r2_score(y, outputs, multioutput="variance_weighted"), rel=1e-6)
    errors = np.square(outputs.astype(float) - y).mean(1)
    half = 1.959964 * errors.std(ddof=1) / math.sqrt(len(errors))
    assert (found["mse"].low, found["mse"].high) == pytest.approx((errors.mean() - half, errors.mean() + half), rel=1e-5)
    assert (task.loss(NETS, c, None)[0] / task.count(c)).item() == pytest.approx(found["mse"].value, rel=1e-5)
    answers = task.answer(NETS, c)
    assert answers[3] == ({"value": outputs[3, 0]} if outputs.shape[1] == 1 else {"values": outputs[3].tolist()})


def test_a_net_that_gives_a_flat_row_of_values_is_measured_like_a_column():
    """`cloche.fit` allows (B,) and (B, 1); a silent (B, B) of all pairs would be the loss of nobody's net."""
    task, outputs, y = CASES["number"]
    flat = {"net": nn.Flatten(0)}
    c = chunk(outputs, y)
    wanted = task.loss(NETS, c, None)[0]
    torch.testing.assert_close(task.loss(flat, c, None)[0], wanted)
    assert task.figures(task.measure(flat, c, None)[0]) == task.figures(measured(task, c))
    assert task.answer(flat, c) == task.answer(NETS, c)


# ---- sums


@pytest.mark.parametrize("size", [1, 7, 64, 199])
@pytest.mark.parametrize("name", CASES)
def test_sums_of_any_cutting_give_the_same_figures(name, size):
    task, outputs, label = CASES[name]
    """Float32 losses add up in float64 without rounding; squares of them, in regression, round in the last bit."""
    whole = task.figures(measured(task, chunk(outputs, label)))
    pieces = [chunk(outputs[a : a + size], label[a : a + size]) for a in range(0, len(outputs), size)]
    for order in (pieces, pieces[::-1]):
        found = task.figures(measured(task, *order))
        if name in CLASSIFIERS:
            assert found == whole
        assert {k: f.n for k, f in found.items()} == {k: f.n for k, f in whole.items()}
        assert {k: f.value for k, f in found.items()} == pytest.approx({k: f.value for k, f in whole.items()}, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_fillers_change_nothing(name):
    task, outputs, label = CASES[name]
    clean, rows = chunk(outputs, label), np.concatenate([np.arange(len(outputs)), [0] * 9])
    weight = (np.arange(len(rows)) < len(outputs)).astype(np.float32)
    filled = chunk(outputs[rows] + 50 * (1 - weight)[:, None].astype(np.float32), label[rows], weight)
    assert task.figures(measured(task, filled)) == task.figures(measured(task, clean))
    sums, others = measured(task, filled), measured(task, clean)
    assert sums.keys() == others.keys() and all(torch.equal(sums[k], others[k]) for k in sums)
    assert task.count(filled) == task.count(clean) == len(outputs)
    torch.testing.assert_close(task.loss(NETS, filled, None)[0], task.loss(NETS, clean, None)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_differentiated_as_a_sum_over_real_rows(name):
    task, outputs, label = CASES[name]
    x = torch.from_numpy(outputs).requires_grad_()
    weight = torch.arange(len(outputs)) % 3 != 0
    c = chunk(x, label, weight.float())
    task.loss(NETS, c, None)[0].backward()
    assert not x.grad[~weight].any() and x.grad[weight].abs().sum(1).min() > 0
    part = torch.from_numpy(outputs[weight.numpy()]).requires_grad_()
    task.loss(NETS, chunk(part, label[weight.numpy()]), None)[0].backward()
    torch.testing.assert_close(x.grad[weight], part.grad, rtol=1e-6, atol=1e-8)


# ---- intervals and baselines


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # z² / (n + z²)
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, n, low, high):
    figure = share(right, n)
    assert figure.value == right / n and figure.n == n
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_nothing_is_not_a_number():
    figure = share(0, 0)
    assert all(math.isnan(v) for v in (figure.value, figure.low, figure.high)) and figure.n == 0


def test_the_interval_of_a_mean_by_hand():
    """2, 4, 4, 6: mean 4, squared distances 8, standard error √(8 / 3) / 2."""
    figure, half = mean(16.0, 72.0, 4), 1.959964 * math.sqrt(8 / 3) / 2
    assert (figure.value, figure.low, figure.high, figure.n) == pytest.approx((4, 4 - half, 4 + half, 4))


def baseline(task, judged, train):
    """The one baseline of labels: its figure and name. What is known of the training part goes through JSON, as in a run folder."""
    labels = Table({"label": np.concatenate([judged, train])})
    parts = [Part(name, labels, ids, None) for name, ids in (("test", np.arange(len(judged))), ("train", np.arange(len(judged), labels.n)))]
    known = json.loads(json.dumps(task.known(parts[1])))
    ((answer, figure),) = task.baselines(known, parts[0], None).items()
    assert task.baselines(known, *parts) == {answer: figure}
    return figure, answer


def test_baselines_by_hand():
    task = Classify(("a", "b", "c"), "cross_entropy", False, ROW)
    assert baseline(task, np.array([1, 1, 2, 0, 1]), np.array([2, 1, 1, 0, 1, 2])) == (share(3, 5), 'always answering "b"')
    assert baseline(task, np.array([0, 0]), np.array([2, 2, 1]))[0].value == 0  # the training part decides, not the judged one
    many = Classify(("a", "b"), "bce", True, ROW)
    train = np.array([[1, 0], [1, 1], [1, 1], [0, 0]], np.float32)
    assert baseline(many, np.array([[1, 1], [1, 0], [1, 1]], np.float32), train) == (share(2, 3), 'always answering "a, b"')
    assert baseline(many, np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32)) == (share(2, 2), 'always answering "–"')
    figure, answer = baseline(Regress(ROW, 1), np.array([[1.0], [3.0]], np.float32), np.array([[0.0], [4.0]], np.float32))
    assert (figure.value, answer) == (1.0, 'always answering "2"')
    assert figure == mean(2.0, 2.0, 2)


def test_a_constant_target_has_no_r2():
    task = Regress(ROW, 1)
    found = task.figures(measured(task, chunk([[1.0], [2.0]], [[3.0], [3.0]])))
    assert "r2" not in found and found["mse"].value == 2.5


def test_per_class_figures_of_a_worked_example():
    """True a twice said a once b; true b three times said b twice c once; c never occurs."""
    task = Classify(("a", "b", "c"), "cross_entropy", False, ROW)
    table = task.table({"confusion": torch.tensor([[1.0, 1, 0], [0, 2, 1], [0, 0, 0]])})
    np.testing.assert_allclose(table["precision"], [1, 2 / 3, 0])
    np.testing.assert_allclose(table["recall"], [1 / 2, 2 / 3, 0])
    np.testing.assert_allclose(table["f1"], [2 / 3, 2 / 3, 0])


# ---- smoothing


def test_smoothing_is_torchs_and_only_in_the_loss_that_is_trained_on():
    g = torch.Generator().manual_seed(0)
    logits, label = torch.randn(6, 3, generator=g), torch.tensor([0, 2, 1, 1, 0, 2])
    plain, smooth = (Classify(("a", "b", "c"), "cross_entropy", False, ROW, s) for s in (0.0, 0.2))
    given = chunk(logits.tolist(), label.tolist())
    found = smooth.loss(NETS, given, None)[0]
    torch.testing.assert_close(found, F.cross_entropy(logits, label, label_smoothing=0.2, reduction="sum"))
    assert measured(smooth, given)["loss"] == measured(plain, given)["loss"] != found.double()


@pytest.mark.parametrize("labels, multi", [(["no", "yes"], False), (["a", "b", "c"], True)])
def test_smoothing_is_refused_with_bce(labels, multi):
    with pytest.raises(RecipeError, match=r"task\.smoothing = 0\.1   is for cross_entropy, the loss here is bce"):
        ClassifyConfig(smoothing=0.1).resolve({"labels": labels, "multi": multi})
    assert ClassifyConfig(smoothing=0.1).resolve({"labels": ["a", "b", "c"], "multi": False}).loss == "cross_entropy"


# ---- what is chosen


@pytest.mark.parametrize(
    "asked, outputs, multi, wanted, width",
    [
        ("auto", 2, False, "bce", 1),
        ("auto", 3, False, "cross_entropy", 3),
        ("auto", 4, True, "bce", 4),
        ("cross_entropy", 2, False, "cross_entropy", 2),
    ],
)
def test_auto_chooses_the_loss_and_the_width_of_the_net(asked, outputs, multi, wanted, width):
    facts = {"labels": list("abcd"[:outputs]), "multi": multi, "outputs": outputs}
    config = TASKS["classify"](loss=asked).resolve(facts)
    assert config.loss == wanted
    inputs, gives = config.build(SimpleNamespace(port=ROW), facts).ports["net"]
    assert (inputs, gives.shape) == (ROW, (width,))


@pytest.mark.parametrize("loss, labels, multi, fits", [("cross_entropy", "ab", True, "bce"), ("bce", "abc", False, "cross_entropy")])
def test_a_loss_that_is_not_for_these_labels_is_refused(loss, labels, multi, fits):
    """Several labels with cross-entropy, one class of three with bce."""
    with pytest.raises(RecipeError, match="bce is for two classes or several labels at once") as caught:
        TASKS["classify"](loss=loss).resolve({"labels": list(labels), "multi": multi})
    (fault,) = caught.value.faults
    assert (fault.key, fault.do) == (f'task.loss = "{loss}"', f'"{fits}"')


def test_a_task_for_other_labels_is_refused():
    with pytest.raises(RecipeError, match="the labels of this data are numbers"):
        TASKS["classify"]().resolve({"labels": [], "multi": False})
    with pytest.raises(RecipeError, match="the labels of this data are classes"):
        TASKS["regress"]().resolve({"labels": ["a", "b"]})


def test_two_classes_by_either_loss_agree():
    """log-loss of one logit z equals cross-entropy of (0, z)."""
    _task, outputs, label = CASES["yes or no"]
    one, two = Classify(("no", "yes"), "bce", False, ROW), Classify(("no", "yes"), "cross_entropy", False, ROW)
    a = one.figures(measured(one, chunk(outputs, label)))
    b = two.figures(measured(two, chunk(np.hstack([0 * outputs, outputs]), label)))
    assert a.keys() == b.keys()
    assert [f.value for f in a.values()] == pytest.approx([f.value for f in b.values()], rel=1e-6)


def test_a_chunk_without_an_input_names_what_it_has():
    c = chunk([[1.0]], [[1.0]])
    with pytest.raises(KeyError, match=r"found \['label'\]"):
        Regress(ROW, 1).loss(NETS, Chunk({"label": c.data["label"]}, c.ids, c.at, c.weight, c.draw, False), None)
