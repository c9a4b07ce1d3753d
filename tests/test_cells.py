"""The table of nets and tasks: in each cell eight rows are learned by heart, or the recipe is refused and the nets that fit are named."""

from functools import cache
import re

import numpy as np
import pytest
import torch

from cloche.build import facts_of, nets_of, open_data, task_of
from cloche.config import RecipeError
from cloche.nets import NETS
from cloche.recipe import parse
from cloche.tasks import TASKS

TEXT = "".join(
    f"In line {n} the net reads a word, then another one, and says which of all words it takes for the next.\n" for n in range(24)
)
DATA = {
    "classify": {"source": "digits", "pixels": 8, "channels": 1},
    "regress": {"source": "curve", "rows": 40, "noise": 0.0},
    "forecast": {"source": "airline", "look": 12, "horizon": 6},
    "language": {"source": "text.txt", "vocabulary": 260, "window": 8, "validation": 0.0, "test": 0.0},
    "translate": {"source": "dates", "rows": 60, "tokens": "characters"},
    "diffusion": {"source": "digits-captions", "pixels": 8, "channels": 1},
    "transcribe": {"source": "dialtones", "rows": 30, "mels": 16},
}
SMALL = {
    "mlp": {"widths": [64]},
    "cnn": {"stages": [[8], [16]], "hidden": 32},
    "resnet": {"width": 8, "blocks": [1, 1]},
    **dict.fromkeys(("rnn", "lstm", "gru"), {"width": 32}),
    "seq2seq": {"width": 32},
    "transformer": {"width": 32, "layers": 1},
    "gpt": {"width": 32, "layers": 1},
    "textenc": {},
    "unet": {"width": 16, "mults": [1], "text": {"width": 16}},
}
FLAT = {(task, net) for task in ("regress", "forecast") for net in ("cnn", "resnet")}  # called alike, but their data is no picture


def recipe_of(task, net):
    tables = {"data": DATA[task], "net": {"kind": net, **SMALL[net]}, "task": {"kind": task}, "optim": {"kind": "adam"}}
    return parse({"format": 1, **tables, "train": {"steps": 1, "batch": 8}})


@cache
def opened(task):
    return open_data(recipe_of(task, "mlp"), torch.device("cpu"))


@pytest.fixture(autouse=True)
def text_beside(tmp_path_factory, monkeypatch, one_thread):
    folder = tmp_path_factory.getbasetemp()
    (folder / "text.txt").write_text(TEXT)
    monkeypatch.chdir(folder)


def by_heart(task, nets, chunk):
    """The loss before and after at most 500 steps on the same rows, with the same noise in each."""
    optimizer, first = torch.optim.Adam([p for net in nets.values() for p in net.eval().parameters()], 2e-2), None
    for _step in range(500):
        torch.manual_seed(0)
        loss = task.loss(nets, chunk, None)[0] / task.count(chunk)
        first = loss.item() if first is None else first
        if loss.item() < 0.1 * first:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first, loss.item()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("task", TASKS)
def test_each_cell_learns_eight_rows_or_is_refused(task, net):
    recipe, data = recipe_of(task, net), opened(task)
    recipe, made = task_of(recipe, data.prepare, facts_of(recipe, data))
    fit = [kind for kind, config in NETS.items() if made.face in config.faces and (task, kind) not in FLAT]
    if net in fit:
        first, last = by_heart(made, nets_of(recipe, made), data.part("train").take(np.arange(8)))
        assert last < 0.1 * first
        return
    with pytest.raises(RecipeError) as caught:
        nets_of(recipe, made)
    told = re.findall(r"\w+", str(caught.value))
    assert net in told and not set(fit) - set(told)
