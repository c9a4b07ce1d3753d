"""What the counter of operations sees: recurrent layers and attention against counts by hand, forward and backward."""

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from cloche.data.chunk import Chunk
from cloche.training.speed import counter, flops_of

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(forward, *given):
    """Operations of the forward pass, and of the backward pass behind it."""
    with counter() as seen:
        out = forward(*given)
        ahead = seen.get_total_flops()
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    return ahead, seen.get_total_flops() - ahead


@pytest.mark.parametrize("layers, both", [(1, False), (2, False), (1, True), (3, True)])
@pytest.mark.parametrize("first", [False, True], ids=["(T, B, C)", "(B, T, C)"])
def test_an_lstm_by_hand(layers, both, first):
    """A token of a layer: four gates of width 7, each from what comes in and from the state of width 7. B = 3, T = 11, 5 come in."""
    torch.manual_seed(0)
    net = nn.LSTM(5, 7, layers, batch_first=first, bidirectional=both)
    x = torch.randn(3, 11, 5) if first else torch.randn(11, 3, 5)
    ways = 1 + both
    wanted = sum(ways * 2 * 3 * 11 * 4 * 7 * ((5 if n == 0 else 7 * ways) + 7) for n in range(layers))
    assert counted(net, x) == (wanted, 2 * wanted)


@pytest.mark.parametrize("s", [6, 9])
@pytest.mark.parametrize("masked", [None, "causal", "mask"])
def test_attention_by_hand(s, masked):
    """B = 2 sequences, 3 heads of width 8: 6 queries look at s keys, in two products; each of the two has two in the backward pass."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (6, s, s))
    more = {None: {}, "causal": {"is_causal": True}, "mask": {"attn_mask": torch.ones(6, s, dtype=torch.bool)}}[masked]
    one = 2 * 2 * 3 * 6 * s * 8  # a product of (6, 8) and (8, s), or of (6, s) and (s, 8)
    assert counted(lambda *given: F.scaled_dot_product_attention(*given, **more), q, k, v) == (2 * one, 4 * one)


def test_the_kernels_and_the_written_out_products_count_alike():
    """The same attention in two matrix products, which PyTorch's own counter knows."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (6, 9, 9))
    by_hand = lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v  # noqa: E731
    assert counted(by_hand, q, k, v) == counted(F.scaled_dot_product_attention, q, k, v)
    torch.testing.assert_close(by_hand(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_row_costs_the_share_of_its_chunk():
    """An LSTM, attention over its states and a dense layer, trained for one step on four rows: a third of it forwards."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            y = self.cells(x)[0][:, None]  # (B, 1, T, 8)
            return self.head(F.scaled_dot_product_attention(y, y, y)[:, 0])

    class Sums:
        def loss(self, nets, chunk, carry):
            return nets["net"](chunk.data["frames"]).sum(), None, {}

    torch.manual_seed(0)
    net, rows = Net(), torch.arange(4)
    chunk = Chunk({"frames": torch.randn(4, 11, 5)}, rows, rows, torch.ones(4), torch.tensor(0), True)
    before = torch.get_rng_state()
    found = flops_of({"net": net}, Sums(), chunk)
    assert found == 3 * (2 * 11 * 4 * 8 * (5 + 8) + 2 * 2 * 11 * 11 * 8 + 2 * 11 * 8 * 2)
    assert all(p.grad is None for p in net.parameters())  # a copy was asked
    assert torch.equal(torch.get_rng_state(), before)
