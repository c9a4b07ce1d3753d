"""Attention against torch's own layer with copied weights, its weights written out, and the marks of places by hand."""

import math

import pytest
import torch
from torch import nn

from cloche.nets.attention import MultiHead, attend, attention_weights, merge_heads, sinusoid, split_heads

B, T, S, H, C = 3, 5, 7, 4, 24
pytestmark = pytest.mark.usefixtures("one_thread")
REAL = torch.arange(S) < torch.tensor([7, 4, 1])[:, None]  # (B, S)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def copied(ours: MultiHead) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(C, H, batch_first=True).double()
    parts = [ours.q, ours.k, ours.v]
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (torch.cat([getattr(p, k).data for p in parts]) for k in ("weight", "bias"))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


@pytest.mark.parametrize("mask", [None, REAL], ids=["whole", "masked"])
def test_multi_head_equals_torchs_layer_with_the_same_weights(mask):
    torch.manual_seed(0)
    ours, x, memory = MultiHead(C, H).double(), drawn(B, T, C), drawn(B, S, C, seed=1)
    theirs, hidden = copied(ours), None if mask is None else ~mask
    wanted, weights = theirs(x, memory, memory, key_padding_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(ours(x, memory, mask), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attention_weights(split_heads(ours.q(x), H), ours.kv(memory)[0], mask), weights, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.look(x, ours.kv(memory), mask), wanted, rtol=1e-10, atol=1e-12)
    assert weights.std() > 0.01  # they do not all look everywhere alike


@pytest.mark.parametrize("mask", [None, REAL[:, :T]], ids=["whole", "masked"])
def test_causal_multi_head_equals_torchs_layer_under_a_square_mask(mask):
    torch.manual_seed(0)
    ours, x = MultiHead(C, H).double(), drawn(B, T, C)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    wanted = copied(ours)(x, x, x, attn_mask=future, key_padding_mask=None if mask is None else ~mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x, x, mask, causal=True), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attend_is_the_weights_times_the_values(causal):
    q, k, v = drawn(B, H, T, 6), drawn(B, H, T, 6, seed=1), drawn(B, H, T, 6, seed=2)
    for mask in (None, REAL[:, :T], torch.ones(T, T, dtype=torch.bool).tril()[None, None]):
        weights = attention_weights(q, k, mask, causal)
        torch.testing.assert_close(attend(q, k, v, mask, causal), weights @ v)
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    assert not torch.allclose(attend(q, k, v, None, causal), attend(q, k, v, REAL[:, :T], causal))


def test_by_hand_two_keys_and_one_query():
    q, k = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, 5.0], [0.0, 5.0]]]])
    first = 1 / (1 + math.exp(-2 / math.sqrt(2)))  # scores 2/√2 and 0
    torch.testing.assert_close(attention_weights(q, k), torch.tensor([[[[first, 1 - first]]]]))
    torch.testing.assert_close(attend(q, k, torch.tensor([[[[1.0], [0.0]]]])), torch.tensor([[[[first]]]]))


def test_heads_are_consecutive_slices_of_the_width():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    assert split_heads(x, 4)[1, 2, 0].tolist() == x[1, 0, 4:6].tolist()
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


def test_sinusoid_by_hand():
    marks = sinusoid(50, 6)
    for place in (0, 1, 49):
        for i in range(3):
            angle = place / 10000 ** (2 * i / 6)
            assert marks[place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert marks[place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert sinusoid(4, 5).shape == (4, 5)  # odd widths too
