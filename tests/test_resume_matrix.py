"""Every shipped recipe made tiny × number format × chunks: interrupted one to three times, it ends with the bits of an unbroken run.

In this process, at exact steps: a death before a step (what was done since the last checkpoint is lost), a signal in one, or both.
"""

import json
import random
import signal

from forked import SMALL, Family
import pytest
from test_resume import acting, bits, saving_every, steps_saved
import torch

from cloche import cli
from cloche.errors import STOPPED
from cloche.nets.parts import BatchNorm
from cloche.training import loop as loops
from cloche.use import report

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quiet_machine")]
STEPS, EVERY = 8, 3
TINY = {  # a few steps an epoch, so that a run goes over its border and ends inside one
    "airline": ["train.batch=32"],
    "curve": ["train.batch=120"],
    "dates": ["data.rows=300"],
    "dialtones": ["data.rows=50", "train.batch=16"],
    "digits": ["train.batch=420"],
    "digits-diffusion": ["train.batch=16", "data.validation=0.02", "data.test=0.02"],
    "digits-mlp": ["train.batch=420"],
    "digits-resnet": ["train.batch=420", "data.augment.small=0.5"],
    "digits-rows": ["train.batch=420"],
    "primer-walkthrough": ["train.batch=420", "train.ema=0.8"],
    "spirals": ["train.batch=240"],
}


class Killed(BaseException):
    pass


def dying():
    raise Killed


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """The page is drawn from a finished run and changes nothing in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_inside", lambda model: None)
        patch.setattr(report, "write_report", lambda path: None)
        yield


def test_what_has_to_be_remembered_is_among_them(tmp_path):
    """Batch normalisation, dropout, a running average and carried state, in two recipes each at least."""
    seen = {"norm": 0, "dropout": 0, "ema": 0, "carry": 0}
    for name in SMALL:
        with saving_every(EVERY) as patch:
            found = {}
            patch.setattr(loops, "step", lambda job, state, chunks, place, found=found: found.update(job=job, state=state) or dying())
            with pytest.raises(Killed):
                cli.run(Family(name, *TINY.get(name, ()), steps=STEPS).command(tmp_path / name))
        modules = [m for net in found["job"].nets.values() for m in net.modules()]
        seen["norm"] += any(isinstance(m, BatchNorm) for m in modules)
        seen["dropout"] += any(type(m).__name__ == "Dropout" and m.p > 0 or getattr(m, "dropout", 0) for m in modules)
        seen["ema"] += bool(found["state"].ema)
        seen["carry"] += found["job"].train.carried
    assert seen["norm"] >= 2 and seen["dropout"] >= 2 and seen["ema"] >= 2 and seen["carry"] >= 1, seen


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_interrupted_it_ends_with_the_same_bits(name, precision, chunks, tmp_path):
    more = (*TINY.get(name, ()), f"train.precision={precision}", f"train.chunks={chunks}")
    family, chance = Family(name, *more, steps=STEPS), random.Random(f"{name} {precision} {chunks}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.run(family.command(whole)) == 0
    for at in sorted(chance.sample(range(1, STEPS + 1), chance.randint(1, 3))):
        with saving_every(EVERY) as patch:
            if chance.random() < 0.5:
                acting(patch, at, dying)
                with pytest.raises(Killed):
                    cli.run(family.command(broken))
                assert max(steps_saved(broken), default=0) < at
            else:
                acting(patch, at, lambda: signal.raise_signal(signal.SIGTERM))
                assert cli.run(family.command(broken)) == STOPPED
                assert max(steps_saved(broken)) == at
    assert cli.run(family.command(broken)) == 0
    assert bits(broken) == bits(whole)
    results = json.loads((whole / "results.json").read_text())
    assert results["steps"] == STEPS


@pytest.mark.parametrize("name", SMALL)
def test_torchs_switch_for_determinism_changes_nothing(name, tmp_path):
    """It refuses each operation that is not deterministic: on a CPU no recipe has one."""
    family = Family(name, *TINY.get(name, ()), steps=STEPS)
    assert cli.run(family.command(tmp_path / "plain")) == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert cli.run(family.command(tmp_path / "strict")) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert bits(tmp_path / "strict") == bits(tmp_path / "plain")
