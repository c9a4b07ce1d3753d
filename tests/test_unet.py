"""The U-Net and the reader of prompts: against torch's layers with copied weights in float64, and the laws of nets that denoise."""

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from cloche.config import Port
from cloche.nets.attention import sinusoid
from cloche.nets.textenc import TextencConfig
from cloche.nets.unet import Block, UnetConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = TextencConfig(width=12)
CONFIG = UnetConfig(width=16, mults=(1, 2), heads=2, dropout=0.0, text=TEXT)
IMAGE, TOKENS, MEMORY = Port("image", (1, 8, 8)), Port("tokens", (None,), 20), Port("memory", (None, None))


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def woken(net):
    """As after some training: no weight is zero."""
    for p in net.parameters():
        if p.ndim < 2 or not p.any():
            nn.init.normal_(p, std=0.3)
    return net.double().eval()


def built(config=CONFIG):
    torch.manual_seed(0)
    return woken(config.build(IMAGE, IMAGE, "denoises")), woken(config.text.build(TOKENS, MEMORY, "embeds"))


def given(rows=4):
    x = torch.randn(rows, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    level = torch.linspace(-6, 6, rows, dtype=torch.float64)
    tokens, lengths = torch.randint(4, 20, (rows, 8), generator=seeded(1)), torch.tensor([5, 0, 8, 2])[:rows]
    return x, level, tokens, lengths


def test_a_block_is_what_torchs_own_layers_make_of_it():
    torch.manual_seed(0)
    block = woken(Block(16, 24, CONFIG))
    x, level = torch.randn(3, 16, 4, 4, dtype=torch.float64), torch.randn(3, 64, dtype=torch.float64)
    memory, mask = torch.randn(3, 5, 12, dtype=torch.float64), torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    theirs = nn.MultiheadAttention(24, 2, batch_first=True).double()
    theirs.in_proj_weight.data = torch.cat([p.weight.data for p in (block.look.q, block.look.k, block.look.v)])
    theirs.in_proj_bias.data = torch.cat([p.bias.data for p in (block.look.q, block.look.k, block.look.v)])
    theirs.out_proj.load_state_dict(block.look.out.state_dict())

    y = F.conv2d(F.silu(F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = F.linear(level, block.level.weight, block.level.bias).view(3, 2, 24, 1, 1).unbind(1)
    y = F.conv2d(F.silu(F.group_norm(y, 3) * (1 + scale) + shift), block.conv2.weight, block.conv2.bias, padding=1)
    y = y + F.conv2d(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, level, None), y)
    places = F.group_norm(y, 3, block.norm3.weight, block.norm3.bias).permute(0, 2, 3, 1).reshape(3, 16, 24)
    prompt = F.linear(memory, block.prompt.weight, block.prompt.bias)
    seen = theirs(places, prompt, prompt, key_padding_mask=~mask)[0].reshape(3, 4, 4, 24).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x, level, (memory, mask)), y + seen)


def test_the_reader_of_prompts_is_torchs_encoder_with_a_vector_before():
    _net, text = built()
    _x, _level, tokens, lengths = given()
    layer, mine = nn.TransformerEncoderLayer(12, 2, 48, 0.0, norm_first=True, batch_first=True).double().eval(), text.layers[0]
    layer.self_attn.in_proj_weight.data = torch.cat([p.weight.data for p in (mine.own.q, mine.own.k, mine.own.v)])
    layer.self_attn.in_proj_bias.data = torch.cat([p.bias.data for p in (mine.own.q, mine.own.k, mine.own.v)])
    for ours, other in (("own.out", "self_attn.out_proj"), ("norm1", "norm1"), ("norm3", "norm2"), ("up", "linear1"), ("down", "linear2")):
        layer.get_submodule(other).load_state_dict(mine.get_submodule(ours).state_dict())
    memory, mask = text(tokens, lengths)
    x = torch.cat([text.empty.expand(4, 1, 12), text.embed(tokens)], 1) + sinusoid(9, 12)
    torch.testing.assert_close(
        memory[mask], F.layer_norm(layer(x, src_key_padding_mask=~mask), (12,), text.norm.weight, text.norm.bias)[mask]
    )
    assert mask.sum(1).tolist() == [6, 1, 9, 3]


def test_the_empty_prompt_is_a_learned_vector_with_finite_numbers():
    net, text = built()
    x, level, tokens, lengths = given()
    out = net(x, level, text(tokens, lengths))
    assert torch.isfinite(out).all()
    alone = net(x[1:2], level[1:2], text(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([0])))
    torch.testing.assert_close(alone, out[1:2])
    out[1].sum().backward()
    assert text.empty.grad.abs().sum() > 0 and not text.embed.weight.grad.any()


def test_neither_padding_nor_other_rows_matter():
    net, text = built()
    x, level, tokens, lengths = given()
    out = net(x, level, text(tokens, lengths))
    other = torch.where(torch.arange(8) < lengths[:, None], tokens, 3)
    torch.testing.assert_close(net(x, level, text(F.pad(other, (0, 8)), lengths)), out)
    for i in range(4):
        torch.testing.assert_close(net(x[i : i + 1], level[i : i + 1], text(tokens[i : i + 1], lengths[i : i + 1])), out[i : i + 1])


def test_picture_level_and_prompt_all_matter_and_the_prompt_may_be_absent():
    net, text = built()
    x, level, tokens, lengths = given()
    out, bare = net(x, level, text(tokens, lengths)), net(x, level)
    assert out.shape == bare.shape == x.shape
    for other in (net(-x, level, text(tokens, lengths)), net(x, level + 1, text(tokens, lengths)), bare):
        assert ((out - other).abs().amax((1, 2, 3)) > 1e-3).all()
    assert (out - net(x, level, text(tokens + 1 - 2 * (tokens > 18), lengths))).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [1, 0, 1, 1]


def test_untrained_it_predicts_nothing():
    net = CONFIG.build(IMAGE, IMAGE, "denoises")
    assert not net(torch.randn(2, 1, 8, 8), torch.zeros(2)).any()


@pytest.mark.parametrize("key, value", [("width", 24), ("mults", (1, 1)), ("mults", (1, 2, 2)), ("text", TextencConfig(width=8))])
def test_each_key_makes_another_net(key, value):
    count = [
        sum(p.numel() for net in built(CONFIG.model_copy(update={k: v})) for p in net.parameters()) for k, v in ((key, value), ("heads", 2))
    ]
    assert count[0] != count[1]


def test_heads_dropout_and_layers_change_what_comes_out():
    x, level, tokens, lengths = given()
    outs = []
    for update in ({}, {"heads": 4}, {"dropout": 0.5}, {"text": TextencConfig(width=12, layers=2)}):
        net, text = built(CONFIG.model_copy(update=update))
        outs.append(net.train()(x, level, text(tokens, lengths)))
    assert all(not torch.allclose(outs[0], out) for out in outs[1:])


def test_keys_that_cannot_be_are_refused():
    six = Port("image", (1, 6, 6))
    with pytest.raises(ValueError, match="3 stages halve the side 2 times; 6 pixels"):
        CONFIG.model_copy(update={"mults": (1, 2, 2)}).build(six, six, "denoises")
    with pytest.raises(ValueError, match="heads = 5 does not fit net.width = 16"):
        CONFIG.model_copy(update={"heads": 5}).build(IMAGE, IMAGE, "denoises")
