"""The encoder–decoder transformer against torch.nn.Transformer with copied weights, and the laws of a net for pairs."""

import pytest
import torch
from torch import nn

from cloche.config import Port
from cloche.nets.attention import sinusoid
from cloche.nets.transformer import TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")
V, U = 11, 9  # source and target vocabulary
CONFIG = TransformerConfig(width=16, layers=2, heads=4, dropout=0.0)
SOURCE = torch.randint(3, V, (4, 7), generator=torch.Generator().manual_seed(0))
LENGTH = torch.tensor([7, 3, 5, 1])
TARGET = torch.randint(3, U, (4, 6), generator=torch.Generator().manual_seed(1))


def built(config=CONFIG, double=True):
    torch.manual_seed(0)
    net = config.build(Port("tokens", (None,), V), Port("tokens", (None,), U), "pairs").eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.LayerNorm)):  # as after some training, not 1 and 0
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return net.double() if double else net


def copied(net) -> nn.Transformer:
    theirs = nn.Transformer(16, 4, 2, 2, 64, dropout=0.0, norm_first=True, batch_first=True).double().eval()
    looks = {"own": "self_attn", "cross": "multihead_attn"}
    for mine, other in ((net.encoder, theirs.encoder.layers), (net.decoder, theirs.decoder.layers)):
        for a, b in zip(mine, other, strict=True):
            for name in (n for n in looks if hasattr(a, n)):
                ours, to = getattr(a, name), getattr(b, looks[name])
                to.in_proj_weight.data = torch.cat([p.weight.data for p in (ours.q, ours.k, ours.v)])
                to.in_proj_bias.data = torch.cat([p.bias.data for p in (ours.q, ours.k, ours.v)])
                to.out_proj.load_state_dict(ours.out.state_dict())
            norms = [a.norm1, a.norm2, a.norm3] if hasattr(a, "cross") else [a.norm1, a.norm3]
            for i, norm in enumerate(norms, 1):
                getattr(b, f"norm{i}").load_state_dict(norm.state_dict())
            b.linear1.load_state_dict(a.up.state_dict())
            b.linear2.load_state_dict(a.down.state_dict())
    theirs.encoder.norm.load_state_dict(net.norm_source.state_dict())
    theirs.decoder.norm.load_state_dict(net.norm_target.state_dict())
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch tells that its own shortcut is off
def test_equals_torchs_transformer_with_the_same_weights():
    net, hidden = built(), torch.arange(7) >= LENGTH[:, None]
    x, y = net.embed_source(SOURCE) + sinusoid(7, 16), net.embed_target(TARGET) + sinusoid(6, 16)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    out = copied(net)(x, y, tgt_mask=future, src_key_padding_mask=hidden, memory_key_padding_mask=hidden, tgt_is_causal=True)
    torch.testing.assert_close(net(SOURCE, LENGTH, TARGET), net.head(out), rtol=1e-10, atol=1e-10)


def test_without_places_the_encoder_can_not_tell_order_and_with_them_it_can():
    net, order = built(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    whole, mask = torch.full((4,), 7), torch.ones(4, 7, dtype=torch.bool)
    x = net.embed_source(SOURCE)
    torch.testing.assert_close(net.read(x[:, order], mask), net.read(x, mask)[:, order], rtol=1e-10, atol=1e-10)
    told, mixed = net.encode(SOURCE, whole)[0], net.encode(SOURCE[:, order], whole)[0]
    assert (mixed - told[:, order]).abs().max() > 0.1


def test_one_token_at_a_time_from_the_cache_equals_all_at_once():
    net = built()
    memory = net.encode(SOURCE, LENGTH)
    wanted, carry, said = net.decode(TARGET, memory)[0], net.start(4, 8, memory), []
    for part in TARGET.split([1, 2, 1, 2], 1):
        logits, carry = net.decode(part, memory, carry)
        said.append(logits)
    torch.testing.assert_close(torch.cat(said, 1), wanted, rtol=1e-10, atol=1e-10)
    assert carry["length"].tolist() == [6] * 4
    mixed = {name: t[[2, 0, 0, 1]] for name, t in carry.items()}  # rows first: what a beam does
    mixed["length"] = mixed["length"] - 1  # as if the last token had not been given yet
    chosen = tuple(t[[2, 0, 0, 1]] for t in memory)
    torch.testing.assert_close(net.decode(TARGET[[2, 0, 0, 1], 5:], chosen, mixed)[0][:, 0], wanted[[2, 0, 0, 1], 5])


def test_the_future_changes_nothing_past_and_padding_changes_nothing():
    net = built()
    logits, other = net(SOURCE, LENGTH, TARGET), TARGET.clone()
    other[:, 4:] = 3 + (other[:, 4:] - 2) % (U - 3)
    torch.testing.assert_close(net(SOURCE, LENGTH, other)[:, :4], logits[:, :4])
    assert (net(SOURCE, LENGTH, other)[:, 4:] - logits[:, 4:]).abs().max() > 0.01
    wider = torch.cat([torch.where(torch.arange(7) < LENGTH[:, None], SOURCE, 5), torch.full((4, 9), 4)], 1)
    torch.testing.assert_close(net(wider, LENGTH, TARGET), logits)


def test_the_alignment_sums_to_one_over_the_real_source():
    net = built()
    weights = net.attention(SOURCE, LENGTH, TARGET)
    assert weights.shape == (4, 2, 4, 6, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 4, 6, dtype=torch.float64))
    assert not weights[1, ..., 3:].any() and weights[1, ..., :3].std() > 0.01
    x = net._blocks(TARGET, net.encode(SOURCE, LENGTH), None)[1][1]  # the second block's own sum, written out
    layer, (memory, mask) = net.decoder[1], net.encode(SOURCE, LENGTH)
    v = layer.cross.kv(memory)[1]
    by_hand = x + layer.cross.out((weights[:, 1] @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer.read(x, layer.cross.kv(memory), mask), by_hand)


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"net.heads = 5 does not fit net.width = 12. Choose 1, 2, 3, 4, 6, 12"):
        TransformerConfig(width=12, heads=5).build(Port("tokens", (None,), V), Port("tokens", (None,), U), "pairs")


def test_dropout_drops_in_training_only():
    net = built(TransformerConfig(width=16, layers=1, heads=2, dropout=0.5), double=False)
    assert torch.equal(net(SOURCE, LENGTH, TARGET), net(SOURCE, LENGTH, TARGET))
    net.train()
    assert not torch.equal(net(SOURCE, LENGTH, TARGET), net(SOURCE, LENGTH, TARGET))
