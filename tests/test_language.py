"""The language task: exact bits a byte whatever a token is, padding and fillers without weight, a carried state, honest baselines."""

from dataclasses import replace
import math
from pathlib import Path

import numpy as np
import pytest
from test_text import PARAGRAPHS, prepared
import torch
from torch import nn

from cloche.data.chunk import Chunk, Part
from cloche.errors import UserError
from cloche.nets.gpt import GptConfig
from cloche.nets.rnn import RnnConfig
from cloche.tasks.language import LanguageConfig
from cloche.training.evaluate import evaluate
from cloche.training.precision import Precision
from cloche.use.draw import png
from cloche.use.explain.inside import tokens
from cloche.use.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")


class Even(nn.Module):
    """Finds every token equally likely."""

    context = 0

    def __init__(self, V):
        super().__init__()
        self.V = V

    def forward(self, tokens, carry=None):
        return torch.zeros(*tokens.shape, self.V), None


class Counting(Even):
    """Finds token n + 1 likely after n; its carry counts the tokens that each row has seen."""

    def forward(self, tokens, carry=None):
        seen = (carry["seen"] if carry else torch.zeros(len(tokens), dtype=torch.int64)) + tokens.shape[1]
        return 3.0 * nn.functional.one_hot((tokens + 1) % self.V, self.V), {"seen": seen}


def made(kind="bpe", name="test", **more):
    s, rows, prepare = prepared(kind, **more)
    view, ids = prepare.view(s, rows[name])
    return LanguageConfig().build(prepare, {}), Part(name, view, ids, prepare), prepare


@pytest.mark.parametrize("kind", ["bpe", "words", "characters"])
def test_bits_a_byte_are_all_bits_over_all_bytes(kind):
    task, part, prepare = made(kind)
    V, running = len(prepare.pieces), prepare.encode(part.store.raw.decode())
    n, size = len(running["tokens"]) - 1, len(part.store.raw)
    spelled = 8 * int(running["bytes"][1:][running["tokens"][1:] == 0].sum()) if kind == "words" else 0
    for batch in (2, 5, 64):
        sums, rows = evaluate({"net": Even(V)}, task, part, Precision(), batch)
        found = task.figures(sums)
        assert found["bits_per_byte"].value == pytest.approx((n * math.log2(V) + spelled) / size)
        assert found["perplexity"].value == pytest.approx(V) and found["loss"].n == n
        assert found["bits_per_byte"].n == len(part) and rows["loss"] == pytest.approx([math.log(V)] * len(part))
    assert kind != "words" or spelled > 0


def test_the_interval_is_that_of_a_ratio():
    task, part, _prepare = made()
    sums, _rows = evaluate({"net": Counting(len(task.texts))}, task, part, Precision(), 4)
    chunk = part.take(np.arange(len(part)))
    bits = task.bits(task.losses({"net": Counting(len(task.texts))}, chunk)[0], chunk).sum(1).numpy()
    size = chunk.data["bytes"][:, 1:].sum(1).numpy()
    ratio, n = bits.sum() / size.sum(), len(part)
    half = 1.959964 * math.sqrt(((bits - ratio * size) ** 2).sum() / (n - 1) * n) / size.sum()
    found = task.figures(sums)["bits_per_byte"]
    assert (found.value, found.low, found.high) == pytest.approx((ratio, ratio - half, ratio + half))


def test_padding_and_fillers_weigh_nothing():
    task, part, _prepare = made(window=13)
    chunk, nets = part.take(np.arange(len(part))), {"net": Counting(len(task.texts))}
    total, _carry, _told = task.loss(nets, chunk, None)
    assert not chunk.data["bytes"][-1, -1] and int(task.count(chunk)) == int((chunk.data["bytes"][:, 1:] > 0).sum())
    other = {k: t.clone() for k, t in chunk.data.items()}
    other["tokens"][-1, 1:][other["bytes"][-1, 1:] == 0] = 7
    assert task.loss(nets, replace(chunk, data=other), None)[0] == pytest.approx(float(total))
    weight = chunk.weight.clone()
    weight[1] = 0
    less = replace(chunk, weight=weight)
    row = task.losses(nets, chunk)[0][1].sum()
    assert task.loss(nets, less, None)[0] == pytest.approx(float(total - row))
    assert int(task.count(chunk) - task.count(less)) == 13
    sums = task.measure(nets, less, None)[0]
    assert float(sums["rows"]) == len(part) - 1 and float(sums["n"]) == float(task.count(less))


def test_a_state_is_handed_on_and_read_in_lanes():
    task, part, prepare = made("characters", window=4)
    net = RnnConfig(kind="lstm", width=8).build(*task.ports["net"], "continues").eval()
    lanes = replace(part, carried=True)
    carry, chunks = None, [c for _i, c in lanes.once(3)]
    assert len(chunks) > 8
    for chunk in chunks[:4]:
        sums, carry, rows = task.measure({"net": net}, chunk, carry)
    tokens = torch.cat([chunk.data["tokens"][:, :-1] for chunk in chunks[:4]], 1)
    wanted, whole = net(tokens)
    for name in ("h", "c"):
        torch.testing.assert_close(carry[name], whole[name])
    seen = {"seen": torch.full((len(chunks[0].ids),), 5)}
    assert task.loss({"net": Counting(len(prepare.pieces))}, chunks[0], seen)[1]["seen"].tolist() == [9] * len(chunks[0].ids)


def prompts(prepare, *texts):
    ids, rows = torch.arange(len(texts)), prepare.gather([prepare.encode(t) for t in texts])
    return prepare.device(Chunk(rows, ids, ids, torch.ones(len(texts)), torch.tensor(0), train=False))


def test_the_answer_is_the_five_likeliest_next_words_with_their_probabilities():
    task, _part, prepare = made("words")
    V = len(prepare.pieces)
    (first, second) = task.answer({"net": Counting(V)}, prompts(prepare, "Paragraph", "in which the number"))
    last = [prepare.encode(t)["tokens"][-1] for t in ("Paragraph", "in which the number")]
    for answer, token in zip((first, second), last, strict=True):
        text, p = answer["next"][0]
        assert text == prepare.decode([(int(token) + 1) % V]).decode().strip(" ") and p > math.exp(3) / (V - 1 + math.exp(3)) - 1e-6
        assert list(answer["probabilities"].items()) == [tuple(pair) for pair in answer["next"]] and len(answer["next"]) == 5


def test_a_word_is_one_answer_whether_a_blank_stands_before_it_or_not():
    task, _part, prepare = made("words")
    pieces = [p.decode() for p in prepare.pieces]
    assert "Paragraph" in pieces and task.texts.count("of") == 1
    task.texts[pieces.index(" of")] = "Paragraph"  # as if it were the same word
    (answer,) = task.answer({"net": Even(len(pieces))}, prompts(prepare, ""))
    assert answer["next"][0] == ["Paragraph", pytest.approx(2 / len(pieces))]


def test_a_prompt_over_the_context_is_refused_by_a_net_that_has_one():
    task, _part, prepare = made(window=16)
    net = GptConfig(width=8, layers=1, heads=1).build(*task.ports["net"], "continues").eval()
    fits, over = "ab", PARAGRAPHS[3]
    assert task.answer({"net": net}, prompts(prepare, fits))[0]["next"]
    n = len(prepare.encode(over)["tokens"])
    with pytest.raises(UserError, match=f"{n} tokens, the start counted; the net looks back over 16"):
        task.answer({"net": net}, prompts(prepare, fits, over))
    free = RnnConfig(kind="lstm", width=8).build(*task.ports["net"], "continues").eval()
    one, both = task.answer({"net": free}, prompts(prepare, over)), task.answer({"net": free}, prompts(prepare, fits, over))
    assert both[1]["next"][0][1] == pytest.approx(one[0]["next"][0][1], abs=1e-6)  # the padding of others changes nothing


def test_baselines_are_fitted_on_the_training_part():
    task, part, _prepare = made()
    _task, train, _same = made(name="train")
    known = task.known(train)
    assert sum(known["bytes"]) == len(train.store.raw)
    both = task.baselines(known, part, train)
    unigram, gram = (f.value for f in both.values())
    p = (np.bincount(list(train.store.raw), minlength=256) + 0.5) / (len(train.store.raw) + 128)
    assert unigram == pytest.approx(-np.log2(p[list(part.store.raw)]).mean()) and gram < 0.6 * unigram
    assert list(task.baselines(known, part, None)) == list(both)[:1]


@pytest.mark.parametrize("config", [GptConfig(width=16, layers=2, heads=2), RnnConfig(kind="gru", width=16)])
def test_explained_each_token_has_its_cost_and_a_transformer_its_looks(config):
    task, part, prepare = made("words", window=64)
    net = config.build(*task.ports["net"], "continues").eval()
    text = "Paragraph 3 of the हाथियों,\n\nParagraph the"
    model = Model(Path(), None, {}, {}, prepare, task, {"net": net}, torch.device("cpu"))
    found, lines, drawn = tokens(model, text)
    chunk = prompts(prepare, text)
    with torch.no_grad():
        sums, _carry, _rows = task.measure({"net": net}, chunk, None)
    assert found["bits_per_byte"] == pytest.approx(task.figures(sums)["bits_per_byte"].value)
    assert [t for t, _cost in found["tokens"]] == ["Paragraph", " 3", " of", " the", "<unk>", ",", "\n\n", "Paragraph", " the"]
    dear = max(found["tokens"], key=lambda pair: pair[1])
    assert dear[0] == "<unk>" and dear[1] > 8 * 22 and repr(dear[0]) in lines[1]  # spelled out: a blank and seven letters of three bytes
    maps = [len(figure.axes) for figure in drawn.values()]
    assert maps == ([1, 4] if config.kind == "gpt" else [1]) and all(png(figure) for figure in drawn.values())
    if config.kind == "gpt":
        place = torch.arange(10.0)
        back = ((place[:, None] - place) * net.attention(chunk.data["tokens"][:, :10])[0]).sum(-1).mean(-1)
        assert found["looks_back"] == [pytest.approx(row) for row in back.tolist()]
