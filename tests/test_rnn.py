"""Recurrent nets: cells equal torch's own with copied weights, written-out gates equal the kernels, padding and halves change nothing."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.nets.rnn import Cells, RnnConfig, turned
from cloche.nets.seq2seq import Seq2seqConfig
from cloche.use.explain.inside import frames, gradient

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
SOUND, LETTERS = Port("series", (None, 5)), Port("tokens", (None,), 7)


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


def made(kind, face, inputs, outputs, **keys):
    return RnnConfig(kind=kind, width=6, **keys).build(inputs, outputs, face).double().eval()


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cells_equal_torchs_with_copied_weights(kind, both):
    torchs = KINDS[kind](5, 6, 2, batch_first=True, bidirectional=both).double()
    ours, x = Cells(kind, 5, 6, 2, both).double(), torch.randn(3, 9, 5).double()
    for n in range(2):
        for cells, end in ((ours.ahead, ""), (ours.back, "_reverse")):
            for name, p in cells[n].named_parameters() if len(cells) else ():
                p.data.copy_(getattr(torchs, name.replace("_l0", f"_l{n}") + end))
    (y, last), (z, carry) = torchs(x), ours(x)
    assert_close(z, y, rtol=0, atol=1e-14)
    for k, h in zip(ours.names, last if kind == "lstm" else [last], strict=True):
        assert_close(carry[k], h.unflatten(0, (2, -1))[:, 0].transpose(0, 1), rtol=0, atol=1e-14)  # of the cells that read from the front


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_written_out_gates_equal_the_kernels(kind, both):
    cells, x = Cells(kind, 5, 6, 3, both).double(), torch.randn(3, 9, 5).double()
    layers = cells.gates(x)
    assert len(layers) == 3
    assert_close(layers[-1]["state"], cells(x)[0][..., :6], rtol=0, atol=1e-14)
    if kind != "rnn":
        assert {"lstm": {"input", "forget", "output"}, "gru": {"reset", "update"}}[kind] < set(layers[0])


def test_a_step_of_each_cell_by_hand():
    """One number in, one in the state, all weights 1 and biases 0, but the LSTM's forget bias 1: x = 1 from zeros, then x = 0."""
    s, t = (lambda v: 1 / (1 + math.exp(-v))), math.tanh
    first = {"rnn": t(1.0), "lstm": s(1.0) * t(s(1.0) * t(1.0)), "gru": (1 - s(1.0)) * t(1.0)}
    h, c = first["lstm"], s(1.0) * t(1.0)
    c = s(h + 1) * c + s(h) * t(h)
    g = first["gru"]
    second = {"rnn": t(t(1.0)), "lstm": s(h) * t(c), "gru": (1 - s(g)) * t(s(g) * g) + s(g) * g}
    for kind in KINDS:
        cells = Cells(kind, 1, 1).double()
        for name, p in cells.ahead[0].named_parameters():
            nn.init.constant_(p, float("weight" in name))
        if kind == "lstm":
            cells.ahead[0].bias_ih_l0.data[1] = 1
        found = cells(torch.tensor([[[1.0], [0.0]]]).double())[0].flatten().tolist()
        assert found == pytest.approx([first[kind], second[kind]], abs=1e-12)


def test_an_lstm_begins_by_remembering():
    bias = Cells("lstm", 4, 8).ahead[0].bias_ih_l0
    assert bias[8:16].tolist() == [1.0] * 8 and bias[:8].abs().max() < 0.36


def test_turned_leaves_the_padding_where_it_is():
    x = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])[..., None]
    assert turned(x, torch.tensor([3, 4]))[..., 0].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_what_stands_in_the_padding_changes_nothing(kind, stack):
    net = made(kind, "streams", SOUND, LETTERS, both=True, layers=2, stack=stack)
    x, n = torch.randn(3, 16, 5).double(), torch.tensor([16, 7, 1])
    y, steps = net(x, n)
    assert steps.tolist() == [-(-v // stack) for v in (16, 7, 1)] and y.shape[1] >= steps.max()
    other = x.clone()
    other[1, 7:], other[2, 1:] = 99.0, float("nan")
    assert_close(net(other, n)[0], y, rtol=0, atol=0)
    for row, (length, step) in enumerate(zip(n.tolist(), steps.tolist(), strict=True)):  # and a row alone, without any padding
        alone, _steps = net(x[row : row + 1, :length], torch.tensor([length]))
        assert_close(alone[0, :step], y[row, :step], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_continues_two_halves_equal_the_whole(kind):
    net = made(kind, "continues", LETTERS, LETTERS, layers=2)
    tokens = torch.randint(7, (3, 10))
    whole, end = net(tokens)
    first, carry = net(tokens[:, :4])
    second, carry = net(tokens[:, 4:], carry)
    assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-13)
    assert_close(carry, end, rtol=0, atol=1e-13)
    assert {k: tuple(v.shape) for k, v in carry.items()} == dict.fromkeys(net.cells.names, (3, 2, 6))
    assert_close(net(tokens, net.start(3, 0))[0], whole, rtol=0, atol=0)
    assert (net(tokens[:, 4:])[0] - second).abs().max() > 1e-3  # the carry matters


@pytest.mark.parametrize("kind", KINDS)
def test_continues_is_causal(kind):
    net, tokens = made(kind, "continues", LETTERS, LETTERS), torch.randint(7, (2, 8))
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 7
    assert_close(net(other)[0][:, :5], net(tokens)[0][:, :5], rtol=0, atol=0)


def test_maps_reads_a_picture_row_by_row():
    net = made("lstm", "maps", Port("image", (2, 4, 3)), Port("vector", (5,)), both=True)
    x = torch.randn(3, 2, 4, 3).double()
    rows = torch.stack([torch.cat([x[:, 0, i], x[:, 1, i]], 1) for i in range(4)], 1)  # (B, h, C·w)
    ahead, back = net.cells.ahead[0](rows)[0][:, -1], net.cells.back[0](rows.flip(1))[0][:, -1]
    assert_close(net(x), net.head(torch.cat([ahead, back], 1)), rtol=0, atol=1e-14)


def test_maps_gives_the_shape_that_is_asked_for():
    assert made("gru", "maps", Port("series", (12, 2)), Port("series", (4, 2)))(torch.randn(3, 12, 2).double()).shape == (3, 4, 2)
    assert made("rnn", "maps", Port("vector", (6,)), Port("vector", (2,)))(torch.randn(3, 6).double()).shape == (3, 2)


@pytest.mark.parametrize("face, keys, found", [("continues", {"both": True}, "net.both"), ("maps", {"stack": 4}, "net.stack = 4")])
def test_a_key_without_meaning_is_refused(face, keys, found):
    with pytest.raises(ValueError, match=found):
        made("gru", face, LETTERS, LETTERS, **keys)


# --- encoder and decoder ---------------------------------------------------------------------------------------------------------


def pairs():
    net = Seq2seqConfig(width=8).build(Port("tokens", (None,), 9), LETTERS, "pairs").double().eval()
    return net, torch.randint(1, 9, (3, 8)), torch.tensor([8, 5, 1]), torch.randint(7, (3, 6))


def test_seq2seq_padding_changes_nothing():
    net, source, n, target = pairs()
    y, other = net(source, n, target), source.clone()
    other[1, 5:], other[2, 1:] = 3, 4
    assert_close(net(other, n, target), y, rtol=0, atol=0)
    for row, length in enumerate(n.tolist()):
        assert_close(net(source[row : row + 1, :length], n[row : row + 1], target[row : row + 1])[0], y[row], rtol=0, atol=1e-13)


def test_seq2seq_token_by_token_equals_all_at_once():
    net, source, n, target = pairs()
    memory, found = net.encode(source, n), []
    carry = net.start(3, 6, memory)
    for t in range(6):
        logits, carry = net.decode(target[:, t : t + 1], memory, carry)
        found.append(logits)
    assert_close(torch.cat(found, 1), net(source, n, target), rtol=0, atol=1e-13)


def test_seq2seq_attention_by_hand():
    """softmax over the real places of sᵀ·W·memory, s the decoder's state."""
    net, source, n, target = pairs()
    weights, (memory, real) = net.attention(source, n, target), net.encode(source, n)
    assert weights.shape == (3, 1, 1, 6, 8) and real.tolist()[1] == [True] * 5 + [False] * 3
    h = torch.tanh(net.begin(memory[1, 0]))[None, None]  # the first state: (1, 1, C)
    state = net.decoder.ahead[0](net.embed_target(target[1:2]) * 8**0.5, h)[0][0]  # (U, C)
    wanted = torch.softmax(state @ (memory[1, :5] @ net.key.weight.T).T, -1)
    assert_close(weights[1, 0, 0, :, :5], wanted, rtol=0, atol=1e-13)
    assert weights[1, 0, 0, :, 5:].abs().max() == 0


# --- how far back a gradient reaches ---------------------------------------------------------------------------------------------


def test_gradient_against_the_distance():
    """The norms of the blocks of torch's own Jacobian; and through an LSTM that begins by remembering it reaches farther."""
    cells, x = Cells("gru", 3, 5).double(), torch.randn(1, 7, 3).double()
    whole = torch.autograd.functional.jacobian(lambda x: cells(x)[0][0, -1], x)[:, 0]  # (C, T, F)
    norms = whole.square().sum((0, 2)).sqrt().flip(0)
    assert gradient(cells, x) == pytest.approx((norms / norms[0]).tolist(), rel=1e-9)
    with torch.inference_mode(), torch.inference_mode(False):  # as the report calls it
        rnn, lstm = (gradient(Cells(kind, 3, 32), torch.randn(1, 30, 3)) for kind in ("rnn", "lstm"))
    assert lstm[29] > 100 * rnn[29] and rnn[0] == lstm[0] == 1


def test_frames_leave_the_padding_out():
    net = made("gru", "streams", SOUND, LETTERS, stack=2)
    ids = torch.arange(1)
    data = {"audio": torch.randn(1, 8, 5).double(), "audio_len": torch.tensor([5])}
    x = frames(net, Chunk(data, ids, ids, torch.ones(1), ids[0], False))
    assert x.shape == (1, 3, 10) and x[0, 2, 5:].abs().max() == 0
