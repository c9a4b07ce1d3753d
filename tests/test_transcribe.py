"""Transcribing: edit distance by worked examples, the loss against every alignment summed by hand, figures against their formulas."""

from itertools import groupby, product
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.table import Ragged
from cloche.tasks.transcribe import Transcribe, edits
from cloche.use.explain.inside import spectrogram

TASK = Transcribe("ab\ufffd", Port("series", (None, 4)))  # letters 1, 2, 3; the blank 0


class Given(nn.Module):
    """A net whose frames are its logits."""

    def forward(self, x, lengths):
        return x, lengths


NETS = {"net": Given()}


def chunk(logits, lengths, targets, weight=None):
    n, width = len(logits), max(map(len, targets))
    data = {"audio": logits, "audio_len": torch.tensor(lengths), "target_len": torch.tensor([len(t) for t in targets])}
    data["target"] = torch.tensor([[*t, *[0] * (width - len(t))] for t in targets])
    return Chunk(data, torch.arange(n), torch.arange(n), torch.tensor(weight or [1.0] * n), torch.tensor(0), True)


def saying(*rows):
    """Logits of nets that are sure of each step."""
    return 9.0 * torch.nn.functional.one_hot(torch.tensor(rows), 4)


@pytest.mark.parametrize(
    "said, true, distance",
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("saturday", "sunday", 3),
        ("ab", "ba", 2),
        ("1", "12", 1),
    ],
)
def test_edits(said, true, distance):
    assert edits(said, true) == distance


def over_alignments(logits, target):
    """−log of the probability of every path that collapses to the target."""
    p, total = logits.detach().double().softmax(-1).numpy(), 0.0
    for path in product(range(p.shape[1]), repeat=len(p)):
        if [k for k, _run in groupby(path) if k] == target:
            total += math.prod(p[t, k] for t, k in enumerate(path))
    return -math.log(total)


def test_the_loss_is_the_sum_over_every_alignment():
    torch.manual_seed(0)
    logits, lengths, targets = torch.randn(4, 5, 4), [5, 4, 5, 3], [[1, 2], [1, 1], [2], [3]]
    given = chunk(logits, lengths, targets, [1.0, 1.0, 1.0, 0.0])
    wanted = [over_alignments(row[:n], target) for row, n, target in zip(logits, lengths, targets, strict=True)]
    total, _carry, _told = TASK.loss(NETS, given, None)
    assert_close(total.item(), sum(wanted[:3]), rtol=1e-5, atol=0)  # the last is a filler
    sums, _carry, rows = TASK.measure(NETS, given, None)
    assert_close(rows["loss"].tolist(), [w / len(t) for w, t in zip(wanted, targets, strict=True)], rtol=1e-5, atol=0)
    assert sums["n"] == TASK.count(given) == 5
    assert_close(TASK.figures(sums)["loss"].value, sum(wanted[:3]) / 5, rtol=1e-5, atol=0)


def test_a_row_with_fewer_steps_than_letters_counts_as_nothing():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss, _carry, _told = TASK.loss(NETS, chunk(logits, [3, 2], [[1, 2], [1, 1]]), None)  # two of a letter need a blank between
    loss.backward()
    assert loss.isfinite() and logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0


def test_answers_and_their_score():
    given = chunk(saying([1, 1, 0, 1], [1, 2, 0, 0], [2, 2, 2, 2], [1, 1, 1, 1]), [4, 4, 4, 4], [[1, 1], [1, 3, 2], [1], [2]], [1, 1, 1, 0])
    answers = TASK.answer(NETS, given)
    assert answers == [{"text": "aa"}, {"text": "ab"}, {"text": "b"}, {"text": "a"}]
    assert TASK.truth(given) == ["aa", "a\ufffdb", "a", "b"]
    found = TASK.figures(TASK.score(answers, given, NETS))  # 0 of 2, 1 of 3, 1 of 1 letters wrong; the filler is not looked at
    assert found["cer"].value == pytest.approx(2 / 6) and found["cer"].n == 3
    apart = [e - c / 3 for e, c in ((0, 2), (1, 3), (1, 1))]
    half = 1.959964 * math.sqrt(sum(d * d for d in apart)) / 6
    assert (found["cer"].low, found["cer"].high) == pytest.approx((max(0, 2 / 6 - half), 2 / 6 + half))
    assert found["exact"].value == pytest.approx(1 / 3)


def test_without_an_error_the_rate_may_still_be_more_than_nothing():
    given = chunk(saying([1, 2, 0, 1]), [4], [[1, 2, 1]])
    found = TASK.figures(TASK.score(TASK.answer(NETS, given), given, NETS))["cer"]
    assert found.value == found.low == 0 and 0.5 < found.high < 0.6  # 1.96² / (3 + 1.96²)


def test_what_saying_always_the_same_gets():
    fields = {"target": Ragged.of([[1, 2], [1, 2], [1], [2, 2, 2]], np.int64)}
    part = SimpleNamespace(store=SimpleNamespace(fields=fields), ids=np.array([0, 1, 2, 3]))
    known = TASK.known(part)
    assert known == {"text": "ab"}
    found = TASK.baselines(known, part, None)
    assert {k: f.value for k, f in found.items()} == {'always answering "ab"': pytest.approx(3 / 8), "saying nothing": 1.0}


def test_the_picture_tells_each_letter_where_it_is_likeliest():
    frames = torch.tensor([[[0, 2, 0, 0], [0, 9, 0, 0], [5, 0, 0, 0], [0, 7, 0, 0], [0, 0, 6, 0], [0, 0, 0, 9.0]]])  # the last is padding
    whole = chunk(frames, [5], [[1, 1, 2]])
    prepare = SimpleNamespace(encode=lambda given: given, gather=lambda encoded: encoded, mean=(0.0,) * 4, std=(1.0,) * 4, rate=8000)
    model = SimpleNamespace(prepare=prepare, chunk=lambda encoded: whole, net=NETS["net"], nets=NETS, task=TASK)
    found, lines, drawn = spectrogram(model, "my.wav")
    assert found["text"] == TASK.answer(NETS, whole)[0]["text"] == "aab" and lines[0] == 'my.wav: "aab"'
    assert [(x["letter"], x["seconds"]) for x in found["letters"]] == [("a", 0.015), ("a", 0.035), ("b", 0.045)]  # frames of 10 ms
    assert found["letters"][0]["probability"] == pytest.approx(math.exp(9) / (math.exp(9) + 3))
    (figure,) = drawn.values()
    assert [t.get_text() for t in figure.axes[0].texts] == ["a", "a", "b"]
