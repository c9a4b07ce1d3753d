"""Optimizers against torch's own, the flag that stops them, schedules against torch's schedulers, clipping."""

import math

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from cloche.config import Port
from cloche.nets import NETS
from cloche.training import optim
from cloche.training.objective import gradient_norm
from cloche.training.optim import OPTIMS, AdamConfig, AdamwConfig, MuonConfig, OptimConfig, RmspropConfig, SgdConfig, inner_of, orthogonal

pytestmark = pytest.mark.usefixtures("one_thread")


class Torchs(torch.optim.Optimizer):
    """torch's own Muon for matrices beside its own AdamW for the rest."""

    def __init__(self, parameters, lr, momentum, decay, ratio):
        matrices, rest = ([p for p in parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
        self.muon = torch.optim.Muon(matrices, lr, decay, momentum, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr * ratio, (0.8, 0.99), weight_decay=0.0, fused=False)
        self.ratio = ratio
        super().__init__(parameters, {"lr": lr})

    def step(self):
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.adamw.param_groups[0]["lr"] = self.param_groups[0]["lr"] * self.ratio
        self.muon.step()
        self.adamw.step()


@pytest.fixture(autouse=True)
def _muon_in_the_format_of_its_weights(monkeypatch):
    """torch's rounds to bf16: here both do not, so that they compare to the last digits."""
    monkeypatch.setattr(optim, "bf16_is_native", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


CASES = {
    "sgd": (SgdConfig(lr=0.03, momentum=0.8, weight_decay=0.01), lambda p: torch.optim.SGD(p, 0.03, 0.8, weight_decay=0.01, fused=False)),
    "sgd plain": (SgdConfig(lr=0.03, momentum=0.0), lambda p: torch.optim.SGD(p, 0.03, fused=False)),
    "rmsprop": (RmspropConfig(lr=3e-3, decay=0.95, weight_decay=0.01), lambda p: torch.optim.RMSprop(p, 3e-3, 0.95, weight_decay=0.01)),
    "adam": (
        AdamConfig(lr=3e-3, beta1=0.8, beta2=0.99, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 3e-3, (0.8, 0.99), weight_decay=0.01, fused=False),
    ),
    "adamw": (
        AdamwConfig(lr=3e-3, beta1=0.8, beta2=0.99, weight_decay=0.3),
        lambda p: torch.optim.AdamW(
            [{"params": [p[0], p[2]]}, {"params": [p[1], p[3]], "weight_decay": 0.0}], 3e-3, (0.8, 0.99), weight_decay=0.3, fused=False
        ),
    ),
}


CASES["muon"] = (
    MuonConfig(lr=3e-3, momentum=0.9, beta1=0.8, beta2=0.99, weight_decay=0.3, ratio=0.5),
    lambda p: Torchs(p, 3e-3, 0.9, 0.3, 0.5),
)


def twins():
    """Two equal nets in float64, and their common task."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double() for _ in range(2))
    b.load_state_dict(a.state_dict())
    return a, b, torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)


def state_of(optimizer):
    return [(k, t.clone()) for kept in optimizer.state.values() for k, t in sorted(kept.items()) if torch.is_tensor(t)]


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_torchs_own(name):
    config, build = CASES[name]
    ours, theirs, x, y = twins()
    mine, other = config.build(list(ours.parameters())), build(list(theirs.parameters()))
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(20):
        for group in (*mine.param_groups, *other.param_groups):
            group["lr"] = config.lr * config.factor(step / 20)  # the loop sets it so
        if step == 7:
            mine.found_inf = torch.tensor(0.0)
        for net, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-10, atol=1e-12)
    assert min((a - b).abs().max() for a, b in zip(start, ours.parameters(), strict=True)) > 1e-3


def test_rmsprop_by_hand():
    """v = 0.9·0 + 0.1·4 = 0.4; w = 1 − 0.5·2 / (√0.4 + ε); then v = 0.36 + 0.1·1 = 0.46; w −= 0.5·(−1) / √0.46."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = RmspropConfig(lr=0.5, decay=0.9).build([w])
    for gradient in (2.0, -1.0):
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert w.item() == pytest.approx(1 - 1 / math.sqrt(0.4) + 0.5 / math.sqrt(0.46), abs=1e-7)


def test_adamw_decays_matrices_and_kernels_only_and_adam_everything():
    def weights():
        return [nn.Parameter(torch.full(shape, 2.0)) for shape in ((3, 4), (2, 3, 3, 3), (5,), ())]

    for config, wanted in (
        (AdamwConfig(lr=0.1, weight_decay=0.5), [2 * (1 - 0.05)] * 2 + [2.0] * 2),
        (AdamConfig(lr=0.1, weight_decay=0.5), [1.9] * 4),
    ):
        parameters = weights()
        optimizer = config.build(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert [p.flatten()[0].item() for p in parameters] == pytest.approx(wanted, abs=1e-6)  # adam: one step of lr against the sign of w


def test_adamw_of_biases_alone_can_be_built():
    bias = nn.Parameter(torch.ones(3))
    optimizer = AdamwConfig().build([bias])
    bias.grad = torch.ones(3)
    optimizer.step()
    assert bias.tolist() == pytest.approx([1 - 1e-3] * 3, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_the_flag_leaves_weights_and_state_as_they_are_even_with_bad_gradients(name, bad):
    config, _build = CASES[name]
    a, b, x, y = twins()
    optimizers = [config.build(list(net.parameters())) for net in (a, b)]

    def step(net, optimizer, flag):
        optimizer.found_inf = torch.tensor(flag)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        if flag:
            for p in net.parameters():
                p.grad.fill_(bad)
        optimizer.step()

    for net, optimizer in zip((a, b), optimizers, strict=True):
        for _i in range(3):
            step(net, optimizer, 0.0)
    before, kept = [p.detach().clone() for p in a.parameters()], state_of(optimizers[0])
    for _i in range(2):
        step(a, optimizers[0], 1.0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before, strict=True))
    after = state_of(optimizers[0])
    assert [k for k, _t in after] == [k for k, _t in kept]
    assert all(torch.equal(t, u) for (_k, t), (_l, u) in zip(after, kept, strict=True))
    for net, optimizer in zip((a, b), optimizers, strict=True):
        step(net, optimizer, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))  # as if the bad step had not been


@pytest.mark.parametrize("name", CASES)
def test_the_flag_at_the_very_first_step_leaves_the_weights(name):
    a, _b, _x, _y = twins()
    before, optimizer = [p.detach().clone() for p in a.parameters()], CASES[name][0].build(list(a.parameters()))
    for p in a.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    for _step in range(2):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before, strict=True))


def test_a_parameter_without_a_gradient_is_left_alone():
    for config in (c(**({} if k == "sgd" else {"weight_decay": 0.1})) for k, c in OPTIMS.items()):
        used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        optimizer = config.build([used, unused])
        used.grad = torch.ones(2, 2)
        optimizer.step()
        assert (used < 1).all() and torch.equal(unused, torch.ones(2, 2))


# ---- muon


def test_matrices_of_a_shape_move_as_each_alone_and_a_kernel_as_its_matrix():
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (3, 6, 2, 2), (6, 4), (4, 6), (3, 24)]
    ours = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in shapes]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    config = MuonConfig(lr=0.02, weight_decay=0.1)
    mine, other = config.build(ours), torch.optim.Muon(theirs, 0.02, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    ours[1].data = ours[1].data.to(memory_format=torch.channels_last)
    for _step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn(q.shape, generator=g, dtype=torch.float64)
            p.grad = q.grad.view(p.shape).clone()
        mine.step()
        other.step()
    torch.testing.assert_close([p.flatten(1) for p in ours], theirs, rtol=1e-10, atol=1e-12)


def test_a_step_is_orthogonal_within_the_bounds_of_the_quintic():
    x = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = torch.linalg.svdvals(orthogonal(x, dtype).double())
        assert found.min() > 0.6 and found.max() < 1.3
    u, _s, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonal(x, torch.float64) @ v.mT
    assert (inside - torch.diag_embed(torch.diagonal(inside, dim1=1, dim2=2))).abs().max() < 1e-9  # its singular vectors are kept
    assert not orthogonal(torch.zeros(1, 3, 2), torch.float32).any()


APART = {  # net and face → what is no matrix inside it, but for biases, gains and the like
    ("mlp", "maps"): {"fc3.weight"},
    ("cnn", "maps"): {"fc2.weight"},
    ("resnet", "maps"): {"head.weight"},
    ("gru", "maps"): {"head.weight"},
    ("lstm", "streams"): {"head.weight"},
    ("rnn", "continues"): {"embed.weight"},
    ("gpt", "continues"): {"embed.weight"},
    ("seq2seq", "pairs"): {"embed_source.weight", "embed_target.weight"},
    ("transformer", "pairs"): {"embed_source.weight", "embed_target.weight", "head.weight"},
    ("unet", "denoises"): {"leave.weight"},
    ("textenc", "embeds"): {"embed.weight"},
}


@pytest.mark.parametrize("kind, face", APART)
def test_embeddings_and_the_last_layer_are_not_inside(kind, face):
    image, tokens = Port("image", (1, 8, 8)), Port("tokens", (16,), 11)
    given = {"maps": image, "denoises": image, "streams": Port("series", (None, 5))}.get(face, tokens)
    wanted = {"maps": Port("vector", (3,), 3), "denoises": image}.get(face, tokens)
    net = NETS[kind].model_validate({"kind": kind}).build(given, wanted, face)
    inside = inner_of([net])
    assert {k for k, p in net.named_parameters() if p.ndim > 1 and p not in inside} == APART[kind, face]
    assert all(p.ndim > 1 for p in inside) and inside


def test_of_a_persons_own_module_the_last_matrix_is_apart():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.LayerNorm(2))
    assert inner_of([net]) == {net[1].weight}
    assert inner_of([nn.Linear(3, 2)]) == set()
    assert len(inner_of([net, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))])) == 2


# ---- schedules


def torchs(make, steps=100):
    """Factors of one of torch's schedulers at each of `steps` + 1 places."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, out = make(optimizer), []
    for step in range(steps + 1):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps:
            scheduler.step()
    return out


lr_scheduler = torch.optim.lr_scheduler
SCHEDULES = {
    "constant": (OptimConfig(), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "constant warmup": (OptimConfig(warmup=0.2), lambda o: lr_scheduler.LambdaLR(o, lambda s: min(1.0, s / 20))),
    "cosine": (OptimConfig(schedule="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, 100)),
    "cosine warmup": (
        OptimConfig(schedule="cosine", warmup=0.25),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LambdaLR(o, lambda s: s / 25), lr_scheduler.CosineAnnealingLR(o, 75)], [25]),
    ),
    # torch's one-cycle rises for pct_start · total − 1 steps
    "onecycle": (
        OptimConfig(schedule="onecycle"),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, 101, pct_start=31 / 101, final_div_factor=1e12),
    ),
    "onecycle warmup": (
        OptimConfig(schedule="onecycle", warmup=0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, 101, pct_start=51 / 101, final_div_factor=1e12),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_torchs_schedulers(name):
    config, make = SCHEDULES[name]
    wanted = torchs(make)
    got = [config.factor(step / 100) for step in range(101)]
    assert got == pytest.approx(wanted, abs=1e-9)
    assert [config.factor(step / 100) for step in reversed(range(101))] == got[::-1]  # a pure function of the place


@pytest.mark.parametrize(
    "keys, values",
    [
        ({}, {0: 1, 0.5: 1, 1: 1}),
        ({"schedule": "cosine"}, {0: 1, 0.5: 0.5, 1: 0}),
        ({"schedule": "cosine", "warmup": 0.2}, {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        ({"schedule": "onecycle"}, {0: 0.04, 0.15: 0.52, 0.3: 1, 0.65: 0.5, 1: 0}),
    ],
)
def test_schedules_at_their_corners(keys, values):
    assert [OptimConfig(**keys).factor(p) for p in values] == pytest.approx(list(values.values()), abs=1e-12)


# ---- the norm


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e3])
def test_the_gradient_norm_is_clipped_as_torch_does(limit):
    a, b, x, y = twins()
    for net in (a, b):
        F.mse_loss(net(x) * 10, y).backward()
    extra = nn.Parameter(torch.ones(2))  # without a gradient
    flat = torch.cat([p.grad.flatten() for p in a.parameters()])
    norm = gradient_norm([*a.parameters(), extra], limit)
    assert norm.item() == pytest.approx(flat.square().sum().sqrt().item(), rel=1e-12)
    if limit:
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(b.parameters(), limit))
    torch.testing.assert_close([p.grad for p in a.parameters()], [p.grad for p in b.parameters()], rtol=1e-12, atol=0)
    clipped = torch.cat([p.grad.flatten() for p in a.parameters()]).norm().item()
    assert clipped == pytest.approx(min(norm.item(), limit or math.inf), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_shows_in_the_norm(bad):
    a, _b, _x, _y = twins()
    for p in a.parameters():
        p.grad = torch.ones_like(p)
    a[2].bias.grad[1] = bad
    assert not torch.isfinite(gradient_norm(list(a.parameters()), 1.0))
