"""Beam search against every possible target of a tiny net, and against greedy writing."""

from itertools import product

import pytest
import torch

from cloche.config import Port
from cloche.decode.beam import beam, greedy
from cloche.nets.transformer import TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")
V, LIMIT, BOS, EOS = 5, 4, 1, 2
SOURCE = torch.randint(3, V, (3, 6), generator=torch.Generator().manual_seed(0))
LENGTH = torch.tensor([6, 2, 4])


def built(seed):
    torch.manual_seed(seed)
    net = TransformerConfig(width=8, layers=1, heads=2).build(Port("tokens", (None,), V), Port("tokens", (None,), V), "pairs").eval()
    with torch.no_grad():
        net.head.weight.mul_(3)  # far from uniform, so that the likeliest first token is not always the best
        net.head.bias[0] = -20  # padding is never said
    return net.double()


def every_target():
    """All that end within LIMIT tokens, and all that are cut there."""
    words = [v for v in range(1, V) if v != EOS]
    ended = [(*body, EOS) for n in range(LIMIT) for body in product(words, repeat=n)]
    return ended + list(product(words, repeat=LIMIT))


def by_hand(net, row):
    """Every target with its mean log-probability a token, each from one forward pass of its own."""
    source, length, out = SOURCE[row : row + 1], LENGTH[row : row + 1], {}
    for target in every_target():
        logits = net(source, length, torch.tensor([[BOS, *target[:-1]]]))[0].log_softmax(-1)
        out[target] = sum(logits[i, v].item() for i, v in enumerate(target)) / len(target)
    return out


@torch.inference_mode()
def test_a_wide_beam_finds_the_best_of_all_targets():
    missed = 0
    for seed in range(3):
        net = built(seed)
        found = beam(net, net.encode(SOURCE, LENGTH), LIMIT, 200)  # more than there are beginnings: nothing is pushed out
        narrow = greedy(net, net.encode(SOURCE, LENGTH), LIMIT)
        for row in range(3):
            scores = by_hand(net, row)
            best = max(scores, key=scores.get)
            assert tuple(found[row]) == tuple(v for v in best if v != EOS)
            missed += found[row] != narrow[row]
    assert missed  # else greedy writing would have passed this test


def test_a_beam_of_one_is_greedy_and_a_row_does_not_depend_on_the_rows_beside_it():
    for seed in range(4):
        net = built(seed)
        memory = net.encode(SOURCE, LENGTH)
        together = greedy(net, memory, 12)
        assert together == beam(net, memory, 12, 1)
        wide = beam(net, memory, 12, 3)
        for row in range(3):
            alone = net.encode(SOURCE[row : row + 1, : LENGTH[row]], LENGTH[row : row + 1])
            assert greedy(net, alone, 12) == together[row : row + 1]
            assert beam(net, alone, 12, 3) == wide[row : row + 1]


class Script(torch.nn.Module):
    """A net that says tokens by rote: row 0 ends after two, row 1 after one, row 2 never. It remembers what it was given."""

    says = ((3, 4, EOS, 3, 3, 3), (4, EOS, 4, 4, 4, 4), (3, 3, 3, 3, 3, 3))

    def start(self, rows, limit, memory):
        self.seen = []
        return {"at": torch.zeros(rows, dtype=torch.int64), "row": torch.arange(rows) // (rows // 3)}

    def decode(self, token, memory, carry):
        self.seen.append(token[:, 0].tolist())
        likely = torch.tensor(self.says)[carry["row"], carry["at"]]
        logits = torch.zeros(len(token), 1, V).scatter_(2, likely[:, None, None], 5.0)
        return logits, {**carry, "at": carry["at"] + 1}


def test_a_row_that_has_ended_is_frozen_and_one_that_does_not_end_is_cut():
    net, memory = Script(), (torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.bool))
    assert greedy(net, memory, 6) == [[3, 4], [4], [3] * 6]
    assert net.seen == [[1, 1, 1], [3, 4, 3], [4, 2, 3], [2, 0, 3], [0, 0, 3], [0, 0, 3]]
    assert beam(net, memory, 6, 2) == [[3, 4], [4], [3] * 6]


class TwoSteps(torch.nn.Module):
    """First EOS or 3 by chance `end`, then EOS half the time."""

    def __init__(self, end):
        super().__init__()
        self.chances = torch.tensor([[0.0, 0, end, 1 - end, 0], [0, 0, 0.5, 0.25, 0.25]]).clamp(min=1e-9)

    def start(self, rows, limit, memory):
        return {"at": torch.zeros(rows, dtype=torch.int64)}

    def decode(self, token, memory, carry):
        return self.chances[carry["at"]].log()[:, None], {"at": carry["at"] + 1}


@pytest.mark.parametrize(
    "end, best",
    [
        (0.4, [3]),  # 0.4 for ending at once; 0.6 · 0.5 = 0.3 for 3, less, but √0.3 = 0.55 a token
        (0.7, []),  # √(0.3 · 0.5) = 0.39 a token
    ],
)
def test_the_score_is_the_mean_log_probability_a_token(end, best):
    assert beam(TwoSteps(end), (torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)), 2, 4) == [best]
