"""The nets against torch's own layers with copied weights, the primer's ledger, and the laws that every net must pass."""

import tomllib

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from cloche import files
from cloche.config import Port
from cloche.nets.cnn import CnnConfig
from cloche.nets.mlp import MlpConfig
from cloche.nets.parts import ACTIVATIONS, BatchNorm, Dropout
from cloche.nets.resnet import Block, ResnetConfig
from cloche.recipe import change, find, parse

REFERENCE = {  # the same functions written by hand; softmax over the channels
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "softmax": lambda x: x.exp() / x.exp().sum(1, keepdim=True),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": lambda x: x / (1 + (-x).exp()),
}
SMALL = {
    "mlp": (MlpConfig(widths=(7, 5)), Port("vector", (4,))),
    "mlp norm": (MlpConfig(widths=(7, 5), norm="batch"), Port("vector", (4,))),
    "cnn": (CnnConfig(stages=((4, 6), (5,)), hidden=9), Port("image", (3, 12, 12))),
    "cnn norm": (CnnConfig(stages=((4, 6), (5,)), hidden=9, norm="batch"), Port("image", (3, 12, 12))),
    "resnet": (ResnetConfig(width=4, blocks=(1, 2)), Port("image", (3, 12, 12))),
}
one = torch.tensor(1.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def built(config, inputs, classes=3, seed=0, double=True):
    torch.manual_seed(seed)
    net = config.build(inputs, Port("vector", (classes,), classes), config.faces[0]).train()
    for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):  # as after some training, not 0 and 1
        for t in (norm.weight, norm.running_var):
            nn.init.uniform_(t, 0.5, 2)
        for t in (norm.bias, norm.running_mean):
            nn.init.normal_(t)
    return net.double() if double else net


def given(inputs, rows, seed=1, dtype=torch.float64):
    return torch.randn(rows, *inputs.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---- the ledger


@pytest.mark.parametrize(
    "name, sets, classes, total, ledger",
    [
        ("mnist", {}, 10, 9_536_074, {"conv1": 896, "conv2": 18_496, "conv3": 73_856, "fc1": 9_437_696, "fc2": 5_130}),
        ("digits", {}, 32, 9_547_360, {"conv1": 896, "conv2": 18_496, "conv3": 73_856, "fc1": 9_437_696, "fc2": 513 * 32}),
        ("digits", {}, 43, 9_553_003, {"conv1": 896, "conv2": 18_496, "conv3": 73_856, "fc1": 9_437_696, "fc2": 513 * 43}),
        ("digits", {"data.channels": 1}, 10, 9_535_498, {"conv1": 320, "conv2": 18_496, "conv3": 73_856, "fc1": 9_437_696, "fc2": 5_130}),
        ("primer-walkthrough", {}, 10, 18_899_402, {"conv1": 896, "conv2": 18_496, "fc1": 18_874_880, "fc2": 5_130}),
    ],
)
def test_the_built_net_has_the_parameters_of_the_primers_ledger(name, sets, classes, total, ledger):
    raw = find(name, None)[1]
    recipe = parse(change(raw, {"data.source": "digits", **sets}))
    with torch.device("meta"):
        net = recipe.net.build(
            Port("image", (recipe.data.channels, recipe.data.pixels, recipe.data.pixels)), Port("vector", (classes,), classes), "maps"
        )
    assert {
        layer: sum(p.numel() for p in module.parameters()) for layer, module in net.named_children() if list(module.parameters())
    } == ledger
    assert sum(p.numel() for p in net.parameters()) == total == sum(ledger.values())
    assert net(torch.zeros(2, recipe.data.channels, 48, 48, device="meta")).shape == (2, classes)


def test_the_shipped_recipe_of_the_primer_says_its_job():
    raw = find("mnist", None)[1]
    assert raw["train"] == {"epochs": 5, "batch": 64, "select": "last"}
    assert raw["optim"] == {"kind": "adam", "lr": 1e-3, "weight_decay": 1e-4}
    assert raw["data"]["augment"] == {"rotate": 10.0, "brightness": 0.2, "contrast": 0.2}
    assert tomllib.loads(parse(change(raw, {"data.source": "digits"})).toml())["net"]["stages"] == [[32, 64], [128]]


# ---- forward passes


def by_hand_cnn(net, config, x, training):
    """The same net in torch.nn.functional, from the built net's weights."""
    act, n = REFERENCE[config.activation], 0
    for stage in config.stages:
        for _width in stage:
            n += 1
            conv = getattr(net, f"conv{n}")
            x = F.conv2d(x, conv.weight, conv.bias, config.stride, config.kernel // 2 if config.padding == "same" else config.padding)
            if config.norm == "batch":
                norm = getattr(net, f"norm{n}")
                x = F.batch_norm(x, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, training)
            x = act(x)
        x = (F.max_pool2d if config.pool == "max" else F.avg_pool2d)(x, 2)
    return F.linear(act(F.linear(x.flatten(1), net.fc1.weight, net.fc1.bias)), net.fc2.weight, net.fc2.bias)


CNNS = [
    *({"activation": a} for a in ACTIVATIONS),
    {"norm": "batch"},
    {"norm": "batch", "pool": "average", "activation": "tanh"},
    {"pool": "average"},
    {"kernel": 5, "padding": 0},
    {"kernel": 5, "padding": 3, "stride": 2},
    {"kernel": 1, "stride": 2, "stages": ((8,),)},
    {"stages": ((4,), (5, 6), (7,)), "pool": "average", "norm": "batch"},
]


@pytest.mark.parametrize("keys", CNNS, ids=lambda k: " ".join(f"{a}={b}" for a, b in k.items()))
@pytest.mark.parametrize("training", [False, True])
def test_cnn_equals_torchs_functions_with_the_same_weights(keys, training):
    config, inputs = CnnConfig(**{"stages": ((4, 6), (5,)), "hidden": 9, "dropout": 0.0, **keys}), Port("image", (3, 24, 24))
    net, x = built(config, inputs).train(training), given(inputs, 5)
    wanted = by_hand_cnn(net, config, x, training)
    torch.testing.assert_close(net(x), wanted, rtol=1e-10, atol=1e-10)
    assert wanted.std() > 1e-4  # the rows differ: nothing is compared with itself by accident


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_mlp_equals_a_sequential_with_the_same_weights(activation, norm, training):
    inputs = Port("image", (2, 3, 4))
    net = built(MlpConfig(widths=(7, 5), activation=activation, norm=norm), inputs)
    layers = [nn.Flatten()]
    for i, (a, b) in enumerate([(24, 7), (7, 5)], 1):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm == "batch" else []), ACTIVATIONS[activation]()]
        layers[-1 - (norm == "batch") - 1].load_state_dict(getattr(net, f"fc{i}").state_dict())
        if norm == "batch":
            layers[-2].load_state_dict(getattr(net, f"norm{i}").state_dict(), strict=False)
    last = nn.Linear(5, 3)
    last.load_state_dict(net.fc3.state_dict())
    reference = nn.Sequential(*layers, last).double().train(training)
    x = given(inputs, 6)
    torch.testing.assert_close(net.train(training)(x), reference(x), rtol=1e-10, atol=1e-10)


def torchs_block(before, after, stride):
    """The basic block of the paper's table 1 in torch's own layers: the branch, and the shortcut (option B)."""
    branch = nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
        nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
    )  # fmt: skip
    short = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)] if before != after else []
    return branch, nn.Sequential(*short)


def torchs_resnet(net, x, widths, training):
    """The same net in torch's layers with the same weights, taken in the order in which they are used."""
    mine = {id(m) for b in net.blocks for m in b.short.modules()}
    main = [m for m in net.modules() if isinstance(m, nn.Conv2d | BatchNorm) and id(m) not in mine]

    def filled(layers, given):
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.load_state_dict(next(given).state_dict(), strict=False)
        return layers.double().train(training)

    own, before = iter(main), widths[0]
    x = filled(nn.Sequential(nn.Conv2d(x.shape[1], before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU()), own)(x)
    for block, width in zip(net.blocks, widths, strict=True):
        branch, short = torchs_block(before, width, 1 if width == before else 2)
        shorts = iter([m for m in block.short.modules() if isinstance(m, nn.Conv2d | BatchNorm)])
        x, before = F.relu(filled(branch, own)(x) + filled(short, shorts)(x)), width
    return F.linear(x.mean((2, 3)), net.head.weight, net.head.bias)


@pytest.mark.parametrize("side", [8, 13])
@pytest.mark.parametrize("training", [False, True])
def test_resnet_equals_torchs_layers_with_the_same_weights(side, training):
    inputs = Port("image", (3, side, side))
    net, x = built(ResnetConfig(width=4, blocks=(1, 2, 1)), inputs).train(training), given(inputs, 5)
    wanted = torchs_resnet(net, x, (4, 8, 8, 16), training)
    torch.testing.assert_close(net(x), wanted, rtol=1e-10, atol=1e-10)
    assert wanted.std() > 1e-4
    assert net(given(Port("image", (3, 11, 9)), 5)).shape == (5, 3)  # any other side


def test_a_residual_block_begins_by_adding_nothing():
    x = torch.rand(4, 6, 9, 9)
    assert torch.equal(Block(6, 6, 1)(x.clone()), x)  # nothing below zero for the relu to take


def test_a_resnet_of_seven_pixels_is_refused():
    with pytest.raises(ValueError, match="8 pixels a side and more, these have 7"):
        built(ResnetConfig(), Port("image", (1, 7, 7)))


def test_a_perceptron_without_hidden_layers_is_one_linear_map():
    net = built(MlpConfig(widths=()), Port("vector", (4,)))
    x = given(Port("vector", (4,)), 5)
    torch.testing.assert_close(net(x), x @ net.fc1.weight.T + net.fc1.bias)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formula_and_softmax_sums_to_one_over_the_channels(name):
    for shape in ((5, 7), (5, 7, 3, 4)):
        x = torch.randn(shape, dtype=torch.float64) * 3
        y = ACTIVATIONS[name]()(x)
        torch.testing.assert_close(y, REFERENCE[name](x), rtol=1e-12, atol=1e-12)
        if name == "softmax":
            torch.testing.assert_close(y.sum(1), torch.ones_like(x[:, 0]))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_same_padding_keeps_the_side_at_stride_1(kernel):
    config, inputs = CnnConfig(stages=((4,),), kernel=kernel, hidden=8, dropout=0.0), Port("image", (3, 8, 8))
    net, x, seen = built(config, inputs), given(inputs, 2), []
    net.conv1.register_forward_hook(lambda _m, _i, y: seen.append(y))
    net(x)
    assert seen[0].shape[2:] == (8, 8)
    if kernel % 2:  # where the middle of the stamp is a pixel, there is one way
        torch.testing.assert_close(seen[0], F.conv2d(x, net.conv1.weight, net.conv1.bias, padding="same"))


# ---- training and evaluation mode


@pytest.mark.parametrize(
    "config, inputs",
    [(MlpConfig(widths=(64, 64), dropout=0.4), Port("vector", (4,))), (CnnConfig(stages=((8,),)), Port("image", (1, 8, 8)))],
    ids=["mlp", "cnn"],
)
def test_dropout_is_off_in_evaluation_and_drops_its_share_in_training(config, inputs):
    net, x = built(config, inputs), given(inputs, 50)
    dropped = {}
    for module in (m for m in net.modules() if isinstance(m, nn.Dropout)):
        module.register_forward_hook(lambda m, i, y: dropped.setdefault(m, []).append((i[0], y)))
    torch.manual_seed(3)
    a = net(x)
    assert sum(map(len, dropped.values())) == 2  # before each dense layer of the cnn, after each hidden one of the mlp
    assert not torch.equal(a, net(x))
    torch.manual_seed(3)
    assert torch.equal(a, net(x))
    for before, after in (pair for pairs in dropped.values() for pair in pairs):
        alive = before != 0
        assert abs((after[alive] == 0).double().mean() - config.dropout) < 0.03
        kept = after != 0
        torch.testing.assert_close(after[kept], before[kept] / (1 - config.dropout))
    net.eval()
    torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)
    by_hand = type(config)(**{**config.model_dump(), "dropout": 0.0}).build(inputs, Port("vector", (3,), 3), "maps").double()
    by_hand.load_state_dict(net.state_dict())
    assert torch.equal(net(x), by_hand(x))


@pytest.mark.parametrize("name", SMALL)
def test_a_rows_answer_does_not_depend_on_the_rows_beside_it(name):
    config, inputs = SMALL[name]
    net, x = built(config, inputs, double=False).eval(), given(inputs, 37, dtype=torch.float32)
    together = net(x)
    for rows in ([5], [5, 0], [36, 5, 5, 2], list(range(36, -1, -1))):
        torch.testing.assert_close(net(x[rows]), together[rows], rtol=1e-5, atol=1e-5)
    beside = x.clone()
    beside[:5], beside[6:] = 100.0, -100.0
    torch.testing.assert_close(net(beside)[5], together[5], rtol=1e-5, atol=1e-5)


# ---- batch normalisation


@pytest.mark.parametrize("shape", [(6,), (6, 5, 3)])
def test_batch_norm_equals_torchs_outputs_gradients_and_running_statistics_over_several_steps(shape):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6), (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(6)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.uniform_(0.5, 2))
        ours.bias.copy_(theirs.bias.normal_())
    for step in range(5):
        x = torch.randn(4 + step, *shape) * (1 + step) + 3 * step
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(mine), theirs(other)
        y.square().sum().backward()
        z.square().sum().backward()
        ours.commit(one)
        torch.testing.assert_close(
            (y, mine.grad, ours.weight.grad, ours.bias.grad), (z, other.grad, theirs.weight.grad, theirs.bias.grad), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close((ours.running_mean, ours.running_var), (theirs.running_mean, theirs.running_var), rtol=1e-6, atol=1e-6)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 5, 3)])
def test_fillers_never_enter_batch_norm(shape):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6), (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(6)
    for real in (4, 2, 7):
        x = torch.randn(8, *shape) * 3 + 5
        x[real:] = 1e4
        mine, other = x.clone().requires_grad_(), x[:real].clone().requires_grad_()
        ours.rows = (torch.arange(8) < real).float()
        y, z = ours(mine), theirs(other)
        y[:real].square().sum().backward()
        z.square().sum().backward()
        ours.commit(one)
        torch.testing.assert_close(
            (y[:real], mine.grad[:real], ours.weight.grad), (z, other.grad, theirs.weight.grad), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close((ours.running_mean, ours.running_var), (theirs.running_mean, theirs.running_var), rtol=1e-5, atol=1e-5)
        assert not mine.grad[real:].any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_batch_norm_sums_its_statistics_in_its_own_format(kind):
    """Rows in bf16 give float32 statistics of the rounded rows; a net in float64 those of float64."""
    x = (torch.randn(16, 3, 5, 4) * 3 + 5).to(kind)
    norm = BatchNorm(3).to(torch.float64 if kind == torch.float64 else torch.float32)
    assert norm(x).dtype == kind
    wanted = torch.stack([x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))])
    torch.testing.assert_close(norm.seen.double(), wanted, rtol=1e-5, atol=1e-5)
    assert norm.seen.dtype == norm.weight.dtype


def test_running_statistics_move_once_a_step_by_the_average_over_its_chunks():
    torch.manual_seed(0)
    norm, chunks = BatchNorm(3).double(), [torch.randn(n, 3, 2, 2, dtype=torch.float64) * n for n in (4, 6)]
    for chunk in chunks:
        norm(chunk)
        assert not norm.running_mean.any()  # nothing moves before the commit
    norm.commit(one)
    means, variances = ([f(c, (0, 2, 3)) for c in chunks] for f in (torch.mean, torch.var))
    torch.testing.assert_close(norm.running_mean, 0.1 * sum(means) / 2, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * sum(variances) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fault", [1.0, float("nan"), float("inf")])
def test_a_commit_without_leave_changes_nothing_and_forgets_the_step(fault):
    torch.manual_seed(0)
    norm, same = BatchNorm(3), BatchNorm(3)
    x, y = torch.randn(2, 8, 3)
    for n in (norm, same):
        n(x)
        n.commit(one)
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(y * fault)
    norm.commit(torch.tensor(0.0))
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    for n in (norm, same):  # the refused step left no trace in the next one
        n(y)
        n.commit(one)
    assert torch.equal(norm.running_mean, same.running_mean) and torch.equal(norm.running_var, same.running_var)


def test_a_commit_after_a_step_that_saw_nothing_changes_nothing():
    """A frozen net beside the trained one is in evaluation mode: its statistics stay."""
    norm = BatchNorm(3).eval()
    norm.running_mean.fill_(2.0)
    norm(torch.randn(4, 3))
    norm.commit(one)
    assert norm.running_mean.tolist() == [2.0] * 3
    assert norm.running_var.tolist() == [1.0] * 3


def test_one_value_a_channel_has_no_variance():
    norm = BatchNorm(3)
    with pytest.raises(ValueError, match="at least two values a channel; this chunk has one"):
        norm(torch.randn(1, 3))
    with pytest.raises(ValueError, match="at least two values a channel"):
        norm(torch.randn(1, 3, 1, 1))
    y = norm(torch.randn(1, 3, 1, 2))  # two places of one row are enough
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


def test_one_real_row_among_fillers_leaves_finite_statistics():
    norm = BatchNorm(3)
    norm.rows = torch.tensor([1.0, 0.0])
    norm(torch.randn(2, 3))
    norm.commit(one)
    assert torch.isfinite(norm.running_var).all()


# ---- locality, impossible nets


def test_a_shifted_picture_gives_shifted_maps_but_not_a_shifted_answer():
    config, inputs = CnnConfig(stages=((4, 6), (5,)), hidden=9), Port("image", (3, 48, 48))
    net, maps = built(config, inputs).eval(), {}
    for name in ("conv1", "conv2", "conv3", "pool2"):
        getattr(net, name).register_forward_hook(lambda _m, _i, y, name=name: maps.setdefault(name, []).append(y))
    x = torch.zeros(2, 3, 48, 48, dtype=torch.float64)
    x[:, :, 20:32, 20:32] = given(Port("image", (3, 12, 12)), 2)
    answers = net(x), net(x.roll((4, -4), (2, 3)))
    for name, by in {"conv1": 4, "conv2": 4, "conv3": 2, "pool2": 1}.items():
        inner = slice(by + 2, -by - 2)  # the border, where the padding is seen, stays where it is
        before, after = (y[:, :, inner, inner] for y in (maps[name][0].roll((by, -by), (2, 3)), maps[name][1]))
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
        assert (maps[name][0][:, :, inner, inner] - after).abs().max() > 0.01
    assert (answers[0] - answers[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "keys, side, stage",
    [
        ({"stages": ((4,), (4,), (4,))}, 7, 3),
        ({"stages": ((4,),)}, 1, 1),
        ({"stages": ((4,), (4,)), "kernel": 5, "padding": 0}, 8, 2),
        ({"stages": ((4,), (4, 4)), "stride": 4}, 48, 2),
    ],
)
def test_a_stage_that_leaves_nothing_is_named(keys, side, stage):
    with pytest.raises(ValueError, match=f"stage {stage} of net.stages leaves nothing of a picture with {side} pixels a side"):
        CnnConfig(**keys).build(Port("image", (3, side, side)), Port("vector", (3,), 3), "maps")


def test_the_smallest_picture_that_a_net_allows_goes_through():
    config = CnnConfig(stages=((4,), (4,), (4,)), hidden=5)
    assert config.sides(8) == [4, 2, 1]
    assert built(config, Port("image", (1, 8, 8)))(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).isfinite().all()


# ---- learning and keeping


@pytest.mark.parametrize("name", SMALL)
def test_eight_rows_are_learned_by_heart(name):
    config, inputs = SMALL[name]
    config = config.model_copy(update={"widths": (32, 32)} if "mlp" in name else {"hidden": 64})
    net, x = built(config, inputs, classes=4, double=False), given(inputs, 8, dtype=torch.float32)
    label, optimizer = torch.arange(8) % 4, torch.optim.Adam(net.parameters(), 2e-2)
    torch.manual_seed(0)
    for _step in range(100):
        F.cross_entropy(net(x), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
            norm.commit(one)
    with torch.no_grad():
        assert F.cross_entropy(net.eval()(x), label) < 0.01


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded_weights_give_the_same_bits(name, tmp_path):
    config, inputs = SMALL[name]
    net, x = built(config, inputs, double=False), given(inputs, 6, dtype=torch.float32)
    net(x)
    for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
        norm.commit(one)
    wanted = net.eval()(x)
    files.durable_write(tmp_path / "model.safetensors", files.tensor_file(net.state_dict(), {}))
    tensors, _facts = files.read_tensors(tmp_path / "model.safetensors")
    other = built(config, inputs, seed=7, double=False)
    assert not torch.equal(other.eval()(x), wanted)
    other.load_state_dict(tensors)
    assert torch.equal(other(x), wanted)
    assert not any("seen" in k or "chunks" in k for k in tensors)  # a step's own sums are no weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_before_the_activation_changes_no_bit(dtype):
    """Ties, and places where all four values are negative, among them."""
    torch.manual_seed(0)
    net = CnnConfig(stages=((4, 5), (6,)), hidden=7, dropout=0.0).build(Port("image", (3, 12, 12)), Port("vector", (3,)), "maps").train()
    x = torch.randn(8, 3, 12, 12).round(decimals=1)
    found, quick = [], net.quick
    for order in (quick, net.order):
        net.quick = order
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = net(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in net.parameters())])
    assert quick != net.order
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 1001), (7,), (3, 5, 7, 11)])
def test_dropout_keeps_the_mean_and_zeroes_its_share(p, shape):
    torch.manual_seed(0)
    x, drop = torch.rand(shape, requires_grad=True), Dropout(p).train()
    y = drop(x)
    y.sum().backward()
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / (1 - p), rtol=1e-4) and torch.equal(x.grad != 0, kept)
    if len(shape) == 2:  # a million draws: five standard deviations
        n = x.numel()
        assert abs(float((~kept).float().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
        each = kept.float().flatten()[: n - n % 4].view(-1, 4)
        assert (
            float((torch.corrcoef(each.T) - torch.eye(4)).abs().max()) < 5 / len(each) ** 0.5
        )  # the four of one draw know nothing of each other
        assert float((each.mean(0) - (1 - p)).abs().max()) < 5 * (p * (1 - p) / len(each)) ** 0.5
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)


def test_dropout_hangs_on_the_seed_alone():
    x, drop, found = torch.ones(64, 33), Dropout(0.3).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(drop(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
