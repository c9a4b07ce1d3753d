"""What only a CUDA device can show: `make test-gpu`."""

import math

import pytest
from test_families import SMALL
import torch

from cloche.recipe import parse_set
from cloche.use.train import Options, train

TINY = {"data.pixels": 16, "net.stages": [[8], [16]], "net.hidden": 32, "net.norm": "batch", "train.steps": 20, "train.precision": "fp32"}


@pytest.mark.gpu
def test_the_cuda_path_learns_what_the_cpu_learns(tmp_path):
    """The same rows in the same order, fillers in the last chunk; dropout draws differ between devices, so it is off."""
    sets = {**TINY, "net.dropout": 0.0, "train.layout": "plain", "train.matmul": "default"}
    runs = {
        d: train("digits", sets={**sets, "train.device": d}, options=Options(out=str(tmp_path / d), quiet=True)) for d in ("cpu", "cuda")
    }
    for (name, a), b in zip(runs["cpu"].net.state_dict().items(), runs["cuda"].net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert abs(runs["cpu"].results["metrics"]["accuracy"] - runs["cuda"].results["metrics"]["accuracy"]) < 0.05


@pytest.mark.gpu
def test_bf16_on_cuda_learns(tmp_path):
    model = train(
        "digits",
        sets={**TINY, "train.steps": 200, "train.precision": "auto", "train.device": "cuda"},
        options=Options(out=str(tmp_path / "r"), quiet=True),
    )
    assert model.results["metrics"]["accuracy"] > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_every_family_trains_and_is_judged_on_cuda(name, tmp_path):
    sets = dict(parse_set(text) for text in SMALL[name])
    model = train(f"recipe:{name}", sets={**sets, "train.device": "cuda"}, options=Options(out=str(tmp_path / "r"), quiet=True))
    assert math.isfinite(model.results["metrics"][model.results["headline"]])
