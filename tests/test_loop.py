"""The loop: the same sums however a step is cut, no hidden randomness, the best weights kept, and a loud end on a bad number."""

from collections import Counter
from dataclasses import dataclass, field, replace
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F

import cloche
from cloche import rng
from cloche.config import Port
from cloche.data.chunk import Part, Shuffled
from cloche.data.read.examples import Examples, row_digests
from cloche.data.store import Store
from cloche.errors import FAILED, WRONG_INPUT, UserError
from cloche.nets.parts import BatchNorm
from cloche.tasks.classify import Classify
from cloche.tasks.metrics import Figure
from cloche.training import loop as loops
from cloche.training.job import Job, Place, TrainConfig
from cloche.training.loop import loop, start, step
from cloche.training.objective import average
from cloche.training.optim import AdamConfig, SgdConfig
from cloche.training.precision import Precision
from cloche.training.run import Run
from cloche.use import train as use_train
from cloche.use.train import Options, train

ROW = Port("vector", (5,))
TINY = {"data.pixels": 8, "data.channels": 1, "net.widths": [16], "train.precision": "fp32", "train.layout": "plain", "train.batch": 64}


@pytest.fixture(autouse=True)
def one_thread():
    """Two cores that others work on too: a second thread only waits for the first."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


class AsIs:
    """No preparation; `noise` draws per row from the hashed stream, as augmentation does."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def device(self, chunk):
        if not self.noise or not chunk.train:
            return chunk
        x = chunk.data["columns"]
        return replace(chunk, data={**chunk.data, "columns": x + self.noise * rng.uniform(chunk.draw, rng.AUGMENT, chunk.at, x.shape[1])})


def points(n: int = 100, classes: int = 3, seed: int = 0) -> Store:
    """Three clouds in five dimensions: learnable, not trivially."""
    g = np.random.default_rng(seed)
    label = g.integers(0, classes, n)
    x = (g.standard_normal((n, 5)) + 1.5 * np.eye(classes, 5)[label]).astype(np.float32)
    names = [str(k) for k in range(classes)]
    return Store(
        Examples(
            "columns", {"columns": x}, label.astype(np.int64), names, row_digests(x), np.zeros(n, np.uint8), [f"row {i}" for i in range(n)]
        )
    )


def net(dropout: float = 0.0, norm: bool = False, bends: type[nn.Module] = nn.Tanh) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 16), *([BatchNorm(16)] if norm else []), bends(), nn.Dropout(dropout), nn.Linear(16, 3))


@dataclass
class Made:
    """A job on `points`: 80 rows to train on, 20 to validate on."""

    folder: Path
    store: Store = field(default_factory=points)
    net: nn.Module = field(default_factory=net)
    task: object = field(default_factory=lambda: Classify(("0", "1", "2"), "cross_entropy", False, ROW))
    optim: object = AdamConfig(lr=1e-2)
    validation: bool = True
    noise: float = 0.0
    fill: bool = False
    config: dict = field(default_factory=dict)

    def job(self) -> Job:
        config = TrainConfig(
            **{"steps": 20, "batch": 16, "precision": "fp32", "layout": "plain", "device": "cpu", "log_steps": 1, **self.config}
        )
        parts = {
            k: Part(k, self.store, ids, AsIs(self.noise), fill=self.fill)
            for k, ids in (("train", np.arange(80)), ("validation", np.arange(80, 100)))
        }
        order = Shuffled(80, config.batch, config.seed)
        held = parts["validation"] if self.validation else None
        return Job({"net": self.net}, ("net",), self.task, parts["train"], held, order, self.optim, config, Precision("fp32", "plain"))

    def run(self) -> list[dict]:
        """Train; returns the events."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.place, self.clock = loop(self.job(), Run(self.folder))
        return events(self.folder)


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in module.state_dict().values()])


def equal(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(weights(a), weights(b))


class Watched(Classify):
    """Classify that remembers which rows each step saw."""

    def __init__(self) -> None:
        super().__init__(("0", "1", "2"), "cross_entropy", False, ROW)
        self.ids: list[list[int]] = []

    def loss(self, nets, chunk, carry):
        self.ids.append(chunk.ids.tolist())
        return super().loss(nets, chunk, carry)


# --- one step, however it is cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [SgdConfig(lr=0.05), AdamConfig(lr=1e-3)], ids=["sgd", "adam"])
def test_accumulation_changes_nothing_but_rounding(optim, tmp_path):
    made = {c: Made(tmp_path / str(c), task=Watched(), optim=optim, config={"chunks": c, "batch": 24}) for c in (1, 2, 4)}
    told = {c: m.run() for c, m in made.items()}
    rows = {c: [i for ids in m.task.ids for i in ids] for c, m in made.items()}
    assert rows[1] == rows[2] == rows[4]
    assert Counter(map(len, made[1].task.ids)) == {24: 15, 8: 5}  # 80 rows: 24, 24, 24 and what is left
    assert Counter(map(len, made[4].task.ids)) == {6: 60 + 5, 2: 5}
    for c in (2, 4):
        a, b = weights(made[1].net), weights(made[c].net)
        assert ((a - b).norm() / a.norm()).item() <= 1e-6
        losses = [[e["loss"] for e in told[k] if e["kind"] == "step"] for k in (1, c)]
        assert np.allclose(*losses, rtol=1e-5)


def test_fillers_change_nothing_but_rounding(tmp_path):
    """A short last step is filled up to its shape where a device wants static ones; batch normalisation does not see it."""
    a, b = (
        Made(tmp_path / str(f), net=net(norm=True), fill=f, optim=SgdConfig(lr=0.05), config={"batch": 24, "test_batch": 16})
        for f in (False, True)
    )
    told = [m.run() for m in (a, b)]
    assert ((weights(a.net) - weights(b.net)).norm() / weights(a.net).norm()).item() <= 1e-6
    assert [e["n"] for e in told[0] if e["kind"] == "step"] == [e["n"] for e in told[1] if e["kind"] == "step"]
    figures = [[e["validation_loss"] for e in t if e["kind"] == "epoch"] for t in told]
    assert np.allclose(*figures, rtol=1e-5)


def test_steps_may_end_inside_an_epoch(tmp_path):
    made = Made(tmp_path, config={"steps": 7})
    told = made.run()
    assert made.place.step == 7
    assert [(e["epoch"], e["step"]) for e in told if e["kind"] == "epoch"] == [(0, 5), (1, 7)]


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path):
    a, b = (Made(tmp_path / k, net=net(0.3, True)) for k in "ab")
    c = Made(tmp_path / "c", net=net(0.3, True), config={"seed": 1})
    told = [m.run() for m in (a, b, c)]
    assert equal(a.net, b.net) and told[0] == told[1]
    assert not equal(a.net, c.net)


def test_a_steps_loss_is_its_sum_by_its_count(tmp_path):
    """Four uneven chunks (24 rows and a last step of 8): the logged loss is the plain mean over the step's rows."""
    made = Made(tmp_path, task=Watched(), config={"chunks": 4, "batch": 24, "steps": 4})
    job = made.job()
    state, place = start(job, Run(tmp_path))
    for n in range(4):
        ids, _first = job.order.ids(0, n)
        rows = made.store.rows(ids)
        with torch.no_grad():
            wanted = F.cross_entropy(made.net(rows["columns"]), rows["label"])
        chunks = job.train.step(job.order, 0, n, 4, 24, torch.tensor(0))
        place = Place(n, 0, n)
        state.seen = {}
        step(job, state, chunks, place)
        assert float(state.seen["n"]) == len(ids)
        assert float(state.seen["loss"]) / len(ids) == pytest.approx(wanted.item(), rel=1e-6)


def test_it_equals_the_plain_loop_that_everyone_writes(tmp_path):
    made, mine = Made(tmp_path, config={"steps": None, "epochs": 3, "select": "last"}), net()
    made.run()
    optimizer = torch.optim.Adam(mine.parameters(), lr=1e-2)
    order = Shuffled(80, 16, 0)
    for epoch in range(3):
        for index in range(5):
            rows = made.store.rows(order.ids(epoch, index)[0])
            loss = F.cross_entropy(mine(rows["columns"]), rows["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(weights(made.net), weights(mine), rtol=1e-6, atol=1e-7)


def test_one_step_of_sgd_by_hand(tmp_path):
    """w = 1, b = 0 on x = 2, y = 1: squared error 1, dL/dw = 2·(2−1)·2 = 4, dL/db = 2; at lr 0.1 w = 0.6, b = −0.2."""
    line = nn.Linear(1, 1)
    nn.init.ones_(line.weight), nn.init.zeros_(line.bias)
    y = np.ones((4, 1), np.float32)
    examples = Examples("columns", {"columns": 2 * y}, y, [], row_digests(y), np.zeros(4, np.uint8), list("abcd"))
    from cloche.tasks.regress import Regress

    part = Part("train", Store(examples), np.arange(4), AsIs())
    config = TrainConfig(steps=1, batch=4, chunks=2, log_steps=1)
    loop(
        Job(
            {"net": line},
            ("net",),
            Regress(Port("vector", (1,)), 1),
            part,
            None,
            Shuffled(4, 4, 0),
            SgdConfig(lr=0.1, momentum=0.0),
            config,
            Precision(),
        ),
        Run(tmp_path),
    )
    torch.testing.assert_close(torch.stack([line.weight.flatten(), line.bias]).detach(), torch.tensor([[0.6], [-0.2]]))
    (first, _epoch) = events(tmp_path)
    assert (first["loss"], first["n"], first["lr"]) == (1.0, 4.0, 0.1)
    assert first["norm"] == pytest.approx(math.hypot(4, 2))


# --- randomness has a place -----------------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_what_was_drawn_before(tmp_path):
    a = Made(tmp_path / "a", net=net(0.5), noise=0.5)
    torch.manual_seed(3)
    a.run()

    class Greedy(Classify):
        """Draws more than it needs, after its own dropout: the next chunk must not notice."""

        def loss(self, nets, chunk, carry):
            out = super().loss(nets, chunk, carry)
            torch.rand(17), np.random.rand(3)
            return out

    b = Made(tmp_path / "b", net=net(0.5), noise=0.5, task=Greedy(("0", "1", "2"), "cross_entropy", False, ROW))
    torch.manual_seed(99)
    torch.rand(1000)
    b.run()
    assert equal(a.net, b.net)


def test_augmentation_follows_the_row_not_the_chunk():
    whole, parts = (
        Part("train", points(), np.arange(80), AsIs(0.5)).step(Shuffled(80, 16, 0), 2, 1, c, 16, rng.draw(0, 2)) for c in (1, 4)
    )
    assert len(whole) == 1 and len(parts) == 4
    assert torch.equal(whole[0].data["columns"], torch.cat([c.data["columns"] for c in parts]))


def test_the_loop_puts_the_callers_generator_back(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Made(tmp_path, net=net(0.5)).run()
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_puts_the_callers_generators_back(tmp_path):
    """The whole of cloche.fit: trial, FLOP count, measure of the machine, loop, evaluation."""
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    store = points()
    cloche.fit(
        net(0.5), store.fields["columns"].numpy(), store.label, out=str(tmp_path / "run"), sets={"train.steps": 2, "train.device": "cpu"}
    )
    assert np.array_equal(np.random.get_state()[1], numpys)
    assert torch.equal(torch.get_rng_state(), before)


# --- the log --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, warmup", [("constant", 0.0), ("constant", 0.2), ("cosine", 0.0), ("onecycle", 0.0)])
def test_the_learning_rate_in_the_log(schedule, warmup, tmp_path):
    made = Made(tmp_path, optim=AdamConfig(lr=1e-2, schedule=schedule, warmup=warmup))
    rates = [e["lr"] for e in made.run() if e["kind"] == "step"]
    done = np.arange(20) / 20
    wanted = {
        ("constant", 0.0): np.ones(20),
        ("constant", 0.2): np.minimum(1, done / 0.2),
        ("cosine", 0.0): (1 + np.cos(np.pi * done)) / 2,
        ("onecycle", 0.0): np.where(
            done < 0.3, 0.04 + 0.96 * (1 - np.cos(np.pi * done / 0.3)) / 2, (1 + np.cos(np.pi * (done - 0.3) / 0.7)) / 2
        ),
    }
    assert np.allclose(rates, 1e-2 * wanted[schedule, warmup])


@pytest.mark.parametrize("log_steps", [1, 3, 100])
def test_the_log_goes_forward_and_misses_no_row(log_steps, tmp_path):
    made = Made(tmp_path, config={"log_steps": log_steps, "batch": 24, "steps": None, "epochs": 3})
    told = made.run()
    lines, epochs = ([e for e in told if e["kind"] == k] for k in ("step", "epoch"))
    steps = [e["step"] for e in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert sum(e["n"] for e in lines) == 3 * 80
    assert [(e["epoch"], e["step"]) for e in epochs] == [(0, 4), (1, 8), (2, 12)]
    assert {"train_loss", "train_right", "validation_loss", "validation_accuracy"} <= epochs[0].keys()
    if log_steps == 3:
        assert steps == [3, 4, 6, 8, 9, 12]  # every third, and the last of each epoch


# --- choosing -------------------------------------------------------------------------------------------------------------------


class Scripted(Classify):
    """Its validation accuracy follows a script; the weights at each look are kept. `then` is done at look number `at`."""

    def __init__(self, script: list[float], at: int = 0, then=lambda: None) -> None:
        super().__init__(("0", "1", "2"), "cross_entropy", False, ROW)
        self.script, self.seen, self.at, self.then = list(script), [], at, then

    def figures(self, sums):
        return {"accuracy": Figure(self.script[len(self.seen) - 1]), "loss": Figure(1.0)}

    def measure(self, nets, chunk, carry):
        if not nets["net"].training and chunk.at[0] == 0:
            self.seen.append(weights(nets["net"]).clone())
            if len(self.seen) == self.at:
                self.then()
        return super().measure(nets, chunk, carry)


SCRIPT = [0.5, 0.7, 0.6, 0.65, 0.9, 0.1]


def test_patience_stops_and_the_best_weights_come_back(tmp_path):
    task = Scripted(SCRIPT)
    made = Made(tmp_path, task=task, config={"steps": None, "epochs": 6, "patience": 2})
    told = made.run()
    assert made.place.step == 4 * 5 and made.place.epoch == 4  # two epochs without a better one, then it ends
    assert torch.equal(weights(made.net), task.seen[1])
    assert [e["best_step"] for e in told if e["kind"] == "epoch"] == [5, 10, 10, 10]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_patience_and_the_best_survive_a_stop(at, tmp_path):
    """Stopped right after a look at the validation part, gone on with a fresh net: the same count, the same best weights."""
    config = {"steps": None, "epochs": 6, "patience": 2}
    run = Run(tmp_path)
    first = Scripted(SCRIPT, at, lambda: setattr(run, "stop", "SIGTERM"))
    made = Made(tmp_path, task=first, config=config)
    with pytest.raises(UserError, match="everything done so far is saved"):
        loop(made.job(), run)
    made = Made(tmp_path, task=Scripted(SCRIPT[at:]), config=config)
    made.run()
    assert made.place.step == 20 and torch.equal(weights(made.net), first.seen[1])


def test_without_patience_it_goes_to_the_end(tmp_path):
    task = Scripted(SCRIPT)
    made = Made(tmp_path, task=task, config={"steps": None, "epochs": 6})
    made.run()
    assert made.place.step == 30 and len(task.seen) == 6
    assert torch.equal(weights(made.net), task.seen[4])  # 0.9


def test_select_last_keeps_the_last(tmp_path):
    task = Scripted(SCRIPT)
    made = Made(tmp_path, task=task, config={"steps": None, "epochs": 6, "select": "last"})
    made.run()
    assert torch.equal(weights(made.net), task.seen[5])


def test_a_figure_that_is_not_a_number_is_never_the_best(tmp_path):
    task = Scripted([0.5, math.nan, 0.4, math.inf])
    made = Made(tmp_path, task=task, config={"steps": None, "epochs": 4})
    made.run()
    assert torch.equal(weights(made.net), task.seen[0])


def test_without_validation_the_last_weights_stay(tmp_path):
    made, other = (
        Made(tmp_path / k, validation=k == "b", config={"steps": None, "epochs": 3, "select": s}) for k, s in (("a", "best"), ("b", "last"))
    )
    told = made.run()
    other.run()
    assert equal(made.net, other.net)
    assert not any(k.startswith("validation") for e in told for k in e)


def test_the_validation_part_changes_no_step(tmp_path):
    """test_batch only cuts the evaluation: the same weights, the same figures to rounding."""
    a, b = (Made(tmp_path / k, net=net(0.3, True), config={"test_batch": n, "select": "last"}) for k, n in (("a", 256), ("b", 7)))
    told = [m.run() for m in (a, b)]
    assert equal(a.net, b.net)
    figures = [[e["validation_loss"] for e in t if e["kind"] == "epoch"] for t in told]
    assert np.allclose(*figures, rtol=1e-6)


@pytest.fixture
def quick(monkeypatch):
    """How fast this machine multiplies is measured anew by every run; here it does not matter."""
    monkeypatch.setattr(use_train, "limit_of", lambda *given: 1e9)


def test_the_test_part_is_read_once_at_the_end(tmp_path, quick, monkeypatch):
    read: list[str] = []
    once, cut = Part.once, Part.step
    monkeypatch.setattr(Part, "once", lambda self, *given: (read.append(self.name), once(self, *given))[1])
    monkeypatch.setattr(Part, "step", lambda self, *given: (read.append("step of " + self.name), cut(self, *given))[1])
    model = train("digits-mlp", sets={**TINY, "train.epochs": 2}, options=Options(out=str(tmp_path / "run"), quiet=True))
    assert model.results["part"] == "test"
    assert read.count("test") == 1 and "step of test" not in read
    last = max(i for i, name in enumerate(read) if name == "step of train")
    assert read.index("test") > last
    assert read[:last].count("validation") == 1 and read.count("validation") >= 2


def test_poisoned_test_labels_change_no_bit_of_the_model(tmp_path, quick, monkeypatch):
    sets = {**TINY, "train.epochs": 3, "optim.lr": 0.01}
    plain = train("digits-mlp", sets=sets, options=Options(out=str(tmp_path / "a"), quiet=True))
    opened = use_train.open_data

    def poisoned(*given, **named):
        data = opened(*given, **named)
        rows = data.rows["test"]
        data.store.label = data.store.label.copy()
        data.store.label[rows] = (data.store.label[rows] + 1) % 10
        data.store.fields = {**data.store.fields, "label": torch.from_numpy(data.store.label)}
        return data

    monkeypatch.setattr(use_train, "open_data", poisoned)
    other = train("digits-mlp", sets=sets, options=Options(out=str(tmp_path / "b"), quiet=True))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/events.jsonl").read_bytes() == (tmp_path / "b/events.jsonl").read_bytes()
    assert plain.results["metrics"]["accuracy"] > 0.5 > other.results["metrics"]["accuracy"]
    assert plain.results["best_step"] == other.results["best_step"]


def test_validation_zero_through_the_whole_command(tmp_path, quick):
    model = train(
        "digits-mlp", sets={**TINY, "train.epochs": 2, "data.validation": 0.0}, options=Options(out=str(tmp_path / "run"), quiet=True)
    )
    assert model.facts["parts"]["validation"] == 0 and model.results["part"] == "test"
    assert model.results["best_step"] == model.results["steps"] == 2 * math.ceil(model.facts["parts"]["train"] / 64)


# --- the running average --------------------------------------------------------------------------------------------------------


def test_the_running_average_by_hand():
    kept = {"w": torch.tensor([1.0, 2.0]), "h": torch.tensor([4.0], dtype=torch.float64), "n": torch.tensor(3)}
    now = {"w": torch.tensor([2.0, -2.0]), "h": torch.tensor([0.0], dtype=torch.float64), "n": torch.tensor(4)}
    average(kept, now, 0.75, torch.tensor(1.0))
    assert kept["w"].tolist() == [1.25, 1.0] and kept["h"].tolist() == [3.0] and kept["n"] == 4
    average(kept, now, 0.0, torch.tensor(1.0))
    assert kept["w"].tolist() == [2.0, -2.0]


def test_the_running_average_stays_where_a_step_was_bad():
    kept, before = {"w": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 2.0])
    average(kept, {"w": torch.tensor([7.0, 8.0])}, 0.5, torch.tensor(0.0))
    assert torch.equal(kept["w"], before)


def test_the_average_is_judged_and_kept_and_steers_no_step(tmp_path):
    """Its memory grows with the steps done, (1 + t) / (10 + t), up to train.ema; the steps are those of a run without."""
    config = {"steps": None, "epochs": 3, "select": "last"}
    task, plain = Scripted([0.5] * 3), Made(tmp_path / "plain", validation=False, config=config)
    made = Made(tmp_path / "ema", task=task, config={**config, "ema": 0.4})
    with pytest.MonkeyPatch.context() as patch:
        live, act = [], loops.step

        def stepping(job, state, chunks, place):
            norm = act(job, state, chunks, place)
            live.append(weights(job.nets["net"]).clone())
            return norm

        patch.setattr(loops, "step", stepping)
        told = [[e for e in m.run() if e["kind"] == "step"] for m in (plain, made)]
    assert told[0] == told[1] and all(map(torch.equal, live[:15], live[15:]))
    kept, wanted = weights(net()), []
    for t, now in enumerate(live[15:]):
        memory = min(0.4, (1 + t) / (10 + t))
        kept = memory * kept + (1 - memory) * now
        wanted.append(kept)
    torch.testing.assert_close(torch.stack(task.seen), torch.stack(wanted[4::5]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(made.net), wanted[-1], rtol=1e-5, atol=1e-6)
    assert (weights(made.net) - live[-1]).norm() > 1e-3  # not the last weights themselves


def test_the_best_average_comes_back(tmp_path):
    task = Scripted(SCRIPT)
    made = Made(tmp_path, task=task, config={"steps": None, "epochs": 6, "ema": 0.9})
    made.run()
    assert torch.equal(weights(made.net), task.seen[4])  # 0.9


@pytest.mark.parametrize("at", [1, 3])
def test_the_average_survives_a_stop(at, tmp_path):
    """Stopped at the end of an epoch and gone on with a fresh net: the same average, the same log, to the bit."""
    config = {"steps": None, "epochs": 4, "ema": 0.9, "select": "last"}
    whole = Made(tmp_path / "whole", net=net(0.3, True), config=config)
    told, run = whole.run(), Run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    made = Made(tmp_path / "run", net=net(0.3, True), task=Scripted([0.5] * 4, at, lambda: setattr(run, "stop", "SIGTERM")), config=config)
    with pytest.raises(UserError, match="everything done so far is saved"):
        loop(made.job(), run)
    made = Made(tmp_path / "run", net=net(0.3, True), config=config)
    found = made.run()
    assert equal(made.net, whole.net)
    assert [e for e in found if e["kind"] == "step"] == [e for e in told if e["kind"] == "step"]


def test_a_bad_step_leaves_the_average_alone(tmp_path):
    bad = poisoned_at(int(Shuffled(80, 16, 0).ids(0, 1)[0][0]), math.nan)
    made = Made(tmp_path / "run", store=bad, net=net(norm=True), config={"ema": 0.9})
    job = made.job()
    (tmp_path / "run").mkdir()
    state, _place = start(job, Run(tmp_path / "run"))
    step(job, state, job.train.step(job.order, 0, 0, 1, 16, torch.tensor(0)), Place(0, 0, 0))
    before = {k: t.clone() for k, t in state.ema.items()}
    assert {f"ema/{k}" for k in before} <= state.tensors().keys()
    assert not torch.equal(before["net/0.weight"], net(norm=True)[0].weight)  # the good step moved it
    for n in (1, 2):  # the bad one, and a good one, which is no longer applied
        step(job, state, job.train.step(job.order, 0, n, 1, 16, torch.tensor(0)), Place(n, 0, n))
    assert int(state.bad_step) == 1 and all(torch.equal(t, before[k]) for k, t in state.ema.items())


# --- a bad number ends it -------------------------------------------------------------------------------------------------------


def poisoned_at(row: int, value: float, column: int = 2) -> Store:
    store = points()
    store.fields["columns"][row, column] = value
    return store


def ends(made: Made) -> tuple[UserError, int]:
    """The fault of a run that must fail, and at which step it did (counted from 1)."""
    with pytest.raises(UserError, match=r"not a finite number at step \d+; nothing from that step on was applied") as caught:
        made.run()
    fault = caught.value
    assert (fault.code, fault.name) == (FAILED, "not-finite")
    return fault, int(fault.what.split("step ")[1].split(";")[0])


@pytest.mark.parametrize("value, log_steps", [(math.nan, 1), (math.nan, 10), (math.inf, 10), (-math.inf, 10)])
@pytest.mark.parametrize("norm", [False, True], ids=["", "batch norm"])
def test_one_poisoned_row_ends_the_run_and_is_named(value, log_steps, norm, tmp_path):
    row = int(Shuffled(80, 16, 0).ids(0, 3)[0][5])  # it comes up in the fourth step
    made = Made(tmp_path / "bad", store=poisoned_at(row, value), net=net(0.3, norm), config={"log_steps": log_steps})
    fault, bad = ends(made)
    assert bad == 4
    assert fault.found.startswith(f"examples {row}") and "," not in fault.found.split("·")[0]
    assert "optim.lr (now 0.01)" in fault.do and "optim.clip" in fault.do
    good = Made(tmp_path / "good", net=net(0.3, norm), validation=False, config={"steps": 3})
    good.run()
    assert equal(made.net, good.net)  # weights, and running statistics, of the third step


def test_a_poisoned_row_among_several_chunks(tmp_path):
    row = int(Shuffled(80, 16, 0).ids(0, 2)[0][15])
    made = Made(tmp_path / "bad", store=poisoned_at(row, math.nan), config={"chunks": 4})
    fault, bad = ends(made)
    assert bad == 3 and fault.found.startswith(f"examples {row}")


def test_a_gradient_that_is_not_finite_with_a_finite_loss(tmp_path):
    """The loss alone tells nothing: √0 has the value 0 and an infinite slope."""

    class Steep(Classify):
        def loss(self, nets, chunk, carry):
            total, carry, told = super().loss(nets, chunk, carry)
            bias = nets["net"][-1].bias
            return total + ((bias - bias.detach()).abs().sqrt().sum() if 7 in chunk.ids else 0), carry, told

    made = Made(tmp_path / "bad", task=Steep(("0", "1", "2"), "cross_entropy", False, ROW), optim=SgdConfig(lr=0.1))
    fault, bad = ends(made)
    order = Shuffled(80, 16, 0)
    assert bad == 1 + next(n for n in range(5) if 7 in order.ids(0, n)[0])
    assert "7" in fault.found or "more" in fault.found  # no row is worse than the others: the step's rows are named
    assert torch.isfinite(weights(made.net)).all()


@pytest.mark.parametrize("optim", [SgdConfig(lr=1e30), AdamConfig(lr=1e30)], ids=["sgd", "adam"])
def test_a_senseless_learning_rate_ends_it_too(optim, tmp_path):
    made = Made(tmp_path, optim=optim, net=net(bends=nn.ReLU))  # 1e30 · 1e30 overflows; a tanh would hide it in its ±1
    fault, bad = ends(made)
    assert bad >= 2 and "1e+30" in fault.do
    assert torch.isfinite(weights(made.net)).all()


def test_every_optimizer_leaves_its_state_alone_after_a_bad_step(tmp_path):
    from cloche.training.optim import OPTIMS

    for kind, config in OPTIMS.items():
        made = Made(tmp_path / kind, store=poisoned_at(int(Shuffled(80, 16, 0).ids(0, 1)[0][0]), math.nan), optim=config())
        job = made.job()
        (tmp_path / kind).mkdir()
        state, _place = start(job, Run(tmp_path / kind))

        def act(n: int, job: Job = job, state: object = state) -> None:
            step(job, state, job.train.step(job.order, 0, n, 1, 16, torch.tensor(0)), Place(n, 0, n))

        act(0)
        before = {k: t.clone() for k, t in state.tensors().items() if k.startswith(("net/", "optim/"))}
        act(1)  # the bad one
        act(2)  # a good one, which is no longer applied
        after = state.tensors()
        assert int(state.bad_step) == 1
        assert all(torch.equal(before[k], after[k]) for k in before), kind


def test_a_failed_run_leaves_no_model(tmp_path, quick):
    x = points().fields["columns"].numpy().copy()
    y = np.zeros((len(x), 1), np.float32)
    y[40] = 3e38  # finite itself, its square is not
    made = torch.nn.Linear(x.shape[1], 1)
    with pytest.raises(UserError, match="not a finite number at step") as caught:
        cloche.fit(
            made,
            x,
            y,
            out=str(tmp_path / "run"),
            sets={"train.epochs": 3, "train.device": "cpu", "data.validation": 0.0, "data.test": 0.0},
        )
    assert caught.value.found.startswith("examples 40")
    assert not (tmp_path / "run/model.safetensors").exists() and not (tmp_path / "run/manifest.json").exists()
    assert torch.isfinite(weights(made)).all()


def test_nothing_bad_is_saved(tmp_path, monkeypatch):
    """Checkpoints after every step: none stands at or behind the bad one, and a resume meets the same fault."""
    monkeypatch.setattr(loops.Clock, "save_is_due", property(lambda self: True))
    row = int(Shuffled(80, 16, 0).ids(0, 3)[0][5])
    for _again in range(2):
        made = Made(tmp_path, store=poisoned_at(row, math.nan), config={"log_steps": 100})
        fault, bad = ends(made)
        assert bad == 4 and fault.found.startswith(f"examples {row}")
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]


# --- the folder and the machine -------------------------------------------------------------------------------------------------


def test_a_path_that_is_a_file(tmp_path, quick):
    path = tmp_path / "taken"
    path.write_text("mine")
    with pytest.raises(UserError, match="taken is a file, not a folder for a run") as caught:
        train("digits-mlp", sets=TINY, options=Options(out=str(path), quiet=True))
    assert caught.value.code == WRONG_INPUT and "--out" in caught.value.do
    assert path.read_text() == "mine"


def test_a_folder_of_someone_else(tmp_path, quick):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a run's") as caught:
        train("digits-mlp", sets=TINY, options=Options(out=str(tmp_path), quiet=True))
    assert "thesis.tex" in caught.value.found
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written(tmp_path, quick):
    out = Path("/sys/kernel/run") if os.name == "posix" and os.geteuid() == 0 else tmp_path / "locked/run"
    if out.parent == Path("/sys/kernel") and not out.parent.is_dir():
        pytest.skip("not run: root may write everywhere, and there is no /sys")
    if not out.parent.exists():
        out.parent.mkdir()
        out.parent.chmod(0o555)
    with pytest.raises(UserError, match=f"cannot make the folder {out}") as caught:
        train("digits-mlp", sets=TINY, options=Options(out=str(out), quiet=True))
    assert caught.value.code == WRONG_INPUT and caught.value.name == "read-only" and caught.value.found


@pytest.mark.parametrize("device", ["cuda:7"])
def test_a_device_asked_for_and_absent(device, tmp_path):
    if torch.cuda.is_available() and torch.cuda.device_count() > 7:
        pytest.skip(f"not run: this machine has {device}")
    with pytest.raises(UserError, match=f"train.device = {device}, but there is no such device here") as caught:
        train("digits-mlp", sets={**TINY, "train.device": device}, options=Options(out=str(tmp_path / "run"), quiet=True))
    assert caught.value.code == WRONG_INPUT and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: this machine has a CUDA device")
def test_cuda_asked_for_and_absent(tmp_path):
    with pytest.raises(UserError, match="train.device = cuda, but there is no such device here"):
        train("digits-mlp", sets={**TINY, "train.device": "cuda"}, options=Options(out=str(tmp_path / "run"), quiet=True))


class Leaping(nn.Module):
    """Its answers are a thousand times too loud in one training pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = net(), at, 0

    def forward(self, x):
        self.calls += self.training
        return self.inner(x) * (1000.0 if self.training and self.calls == self.at else 1.0)


@pytest.mark.parametrize("at", [12, 0])
def test_a_leap_of_the_loss_is_said_and_logged(at, tmp_path, capsys):
    made = Made(tmp_path, net=Leaping(at), optim=SgdConfig(lr=1e-6))
    leaps = [e for e in made.run() if e["kind"] == "leap"]
    told = capsys.readouterr().err
    assert [e["step"] for e in leaps] == ([12] if at else [])
    assert ("the loss has leapt to" in told and "at step 12" in told) == bool(at)
    if at:
        assert leaps[0]["loss"] > 10 * leaps[0]["lowest"]


def test_an_infinite_loss_with_a_finite_gradient_ends_the_run(tmp_path):
    """Squares leave float32 before their gradient does: the sum of the losses is what overflows."""

    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x[:, :1] * 0 + self.bias + 8e18

    class Squares(Classify):
        def loss(self, nets, chunk, carry):
            y = nets["net"](chunk.data["columns"])[:, 0]
            return (chunk.weight * y.square()).sum(), carry, {}

        def measure(self, nets, chunk, carry):
            return {}, carry, {"loss": nets["net"](chunk.data["columns"])[:, 0].square()}

    made = Made(
        tmp_path, net=Huge(), task=Squares(("0", "1", "2"), "cross_entropy", False, ROW), optim=SgdConfig(lr=1e-30), validation=False
    )
    with pytest.raises(UserError) as caught:
        made.run()
    assert caught.value.name == "not-finite"
