"""Number formats and kernels: what is offered is right first, and only then fast."""

import pytest
import torch
from torch import nn

from cloche import cli
from cloche.data.chunk import Chunk
from cloche.errors import WRONG_INPUT
from cloche.training import precision
from cloche.training.precision import Precision, onednn_is_exact, trial

pytestmark = pytest.mark.usefixtures("one_thread")
needs_route = pytest.mark.skipif(not onednn_is_exact(), reason="not run: oneDNN rounds float32 products here, or is not there")


def flag() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@needs_route
@pytest.mark.parametrize("shape", [(7, 33, 5), (64, 18, 512), (256, 256, 256)])
def test_onednn_multiplies_float32_in_float32_forwards_and_backwards(shape):
    m, k, n = shape
    g = torch.Generator().manual_seed(0)
    x, layer = torch.randn(m, k, generator=g), nn.Linear(k, n)
    with Precision(matmul="onednn").products():
        layer(x).square().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    exact = layer.double()
    exact(x.double()).square().sum().backward()
    assert float((found - exact.weight.grad).norm() / exact.weight.grad.norm()) < 1e-6


def test_a_rounding_onednn_is_seen_through(monkeypatch):
    """A CPU with tiles for bfloat16 would round: here the products are rounded by hand."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        assert not onednn_is_exact()
        return
    product = torch.Tensor.__matmul__

    def rounding(a, b):
        return product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 and flag() == "bf16" else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not onednn_is_exact()


@needs_route
def test_the_setting_ends_with_the_block_also_after_a_fault():
    before = flag()
    with pytest.raises(KeyError), Precision(matmul="onednn").autocast(torch.device("cpu")):
        assert flag() == "bf16"
        raise KeyError
    assert flag() == before
    with Precision().autocast(torch.device("cpu")):
        assert flag() == before


class Task:
    def loss(self, nets, chunk, carry):
        return nets["net"](chunk.data["x"]).sum(), None, {}


@pytest.mark.parametrize(
    "fastest", [Precision("fp32", "plain", "onednn"), Precision("fp32", "plain", "default"), Precision("bf16", "plain", "default")]
)
def test_the_trial_takes_the_fastest_of_what_is_allowed(fastest, monkeypatch):
    monkeypatch.setattr(precision, "onednn_is_exact", lambda: True)
    monkeypatch.setattr(precision, "bf16_is_native", lambda device: True)
    monkeypatch.setattr(precision, "_time", lambda nets, task, chunk, choice, rounds, enough: 1.0 if choice == fastest else 2.0)
    ids = torch.arange(4)
    chunk = Chunk({"x": torch.randn(4, 3)}, ids, ids, torch.ones(4), torch.tensor(0), True)
    chosen, tried = trial({"net": nn.Linear(3, 2)}, Task(), chunk, Precision("auto", "auto", "auto"))
    assert chosen == fastest and tried == {
        "fp32 plain default": tried["fp32 plain default"],
        "fp32 plain onednn": tried["fp32 plain onednn"],
        "bf16 plain default": tried["bf16 plain default"],
    }
    kept, _tried = trial({"net": nn.Linear(3, 2)}, Task(), chunk, Precision("fp32", "plain", "default"))
    assert kept == Precision("fp32", "plain", "default")


def test_asked_for_where_it_would_round_it_is_refused(tmp_path, monkeypatch, capsys):
    from cloche.use import train

    monkeypatch.setattr(train, "onednn_is_exact", lambda: False)
    assert cli.run(["train", "curve", "--set", "train.matmul=onednn", "--out", str(tmp_path / "run")]) == WRONG_INPUT
    assert "train.matmul" in capsys.readouterr().err
