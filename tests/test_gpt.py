"""The decoder-only transformer against its formulas written out number by number, and the laws of a net that continues."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

from cloche.config import Port
from cloche.nets.gpt import GptConfig, rotation, turned

pytestmark = pytest.mark.usefixtures("one_thread")
V, T = 13, 9
TOKENS = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(0))
CONFIG = GptConfig(width=16, layers=2, heads=2)


def built(config=CONFIG, double=True):
    torch.manual_seed(0)
    net = config.build(Port("tokens", (32,), V), Port("tokens", (32,), V), "continues").eval()
    for p in net.parameters():  # as after some training: no zeros, no ones
        torch.nn.init.normal_(p, std=0.3)
    return net.double() if double else net


def norm(x, weight):
    size = math.sqrt(sum(u * u for u in x) / len(x) + torch.finfo(torch.float64).eps)
    return [w * v / size for v, w in zip(x, weight.tolist(), strict=True)]


def times(matrix, x):
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix.tolist()]


def by_hand(net, tokens):
    """The logits of one row, from the formulas of the papers, a number at a time: rotary places as turns of complex numbers."""
    x, D = [net.embed.weight[t].tolist() for t in tokens], 8
    for block in net.blocks:
        qkv = [times(block.qkv.weight, norm(row, block.norm1.weight)) for row in x]
        seen = [[] for _row in x]
        for head in range(2):
            q, k, v = ([row[part * 16 + head * D : part * 16 + (head + 1) * D] for row in qkv] for part in range(3))
            turn = lambda rows: [  # noqa: E731
                [complex(r[i], r[i + 4]) * cmath.exp(1j * p * 10000 ** (-2 * i / D)) for i in range(4)] for p, r in enumerate(rows)
            ]
            q, k = turn(q), turn(k)
            for t in range(len(x)):
                scores = [sum((a * b.conjugate()).real for a, b in zip(q[t], k[s], strict=True)) / math.sqrt(D) for s in range(t + 1)]
                shares = [math.exp(s) for s in scores]
                seen[t] += [sum(w * v[s][i] for s, w in enumerate(shares)) / sum(shares) for i in range(D)]
        x = [[a + b for a, b in zip(row, times(block.out.weight, s), strict=True)] for row, s in zip(x, seen, strict=True)]
        up = [[max(h, 0) ** 2 for h in times(block.up.weight, norm(row, block.norm2.weight))] for row in x]
        x = [[a + b for a, b in zip(row, times(block.down.weight, h), strict=True)] for row, h in zip(x, up, strict=True)]
    return torch.tensor([times(net.embed.weight, norm(row, net.norm.weight)) for row in x], dtype=torch.float64)


def test_equals_its_formulas_written_out():
    net = built()
    logits, carry = net(TOKENS[:1, :5])
    assert carry is None
    torch.testing.assert_close(logits[0], by_hand(net, TOKENS[0, :5].tolist()), rtol=1e-5, atol=1e-5)  # angles are float32


def test_scores_depend_on_the_distance_of_two_places_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = lambda a, b: float((turned(q, rotation(torch.tensor([[a]]), 8)) * turned(k, rotation(torch.tensor([[b]]), 8))).sum())  # noqa: E731
    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4) and abs(score(9, 4) - score(9, 3)) > 1e-2
    assert score(3, 3) == pytest.approx(float((q * k).sum()), abs=1e-6)


def test_what_comes_later_changes_nothing_before():
    net, changed = built(), TOKENS.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    before, after = net(TOKENS)[0], net(changed)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-3


def test_a_row_is_the_same_in_another_batch():
    net = built(double=False)
    torch.testing.assert_close(net(TOKENS)[0][1:2], net(TOKENS[1:2])[0], rtol=1e-5, atol=1e-5)


def test_from_the_cache_it_says_what_it_says_at_once():
    net, wanted = built(), built()(TOKENS)[0]
    carry, said = net.start(3, 20), []
    for some in TOKENS.split([1, 4, 1, 3], 1):
        logits, carry = net(some, carry)
        said.append(logits)
    torch.testing.assert_close(torch.cat(said, 1), wanted, rtol=1e-10, atol=1e-10)
    assert carry["length"].tolist() == [T] * 3 and carry["k"].shape == (3, 2, 2, 20, 8)


def test_the_rows_of_a_cache_stand_for_themselves():
    """Rows first: they can be taken apart and put together, and each knows how far it is."""
    net, wanted = built(), built()(TOKENS)[0]
    _logits, carry = net(TOKENS, net.start(3, 12))
    mixed = {name: t[[2, 0]].clone() for name, t in carry.items()}
    mixed["length"] = torch.tensor([5, 7])  # as if the later tokens had not been given yet
    logits, mixed = net(torch.stack([TOKENS[2, 5:7], TOKENS[0, 7:9]]), mixed)
    torch.testing.assert_close(logits, torch.stack([wanted[2, 5:7], wanted[0, 7:9]]), rtol=1e-10, atol=1e-10)
    assert mixed["length"].tolist() == [7, 9]


def test_a_cache_under_autocast_says_what_is_said_at_once():
    net = built(double=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted, carry, said = net(TOKENS)[0].float(), net.start(3, T), []
        assert carry["k"].dtype == torch.bfloat16
        for some in TOKENS.split(1, 1):
            logits, carry = net(some, carry)
            said.append(logits)
    torch.testing.assert_close(torch.cat(said, 1).float(), wanted, rtol=0.05, atol=0.5 * float(wanted.std()))


def test_attention_is_what_the_forward_pass_looks_with():
    net = built()
    looks = net.attention(TOKENS)
    assert looks.shape == (3, 2, 2, T, T) and not looks.triu(1).any()
    torch.testing.assert_close(looks.sum(-1), torch.ones(3, 2, 2, T, dtype=torch.float64))
    x = net.embed(TOKENS)
    for i, block in enumerate(net.blocks):  # with them the forward pass is made anew
        x = block.add(x, looks[:, i] @ block.look(x, rotation(torch.arange(T)[None], 8))[2])
    torch.testing.assert_close(F.linear(net.norm(x), net.embed.weight), net(TOKENS)[0], rtol=1e-10, atol=1e-10)


def test_parameters_are_those_of_the_formula_and_dropout_is_for_training():
    net = GptConfig(width=16, layers=3, heads=4, dropout=0.5).build(Port("tokens", (None,), V), Port("tokens", (None,), V), "continues")
    assert sum(p.numel() for p in net.parameters()) == V * 16 + 3 * (12 * 16 * 16 + 2 * 16) + 16
    assert net.context == 0 and not torch.equal(net(TOKENS)[0], net(TOKENS)[0])
    net.eval()
    assert torch.equal(net(TOKENS)[0], net(TOKENS)[0])


def test_it_learns_eight_rows_by_heart():
    torch.manual_seed(0)
    net = GptConfig(width=32, layers=2, heads=2).build(Port("tokens", (32,), V), Port("tokens", (32,), V), "continues")
    rows = torch.randint(0, V, (8, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.0)
    for _step in range(45):
        loss = F.cross_entropy(net(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = net(rows[:, :-1])[0].argmax(2) == rows[:, 1:]
    assert right[:, 2:].float().mean() > 0.95  # the first tokens of two rows may be alike


@pytest.mark.parametrize("width, heads, fit", [(16, 5, "Choose 1, 2, 4, 8"), (15, 1, "Choose an even width")])
def test_heads_that_do_not_cut_the_width_are_refused(width, heads, fit):
    with pytest.raises(ValueError, match=f"net.heads = {heads} does not fit net.width = {width}. {fit}"):
        GptConfig(width=width, heads=heads).build(Port("tokens", (8,), V), Port("tokens", (8,), V), "continues")
