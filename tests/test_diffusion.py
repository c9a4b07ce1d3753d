"""The diffusion task: what it draws, measures and answers, row by row; its judge; the timeline."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cloche import rng
from cloche.config import RecipeError
from cloche.data.captions import CaptionsConfig, CaptionsPrepare, spoken
from cloche.data.chunk import Chunk, Part
from cloche.data.read.builtin import read_digits
from cloche.data.store import Store
from cloche.nets.textenc import TextencConfig
from cloche.nets.unet import UnetConfig
from cloche.tasks.diffusion import UNTOLD, Diffusion, DiffusionConfig
from cloche.use.explain.inside import COLUMNS, SAMPLES, timeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    store, config = Store(spoken(read_digits())), CaptionsConfig(source="digits-captions", pixels=8, channels=1)
    prepare = CaptionsPrepare.fit(store, config.parts(store), config)
    return prepare, Part("test", *prepare.view(store, config.parts(store)["test"]), prepare)


def task_of(data, **keys):
    return Diffusion(DiffusionConfig(**{"steps": 3, **keys}), data[0])


def nets_of(task, woken=True):
    torch.manual_seed(0)
    config = UnetConfig(width=16, mults=(1, 2), heads=2, dropout=0.0, text=TextencConfig(width=12))
    nets = {"net": config.build(*task.ports["net"], "denoises"), "text": config.text.build(*task.ports["text"], "embeds")}
    for p in (p for n in nets.values() for p in n.eval().parameters() if woken and not p.any()):
        nn.init.normal_(p, std=0.05)
    return nets


def told(nets, log):
    """The nets, with the lengths that the reader of prompts is given kept in `log`."""

    class Spy(nn.Module):
        def forward(self, tokens, lengths):
            log.append(lengths)
            return nets["text"](tokens, lengths)

    return nets | {"text": Spy()}


class Bright(nn.Module):
    """A judge that knows two classes by brightness: 1 where the mean is above a half."""

    def forward(self, pictures):
        mean = pictures.mean((1, 2, 3))
        assert pictures.shape[1:] == (1, 8, 8) and float(pictures.min()) >= 0 and float(pictures.max()) <= 1
        return torch.stack([0.5 - mean, mean - 0.5], 1)


# ---- learning


def test_measure_is_the_same_whenever_and_with_whomever(data):
    task = task_of(data)
    nets = nets_of(task)
    with torch.no_grad():
        torch.manual_seed(1)
        sums, _carry, rows = task.measure(nets, data[1].take(np.arange(12)), None)
        torch.manual_seed(2)
        again = task.measure(nets, data[1].take(np.arange(4, 7)), None)[2]["loss"]
    torch.testing.assert_close(again, rows["loss"][4:7])
    torch.testing.assert_close(sums["loss"], rows["loss"].double().sum())
    assert float(sums["n"]) == 12 and task.figures(sums)["loss"].value == pytest.approx(float(rows["loss"].mean()))


def test_an_untrained_net_loses_the_size_of_v(data):
    """It predicts 0, so the loss is v² = (α·ε − σ·x0)²: between the pictures' mean square and 1 of the noise."""
    task = task_of(data)
    chunk = data[1].take(np.arange(600))
    square = float(chunk.data["image"].square().mean())
    with torch.no_grad():
        value = task.figures(task.measure(nets_of(task, woken=False), chunk, None)[0])["loss"].value
    assert 0.05 + min(square, 1) < value < max(square, 1) and value == pytest.approx((square + 1) / 2, rel=0.05)


def test_fillers_do_not_count_and_a_tenth_learns_without_its_caption(data):
    task, log = task_of(data), []
    nets, chunk = nets_of(task), data[1].take(np.arange(1000))
    with torch.no_grad():
        torch.manual_seed(3)
        whole = task.loss(told(nets, log), chunk, None)[0]
        torch.manual_seed(3)
        none = task.loss(nets, replace(chunk, weight=torch.zeros(1000)), None)[0]
        torch.manual_seed(3)
        half = task.loss(nets, replace(chunk, weight=torch.full((1000,), 0.5)), None)[0]
    assert float(none) == 0 and float(half) == pytest.approx(float(whole) / 2)
    assert float((log[0] == 0).float().mean()) == pytest.approx(UNTOLD, abs=0.03)
    kept = log[0] > 0
    assert torch.equal(log[0][kept], chunk.data["caption_len"][kept])
    assert float(task.count(replace(chunk, weight=torch.zeros(1000)))) == 0


def test_each_epoch_draws_other_levels(data):
    task, chunk = task_of(data), data[1].take(np.arange(64))
    nets, losses = nets_of(task), []
    for epoch in (0, 0, 1):
        torch.manual_seed(0)
        losses.append(float(task.loss(nets, replace(chunk, draw=rng.draw(0, epoch)), None)[0].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_it_overfits_eight_rows(data):
    task, chunk = task_of(data), data[1].take(np.arange(8))
    nets = {k: n.train() for k, n in nets_of(task, woken=False).items()}
    optimizer = torch.optim.Adam([p for n in nets.values() for p in n.parameters()], 1e-2)
    size = lambda: float(task.measure(nets, chunk, None)[0]["loss"].detach())  # noqa: E731
    first = size()
    for n in range(100):
        torch.manual_seed(n)
        (task.loss(nets, replace(chunk, draw=rng.draw(0, n)), None)[0] / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert size() < 0.35 * first


# ---- answers


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_hangs_on_its_prompt_and_seed_alone(data, sampler):
    task = task_of(data, sampler=sampler)
    nets, chunk = nets_of(task), data[1].take(np.arange(6))
    with torch.no_grad():
        whole = [np.array(a["image"]) for a in task.answer(nets, chunk)]
        alone = np.array(task.answer(nets, data[1].take(np.array([4])))[0]["image"])
        other = np.array(task.answer(nets, replace(chunk, ids=chunk.ids + 1))[4]["image"])
    assert whole[0].shape == (8, 8, 1) and all(a.min() >= 0 and a.max() <= 1 for a in whole)
    np.testing.assert_allclose(alone, whole[4], atol=2e-4)
    assert np.abs(other - whole[4]).max() > 0.1


def test_the_keys_of_sampling_change_what_is_drawn(data):
    nets, chunk, drawn = nets_of(task_of(data)), data[1].take(np.arange(2)), []
    for keys in ({}, {"steps": 4}, {"guidance": 8.0}, {"sampler": "ddpm"}):
        with torch.no_grad():
            drawn.append(np.array(task_of(data, **keys).answer(nets, chunk)[0]["image"]))
    assert all(np.abs(drawn[0] - d).max() > 1e-3 for d in drawn[1:])
    assert task_of(data, samples=5, judge="recipe:digits").samples == 5 and task_of(data, samples=5).samples == 0  # none to be judged


@pytest.mark.parametrize("guidance, same", [(1.0, "caption"), (0.0, "nothing")])
def test_guidance_one_is_the_prompt_and_none_is_no_prompt(data, guidance, same):
    task, chunk = task_of(data, guidance=guidance), data[1].take(np.arange(3))
    nets, log = nets_of(task), []
    x, level = torch.randn(3, 1, 8, 8), torch.zeros(3)
    with torch.no_grad():
        found = task.denoiser(told(nets, log), chunk)(x, level)
        length = chunk.data["caption_len"] * (same == "caption")
        v = nets["net"](x, level, nets["text"](chunk.data["caption"], length))
    torch.testing.assert_close(found, ((x - v) / 2**0.5).clamp(-1, 1))  # at level 0: α = σ = √½
    assert len(log) == 1 and len(log[0]) == 6  # one batch of twice the rows


def test_a_prompt_needs_no_picture(data):
    task = task_of(data)
    given = data[0].gather([data[0].encode(p) for p in ("tatu", "")])
    ids = torch.tensor([7, 7])
    chunk = data[0].device(Chunk(given, ids, ids, torch.ones(2), torch.tensor(0), train=False))
    with torch.no_grad():
        a, b = (np.array(answer["image"]) for answer in task.answer(nets_of(task), chunk))
    assert np.isfinite(a).all() and np.abs(a - b).max() > 1e-4


# ---- the judge


def test_agreement_is_how_often_the_judge_reads_the_prompt(data):
    task = task_of(data, judge="recipe:digits")
    chunk = data[1].take(np.arange(4))
    chunk.data["label"] = torch.tensor([1, 0, 1, 1])
    answers = [{"image": np.full((8, 8, 1), v).tolist()} for v in (0.9, 0.2, 0.1, 0.8)]
    sums = task.score(answers, replace(chunk, weight=torch.tensor([1.0, 1, 1, 0])), {"judge": Bright()})
    found = task.figures({**sums, "loss": torch.tensor(2.0), "n": torch.tensor(4.0)})["agreement"]
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    assert task.score(answers, chunk, {}) == {}
    assert set(task.figures({"loss": torch.tensor(2.0), "n": torch.tensor(4.0)})) == {"loss"}


def test_the_baseline_is_the_commonest_class_of_the_training_part(data):
    task, (_prepare, part) = task_of(data, judge="recipe:digits"), data
    label = part.field("label")
    found = task.baselines({"label": 3}, part, None)
    assert found['always drawing "3"'].value == pytest.approx((label == 3).mean())
    assert task.known(part)["label"] == np.bincount(label).argmax()
    assert task_of(data).baselines({"label": 3}, part, None) == {}


def test_a_judge_needs_classes():
    with pytest.raises(RecipeError, match="no classes"):
        DiffusionConfig(judge="recipe:digits").resolve({"labels": []})
    assert DiffusionConfig().resolve({"labels": []}).judge == ""


# ---- the timeline


def test_the_timeline_shows_the_steps_to_the_answer(data):
    task = task_of(data, steps=9)
    nets = nets_of(task)

    def chunk_of(given):
        ids = torch.arange(len(given["caption"]))
        return data[0].device(Chunk(given, ids, ids, torch.ones(len(ids)), torch.tensor(0), train=False))

    model = SimpleNamespace(nets=nets, task=task, prepare=data[0], chunk=chunk_of)
    found, lines, figures = timeline(model, "trzy")
    ((title, figure),) = figures.items()
    assert "trzy" in title
    assert len(found["levels"]) == 9 and found["levels"] == sorted(found["levels"]) and '"trzy": 9 steps' in lines[0]
    assert len(figure.axes) == 2 * SAMPLES * COLUMNS
    with torch.no_grad():
        answer = np.array(task.answer(nets, chunk_of(data[0].gather([data[0].encode("trzy")] * SAMPLES)))[1]["image"])
    last = figure.axes[2 * COLUMNS + COLUMNS - 1]  # the second sample at the end
    np.testing.assert_allclose(last.images[0].get_array().squeeze(), answer[..., 0], atol=1e-4)
    assert last.images[0].get_clim() == (0, 1) and figure.axes[0].get_title("left") == "100\u00a0%"  # of noise
