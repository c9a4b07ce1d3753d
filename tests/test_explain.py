"""`cloche explain`: the ledger against the primer's figures and counted parameters, the step against one made by hand."""

import json
import math
from pathlib import Path
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.errors import UserError
from cloche.files import check_manifest
from cloche.nets.cnn import CnnConfig
from cloche.nets.mlp import MlpConfig
from cloche.nets.resnet import ResnetConfig
from cloche.tasks.metrics import given
from cloche.training.run import KIND
from cloche.use.explain import explain
from cloche.use.explain.step import explain_step
from cloche.use.layers import explain_layers, ledger
from cloche.use.model import load
from cloche.use.train import Options, train

PICTURE, ROW = Port("image", (3, 48, 48)), Port("vector", (4,))


def classes(k: int) -> Port:
    return Port("vector", (k,), k)


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def digits(folder) -> Path:
    """A run of a small convolutional net, an epoch long."""
    sets = {"data.pixels": 16, "net.stages": [[4, 6], [8]], "net.hidden": 16, "train.epochs": 1, "optim.weight_decay": 0.01}
    return trained("digits", folder, sets)


@pytest.fixture(scope="module")
def spirals(folder) -> Path:
    return trained("spirals", folder, {"train.epochs": 2})


@pytest.fixture(scope="module")
def curve(folder) -> Path:
    return trained("curve", folder, {"train.epochs": 2})


def trained(name: str, folder: Path, sets: dict) -> Path:
    fixed = {"train.precision": "fp32", "train.layout": "plain", "train.matmul": "default", "train.device": "cpu"}
    return train(name, None, {**fixed, **sets}, Options(out=str(folder / name), quiet=True)).path


@pytest.fixture(scope="module")
def picture(folder) -> str:
    """A thick 7 of our own, 24×24."""
    array = np.zeros((24, 24), np.uint8)
    array[3:7, 4:20] = 255
    for y in range(7, 21):
        array[y, 18 - (y - 7) * 2 // 3 - 3 : 18 - (y - 7) * 2 // 3 + 1] = 230
    Image.fromarray(array).save(folder / "my seven.png")
    return str(folder / "my seven.png")


# --- the ledger -----------------------------------------------------------------------------------------------------------------


class Adds:
    """A task for a net that maps, whatever it gives: the ledger needs a loss, and this one costs no operation that is counted."""

    def loss(self, nets, chunk, carry):
        return nets["net"](given(chunk)).sum(), None, {}


def ledger_of(net: nn.Module, port: Port, n: int = 3) -> list[dict]:
    """The ledger of one net, from a chunk of zeros."""
    data = {"image" if port.kind == "image" else "columns": torch.zeros(n, *port.shape)}
    return ledger({"net": net}, Adds(), Chunk(data, torch.arange(n), torch.arange(n), torch.ones(n), torch.tensor(0), False))


def test_the_primers_ledger():
    rows = ledger_of(CnnConfig().build(PICTURE, classes(10), "maps"), PICTURE)
    assert [(r["name"], r["params"]) for r in rows] == [
        ("conv1", 896), ("conv2", 18_496), ("pool1", 0), ("conv3", 73_856), ("pool2", 0), ("fc1", 9_437_696), ("fc2", 5_130),
    ]  # fmt: skip
    assert [r["sees"] for r in rows] == ["3×3", "5×5", "6×6", "10×10", "12×12", "all", "all"]
    assert [r["output"] for r in rows] == [[32, 48, 48], [64, 48, 48], [64, 24, 24], [128, 24, 24], [128, 12, 12], [512], [10]]
    place, half = 48 * 48, 24 * 24
    flops = [2 * 27 * 32 * place, 2 * 288 * 64 * place, 0, 2 * 576 * 128 * half, 0, 2 * 18_432 * 512, 2 * 512 * 10]
    assert [r["flops"] for r in rows] == flops
    assert [r["bytes"] for r in rows] == [4 * math.prod(r["output"]) for r in rows]
    assert [r["kind"] for r in rows] == ["conv", "conv", "pool", "conv", "pool", "dense", "dense"]
    assert [plain(r["does"]) for r in rows] == [
        "3→32, 3×3, pad 1, ReLU", "32→64, 3×3, pad 1, ReLU", "max 2×2, stride 2", "64→128, 3×3, pad 1, ReLU", "max 2×2, stride 2",
        "dropout ½, 18 432→512, ReLU", "dropout ½, 512→10",
    ]  # fmt: skip


@pytest.mark.parametrize("k, total", [(10, 9_536_074), (32, 9_547_360), (43, 9_553_003)])
def test_the_primers_totals(k, total):
    assert sum(r["params"] for r in ledger_of(CnnConfig().build(PICTURE, classes(k), "maps"), PICTURE)) == total


def test_one_channel_and_the_walk_through():
    grey = Port("image", (1, 48, 48))
    assert ledger_of(CnnConfig().build(grey, classes(10), "maps"), grey)[0]["params"] == 320
    rows = ledger_of(CnnConfig(stages=((32, 64),)).build(PICTURE, classes(10), "maps"), PICTURE)
    assert next(r for r in rows if r["name"] == "fc1")["params"] == 18_874_880


class Odd(nn.Module):
    """What makes a ledger slip: a weight of its own, one shared, a layer used twice, one never used, attention, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.short = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(3, 8, 1, 2)
        self.pool, self.head, self.again = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.head.weight
        self.own, self.unused, self.look = nn.Parameter(torch.ones(8, 8)), nn.Linear(2, 2), nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x))) + self.short(x)
        y = self.pool(self.second(y)).flatten(1)
        y = self.again(torch.relu(self.head(y))) @ self.own
        return self.look(y, y, y)[0]


OWN = nn.Sequential(nn.Conv2d(3, 4, (3, 1), dilation=2), nn.BatchNorm2d(4), nn.PReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten())
OWN.extend([nn.LayerNorm(2112), nn.Linear(2112, 5), nn.Dropout(0.1)])
NETS = {
    "cnn": (CnnConfig(norm="batch", pool="average", stride=2, kernel=5, activation="gelu").build(PICTURE, classes(7), "maps"), PICTURE),
    "resnet": (ResnetConfig(size="xs", width=4, blocks=(1, 2)).build(PICTURE, classes(3), "maps"), PICTURE),
    "mlp": (MlpConfig(widths=(9, 5), norm="batch", dropout=0.3).build(ROW, classes(3), "maps"), ROW),
    "own": (OWN, PICTURE),
    "odd": (Odd(), PICTURE),
}


@pytest.mark.parametrize("name", NETS)
def test_parameters_of_the_ledger_are_the_counted_ones(name):
    net, port = NETS[name]
    net.train()
    with torch.no_grad():
        net(torch.zeros(2, *port.shape))
    before = {k: t.clone() for k, t in net.state_dict().items()}
    rows = ledger_of(net, port)
    assert sum(r["params"] for r in rows) == sum(p.numel() for p in net.parameters())
    assert all(m.training for m in net.modules()) and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_what_has_no_row_of_its_own_is_folded():
    conv, pool, dense = ledger_of(*NETS["own"])
    assert (conv["does"], conv["params"]) == ("3→4, 3×1, dilation 2, BatchNorm2d, PReLU", 3 * 4 * 3 + 4 + 8 + 1)
    assert (pool["does"], pool["params"]) == ("max 3×3, stride 2, pad 1, LayerNorm", 2 * 2112)
    assert (plain(dense["does"]), dense["name"]) == ("2 112→5, dropout 0.1", "6")
    assert [r["does"] for r in ledger_of(*NETS["mlp"])] == ["4→9, BatchNorm, ReLU", "dropout 0.3, 9→5, BatchNorm, ReLU", "dropout 0.3, 5→3"]


def test_operations_of_functions_and_of_layers_used_twice_are_counted():
    rows = ledger_of(*NETS["odd"])
    assert [r["name"] for r in rows] == ["first", "second", "short", "second", "pool", "head", "again", "look", "Odd", "other"]
    assert [r["params"] for r in rows if r["name"] == "second"] == [8 * 8 * 9 + 8, 0]
    found = {r["name"]: r["flops"] for r in rows}
    assert (found["second"], found["short"], found["Odd"], found["other"]) == (2 * 576 * 8 * 9 * 8, 2 * 3 * 8 * 576, 2 * 8 * 8, 0)
    assert found["look"] == 2 * (8 * 24 + 8 * 8 + 8 + 8)  # in and out projections; one token looks at itself: two products of 2 heads × 4
    assert [r["sees"] for r in rows] == ["3×3", "7×7", "1×1", "11×11", "all", "all", "all", "–", "–", "–"]


def test_receptive_fields_are_those_of_the_gradient():
    """All weights 1 and no activation: the places with a gradient are what a number sees."""
    middle = nn.Conv2d(2, 2, (3, 1), dilation=2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.AvgPool2d(2), middle, nn.AvgPool2d(3, 1), nn.Conv2d(2, 1, 2, 2))
    for p in net.parameters():
        nn.init.ones_(p)
    rows = ledger_of(net, Port("image", (1, 96, 96)))
    for i, row in enumerate(rows):
        x = torch.ones(1, 1, 96, 96, requires_grad=True)
        y = net[: i + 1](x)[0, 0]
        y[y.shape[0] // 2, y.shape[1] // 2].backward()
        seen = [int(ids.max() - ids.min()) + 1 for ids in x.grad[0, 0].nonzero(as_tuple=True)]
        assert row["sees"] == f"{seen[0]}×{seen[1]}"


def test_what_is_not_known_is_not_claimed():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3), nn.ConvTranspose2d(1, 1, 3))
    assert [r["sees"] for r in ledger_of(net, Port("image", (1, 8, 8)))] == ["3×3", "–", "–", "–"]


def test_the_layers_of_a_recipe():
    found, text = explain("digits")
    lines = plain(text).splitlines()
    assert found["params"] == 9_536_074 and found["flops"] == sum(r["flops"] for r in found["layers"]) == 192_735_232
    assert set(found["layers"][0]) == {"name", "kind", "does", "output_shape", "params", "flops", "bytes", "sees"}
    assert lines[1].split("  ")[0] == "conv1" and "896    4.0    295    3×3" in lines[1]
    assert lines[8].startswith("total  a picture; weights 38.1 MB ") and lines[8].endswith(" 9 536 074  192.7  1 403")
    assert lines[9] == "fc1 holds 99 % of the parameters and does 10 % of the work: conv2 and conv3 do 88 %."
    assert lines[10] == "conv1 uses its 864 weights at 2 304 places; fully connected, the same map would need 509 607 936."
    assert "cloche explain runs/digits my.png" in lines[-1] and max(map(len, lines)) <= 100
    counts = ["896", "18 496", "0", "73 856", "0", "9 437 696", "5 130", "9 536 074"]
    assert all(line[:61].endswith(f" {n}") for line, n in zip(lines[1:9], counts, strict=True))  # one column


def test_the_layers_of_other_recipes():
    _found, text = explain_layers("primer-walkthrough")
    assert "fc1 holds 99.9 % of the parameters and does 30 % of the work: conv2 does 67 %." in plain(text)
    found, text = explain_layers("digits", None, {"data.channels": 1, "net.norm": "batch", "net.stages": [[4]], "data.pixels": 8})
    assert found["layers"][0]["params"] == 36 + 4 + 8
    assert "conv1 uses its 36 weights at 64 places; fully connected, the same map would need 16 384." in plain(text)
    found, text = explain_layers("spirals")
    assert found["params"] == 4_417 and 'runs/spirals "0.5 0.5"' in text and "fully connected" not in text


# --- the step -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(digits, picture, folder):
    return explain_step(str(digits), picture, "7", "conv1:0,5,7", str(folder / "out"))


def by_hand(model, picture: str, label: int):
    """The same step with torch alone: the net after loss.backward(), the loss, and the same net after torch.optim's own step."""
    x = model.chunk(model.prepare.gather([model.prepare.encode(picture)])).data["image"]
    net = model.net.requires_grad_(True)
    loss = F.cross_entropy(net(x), torch.tensor([label]))
    loss.backward()
    grads, before = {k: p.grad.clone() for k, p in net.named_parameters()}, {k: p.detach().clone() for k, p in net.named_parameters()}
    torch.optim.Adam(net.parameters(), lr=model.recipe.optim.lr, weight_decay=model.recipe.optim.weight_decay).step()
    return x, loss, grads, before, net


def test_the_step_is_the_one_made_by_hand(digits, picture, seen):
    found, text = seen
    x, loss, grads, before, net = by_hand(load(digits), picture, 7)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["loss_after"] == pytest.approx(F.cross_entropy(net(x), torch.tensor([7])).item(), rel=1e-4, abs=1e-6)
    assert found["loss_after"] < found["loss"]
    after = dict(net.named_parameters())
    for row in found["layers"]:
        mine = [k for k in grads if k.startswith(row["name"] + ".")]
        if not mine:
            assert row["name"].startswith("pool") and row["gradient_norm"] is None and row["update_ratio"] is None
            continue
        together = lambda some: torch.cat([t.flatten() for t in some]).norm().item()  # noqa: E731
        assert row["gradient_norm"] == pytest.approx(together(grads[k] for k in mine), rel=1e-4)
        ratio = together(after[k].detach() - before[k] for k in mine) / together(before[k] for k in mine)
        assert row["update_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert "it fell" in text and "0 clear" in text and "4 update   adam, learning rate 0.001" in text


def test_activations_and_probabilities(digits, picture, seen):
    found, text = seen
    model = load(digits)
    x = model.chunk(model.prepare.gather([model.prepare.encode(picture)])).data["image"]
    with torch.no_grad():
        y = torch.relu(model.net.conv1(x))
        p = F.softmax(model.net(x), 1)[0]
    a = next(r for r in found["layers"] if r["name"] == "conv1")["activation"]
    wanted = {"min": y.min(), "mean": y.mean(), "max": y.max(), "zeros": (y == 0).float().mean()}
    assert a == pytest.approx({k: v.item() for k, v in wanted.items()}, rel=1e-5)
    assert [found["probabilities"][str(k)] for k in range(10)] == pytest.approx(p.tolist(), rel=1e-4)
    assert found["predicted"] == str(int(p.argmax())) and found["label"] == "7" and found["input"] == picture
    assert found["loss"] == pytest.approx(-math.log(p[7].item()), rel=1e-4)


def test_the_run_is_not_changed(digits, picture, seen, folder):
    check_manifest(digits, KIND)
    model = load(digits)
    before = {k: t.clone() for k, t in model.net.state_dict().items()}
    explain_step(model, picture, 7, out=str(folder / "out"))
    assert all(torch.equal(t, before[k]) for k, t in model.net.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert plain(seen[1]).endswith(f"Nothing in {digits} was changed: the step was made on a copy of its weights.")


@pytest.mark.parametrize("at", ["conv1:0,5,7", "conv1:3,0,0", "conv3: 7, 3, 0"])
def test_one_number_is_the_sum_of_its_products(at, digits, picture, seen, folder):
    found, text = seen if at == "conv1:0,5,7" else explain_step(str(digits), picture, at=at, out=str(folder / "out"))
    one = found["at"]
    products = np.array(one["products"])
    assert products.size == {"conv1": 27, "conv3": 54}[one["layer"]]
    assert products == pytest.approx(np.array(one["patch"]) * np.array(one["kernel"]), rel=1e-6)
    assert one["sum"] == pytest.approx(products.sum() + one["bias"], abs=1e-5)
    assert one["sum"] == pytest.approx(one["value"], abs=1e-5)
    for act in ("place", "multiply and add", "write one number", "slide"):
        assert f"\n  {act} " in text
    assert ("  3 more channels add" in plain(text)) == (one["layer"] == "conv3")
    if at == "conv1:3,0,0":  # the map's own number, and zeros above the picture
        model = load(digits)
        x = model.chunk(model.prepare.gather([model.prepare.encode(picture)])).data["image"]
        with torch.no_grad():
            assert one["value"] == pytest.approx(model.net.conv1(x)[0, 3, 0, 0].item(), abs=1e-6)
        assert np.array(one["patch"])[:, 0].tolist() == [[0.0] * 3] * 3


def test_whose_label_it_is(spirals, seen):
    model = load(spirals)
    data = model.data()
    first = data.rows["validation"][0]
    found, text = explain_step(model)
    assert found["label"] == data.store.labels[data.store.label[first]] and "(from the data)" in text
    assert found["input"] == data.store.names[first]
    assert explain_step(model, label="clockwise")[0]["label"] == "clockwise"
    found, text = explain_step(model, [0.5, -1])
    assert found["label"] == found["predicted"] and "the predicted one" in text
    assert "7 (given)" in seen[1]


def test_the_pictures(seen, folder):
    found, text = seen
    assert [Path(p).name for p in found["pictures"]] == ["explain-my-seven-maps.png", "explain-my-seven-pool.png"]
    assert all(p in text for p in found["pictures"])
    for path in found["pictures"]:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 1200
            colours = np.asarray(image.convert("RGB")).reshape(-1, 3)[::41]
        assert (colours == 255).all(1).mean() < 0.6 and len(np.unique(colours, axis=0)) > 200  # pictures, not a blank page


def test_rows_of_numbers(spirals, curve):
    found, text = explain(str(spirals), "0.5 -1", label="clockwise")
    model = load(spirals)
    x = model.chunk(model.prepare.gather([model.prepare.encode("0.5 -1")])).data["columns"]
    with torch.no_grad():
        z = model.net(x)
    assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(z, torch.zeros(1, 1)).item(), rel=1e-5)
    assert found["loss"] == pytest.approx(-math.log(found["probabilities"]["clockwise"]), rel=1e-4)
    assert found["loss_after"] < found["loss"] and found["pictures"] == []
    found, text = explain(str(curve), "0.5", label="2")
    assert found["loss"] == pytest.approx((found["predicted"] - 2) ** 2, rel=1e-5)
    assert found["label"] == 2 and found["probabilities"] is None
    found, text = explain(str(curve), "0.5")
    assert found["loss"] == 0 == found["loss_after"] and "give the true answer with --label" in text


def test_a_run_without_an_input_shows_its_layers_then_a_step(curve):
    found, text = explain(str(curve))
    assert text.index("total") < text.index("1 forward")
    assert [r["name"] for r in found["layers"]] == ["fc1", "fc2", "fc3"] and found["params"] == 4_353
    assert all({"output_shape", "flops", "activation", "gradient_norm", "update_ratio"} <= set(r) for r in found["layers"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "what, given, told",
    [
        ("digits", {"given": "my.png"}, r"digits is no run[\s\S]*cloche train digits, then cloche explain runs/digits INPUT"),
        ("mine/own.toml", {"at": "conv1:0,0,0"}, r"mine/own.toml is no run[\s\S]*runs/own INPUT"),
        ("RUN", {"sets": {"optim.lr": 1}}, "is a finished run"),
        ("RUN", {"data": "elsewhere"}, "is a finished run"),
        ("nothing-there", {}, 'no recipe "nothing-there"'),
        ("RUN", {"label": "seven"}, r'no class "seven"[\s\S]*0, 1, 2, 3, 4, 5, 6, 7, 8, 9'),
        ("RUN", {"at": "conv9:0,0,0"}, r'no convolution "conv9"[\s\S]*conv1, conv2, conv3'),
        ("RUN", {"at": "fc1:0,0,0"}, 'no convolution "fc1"'),
        ("RUN", {"at": "conv1"}, r"LAYER:CHANNEL,ROW,COLUMN\n  conv1\n  for example --at conv1:0,5,7"),
        ("RUN", {"at": "conv1:0,-5,7"}, r"CHANNEL,ROW,COLUMN\n  conv1:0,-5,7"),
        ("RUN", {"at": "conv1:4,0,0"}, r"conv1:4,0,0\n  channel 0…3, row 0…15, column 0…15"),
        ("RUN", {"at": "conv3:0,8,0"}, r"maps of conv3\n  conv3:0,8,0\n  channel 0…7, row 0…7, column 0…7"),
        ("RUN", {"out": "/dev/null/x"}, "cannot make the folder /dev/null/x"),
        ("CURVE", {"label": "much"}, r"is a number\n  much\n  for example --label 0.5"),
        ("CURVE", {"given": "0.5", "label": "nan"}, r"is a number\n  nan"),
        ("CURVE", {"label": "1,2"}, r"is a number\n  1,2"),
        ("CURVE", {"at": "conv1:0,0,0"}, r'no convolution "conv1"\n  its convolutions: none'),
    ],
)
def test_faults(what, given, told, digits, curve):
    with pytest.raises(UserError, match=told) as fault:
        explain({"RUN": str(digits), "CURVE": str(curve)}.get(what, what), **given)
    assert fault.value.code == 2


# --- the command ----------------------------------------------------------------------------------------------------------------


def command(*words: str, at: Path) -> subprocess.CompletedProcess:
    words = (sys.executable, "-m", "cloche", "explain", *words)
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=at)


def test_the_command_on_a_recipe(tmp_path):
    found = command("digits", at=tmp_path)
    assert "9 536 074" in plain(found.stdout) and "cloche train digits\n" in found.stdout and found.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_on_a_run(digits, picture, tmp_path):
    found = command(str(digits), picture, "--at", "conv1:0,5,7", "--out", "pictures", "--json", at=tmp_path)
    told = json.loads(found.stdout)
    assert abs(told["at"]["sum"] - told["at"]["value"]) < 1e-5 and found.stderr == ""
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["explain-my-seven-maps.png", "explain-my-seven-pool.png"]
