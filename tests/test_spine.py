"""The spine is not shaped like a picture: two families that cloche does not ship go through the same `cloche.fit`, and survive a kill."""

import ast
from pathlib import Path
import signal

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F

import cloche
from cloche import rng
from cloche.config import Port
from cloche.data.kinds import DATA
from cloche.errors import INTERRUPTED, STOPPED, UserError
from cloche.nets import NETS
from cloche.tasks import TASKS
from cloche.tasks.metrics import Figure
from cloche.training import loop as loops
from cloche.training.run import read_events
from cloche.use import train as use_train

TRAINING = Path(loops.__file__).parent


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """One thread, as others work on these cores; how fast they multiply does not matter here."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(use_train, "limit_of", lambda *given: 1e9)
    yield
    torch.set_num_threads(was)


# --- next token: (n, T) int64, a recurrent net, hidden state carried from one step to the next --------------------------------------


class Reader(nn.Module):
    """tokens (B, T), carry (B, C) → logits (B, T, V), carry. With dropout, so that randomness is at stake too."""

    def __init__(self, size: int = 7, width: int = 16) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(size, width), nn.GRU(width, width, batch_first=True), nn.Linear(width, size)
        self.drop = nn.Dropout(0.1)

    def forward(self, tokens, carry):
        states, last = self.cell(self.drop(self.embed(tokens)), None if carry is None else carry[None])  # (B, T, C), (1, B, C)
        return self.head(states), last[0]


class NextToken:
    face, choose, headline = "continues", ("loss", -1), "loss"
    ports = {"net": (Port("tokens", (None,), 7), Port("tokens", (None,), 7))}

    def __init__(self) -> None:
        self.carried: list[bool] = []

    def count(self, chunk):
        return chunk.weight.sum() * (chunk.data["tokens"].shape[1] - 1)  # tokens, not rows

    def loss(self, nets, chunk, carry):
        losses, state = self._losses(nets["net"], chunk, carry)
        self.carried.append(carry is not None)
        return (losses.sum(1) * chunk.weight).sum(), {"state": state}, {}

    def measure(self, nets, chunk, carry):
        losses, _state = self._losses(nets["net"], chunk, None)
        sums = {"loss": (losses.sum(1) * chunk.weight).sum(), "n": self.count(chunk)}
        return sums, None, {"loss": losses.mean(1), "predicted": losses.argmax(1)}

    def figures(self, sums):
        return {"loss": Figure(float(sums["loss"] / sums["n"]), n=int(sums["n"]))}

    def answer(self, nets, chunk):
        return nets["net"](chunk.data["tokens"], None)[0][:, -1].argmax(1).tolist()

    def _losses(self, net, chunk, carry):
        tokens = chunk.data["tokens"]
        state = None if carry is None else carry["state"][: len(tokens)]
        logits, state = net(tokens[:, :-1], state)
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none"), state  # (B, T - 1)


def chains(n: int = 200, length: int = 12) -> dict[str, np.ndarray]:
    """Each token is 3 · the one before + 1, modulo 7; one in eight is drawn anew."""
    g = np.random.default_rng(0)
    out = g.integers(0, 7, (n, length))
    for t in range(1, length):
        out[:, t] = np.where(g.random(n) < 1 / 8, out[:, t], (3 * out[:, t - 1] + 1) % 7)
    return {"tokens": out}


# --- denoising: the level of each row is hashed from its place, the noise itself drawn in the forward pass -------------------------


class Denoiser(nn.Module):
    """x (B, 1, 6, 6), level (B,) → the noise that was added."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.time, self.down = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(1, 16), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x, level):
        return self.down(torch.tanh(self.up(x) + self.time(level[:, None])[:, :, None, None]))


class Denoise:
    face, choose, headline = "denoises", ("loss", -1), "loss"
    ports = {"net": (Port("image", (1, 6, 6)), Port("image", (1, 6, 6)))}

    def count(self, chunk):
        return chunk.weight.sum()

    def loss(self, nets, chunk, carry):
        return (self._errors(nets["net"], chunk) * chunk.weight).sum(), None, {}

    def measure(self, nets, chunk, carry):
        errors = self._errors(nets["net"], chunk)
        return {"loss": (errors * chunk.weight).sum(), "n": chunk.weight.sum()}, None, {"loss": errors, "predicted": errors}

    def figures(self, sums):
        return {"loss": Figure(float(sums["loss"] / sums["n"]), n=int(sums["n"]))}

    def answer(self, nets, chunk):
        return nets["net"](chunk.data["picture"], torch.zeros(len(chunk.ids))).tolist()

    def _errors(self, net, chunk):
        x = chunk.data["picture"]
        level = rng.uniform(chunk.draw, rng.NOISE, chunk.at, 1)[:, 0]
        noise = torch.randn_like(x)
        mixed = (1 - level).view(-1, 1, 1, 1) * x + level.view(-1, 1, 1, 1) * noise
        return (net(mixed, level) - noise).square().flatten(1).mean(1)  # (B,)


def squares(n: int = 200) -> dict[str, np.ndarray]:
    """Even squares, light or dark."""
    g = np.random.default_rng(0)
    grey = np.sign(g.standard_normal((n, 1, 1, 1))) + 0.1 * g.standard_normal((n, 1, 1, 1))
    return {"picture": np.broadcast_to(grey, (n, 1, 6, 6)).astype(np.float32)}


# --- both through the one loop --------------------------------------------------------------------------------------------------

SETS = {
    "train.epochs": 6,
    "train.batch": 14,
    "train.log_steps": 1,
    "train.device": "cpu",
    "train.precision": "fp32",
    "train.layout": "plain", "train.matmul": "default",
    "optim.lr": 0.01,
}
FAMILIES = {"next token": (Reader, NextToken, chains, 0.6), "denoising": (Denoiser, Denoise, squares, 0.8)}


def family(name: str):
    Net, OwnTask, arrays, share = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Net(), OwnTask(), arrays(), share


def bits(run: Path) -> tuple[bytes, bytes]:
    return (run / "model.safetensors").read_bytes(), (run / "events.jsonl").read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_ones_own_learns(name, tmp_path):
    net, task, arrays, share = family(name)
    model = cloche.fit(net, arrays, task=task, out=str(tmp_path / "run"), sets={**SETS, "train.epochs": 15})
    losses = [e["loss"] for e in read_events(tmp_path / "run") if e["kind"] == "step"]
    assert len(losses) == model.results["steps"] == 150
    assert np.mean(losses[-10:]) < share * losses[0]
    assert model.results["part"] == "test" and model.results["metrics"]["loss"] < share * losses[0]
    assert model.recipe.task.name == type(task).__name__ and model.recipe.net.name == type(net).__name__


def test_loss_is_the_sum_over_tokens_by_their_count(tmp_path):
    """At the start a net knows nothing of 7 tokens: −ln(1/7) a token, not eleven times that a row."""
    net, task, arrays, _share = family("next token")
    with torch.no_grad():
        net.head.weight.zero_(), net.head.bias.zero_()
    cloche.fit(net, arrays, task=task, out=str(tmp_path / "run"), sets=SETS)
    first = read_events(tmp_path / "run")[0]
    assert first["n"] == 14 * 11
    assert first["loss"] == pytest.approx(np.log(7), rel=1e-5)


def test_the_carry_goes_from_step_to_step_and_not_over_epochs(tmp_path):
    net, task, arrays, _share = family("next token")
    cloche.fit(net, arrays, task=task, out=str(tmp_path / "run"), sets=SETS)
    counting, steps, ledger = task.carried[:1], task.carried[1:-1], task.carried[-1:]  # around them, two passes that only count
    assert counting == ledger == [False]
    assert steps == ([False] + [True] * 9) * 6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("at", [(4, 33), (10, 20)], ids=["inside epochs", "between epochs"])
def test_stopped_and_gone_on_gives_the_same_bits(name, at, tmp_path, monkeypatch):
    """Two real signals; what goes on finds other weights in its module and the generator in another state."""
    net, task, arrays, _share = family(name)
    whole = cloche.fit(net, arrays, task=task, out=str(tmp_path / "whole"), sets=SETS)
    out, act = tmp_path / "run", loops.step
    for stop, sent, code in zip(at, (signal.SIGTERM, signal.SIGINT), (STOPPED, INTERRUPTED), strict=True):

        def stepping(job, state, chunks, place, stop=stop, sent=sent):
            if place.step == stop - 1:
                signal.raise_signal(sent)
            return act(job, state, chunks, place)

        monkeypatch.setattr(loops, "step", stepping)
        with pytest.raises(UserError, match="everything done so far is saved") as caught:
            cloche.fit(net := family(name)[0], arrays, task=family(name)[1], out=str(out), sets=SETS)
        assert caught.value.code == code
        assert f"step-{stop}" in [p.name for p in (out / "checkpoints").iterdir()]
        assert not (out / "model.safetensors").exists()
        torch.manual_seed(stop)
    monkeypatch.setattr(loops, "step", act)
    nn.init.uniform_(next(net.parameters()))
    model = cloche.fit(net, arrays, task=family(name)[1], out=str(out), sets=SETS)
    assert bits(out) == bits(tmp_path / "whole")
    assert [model.results[k] for k in ("steps", "best_step")] == [whole.results[k] for k in ("steps", "best_step")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_crash_in_the_task_and_the_same_call_again(name, tmp_path, monkeypatch):
    """An exception out of the task on step k: the next call goes on from the last checkpoint, not from step k."""
    net, task, arrays, _share = family(name)
    cloche.fit(net, arrays, task=task, out=str(tmp_path / "whole"), sets=SETS)
    monkeypatch.setattr(loops.Clock, "save_is_due", property(lambda self: len(self.steps_s) % 6 == 0))
    net, task, arrays, _share = family(name)
    loss, calls = task.loss, []

    def failing(*given):
        calls.append(1)
        if len(calls) == 1 + 23:  # the first call counts operations
            raise RuntimeError("the power is gone")
        return loss(*given)

    task.loss = failing
    with pytest.raises(RuntimeError, match="the power is gone"):
        cloche.fit(net, arrays, task=task, out=str(tmp_path / "run"), sets=SETS)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-12", "step-18"]
    net, task, arrays, _share = family(name)
    cloche.fit(net, arrays, task=task, out=str(tmp_path / "run"), sets=SETS)
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_figures_do_not_depend_on_the_callers_generator(tmp_path):
    """Noise drawn while a part is measured is seeded by cloche too: the same model has one test figure."""
    found = []
    for seed in (1, 2):
        net, task, arrays, _share = family("denoising")
        torch.manual_seed(seed)
        model = cloche.fit(net, arrays, task=task, out=str(tmp_path / str(seed)), sets={**SETS, "train.epochs": 2})
        found.append(model.results["metrics"]["loss"])
    assert bits(tmp_path / "1") == bits(tmp_path / "2")
    assert found[0] == found[1]


# --- and the loop knows of no family --------------------------------------------------------------------------------------------

NAMES = set(NETS) | set(TASKS) | set(DATA) | {"gpt", "rnn", "diffusion", "language", "image", "tokens", "text", "audio"}


def words_compared(tree: ast.AST) -> list[tuple[int, str]]:
    """Strings that a decision hangs on: in comparisons, `in` lists, match cases, and as keys of a table."""
    out = []
    for node in ast.walk(tree):
        places = []
        if isinstance(node, ast.Compare | ast.MatchValue):
            places = [node]
        elif isinstance(node, ast.Dict):
            places = [k for k in node.keys if k is not None]
        elif isinstance(node, ast.Subscript):
            places = [node.slice]
        out += [(c.lineno, c.value) for p in places for c in ast.walk(p) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return out


def modules_imported(tree: ast.AST) -> set[str]:
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            out |= {f"{node.module}.{a.name}" for a in node.names}
    return out


@pytest.mark.parametrize("path", sorted(TRAINING.glob("*.py")), ids=lambda p: p.name)
def test_training_decides_by_no_name_of_a_family(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [f"{path.name}:{line} {word!r}" for line, word in words_compared(tree) if word in NAMES]
    assert not wrong, wrong
    allowed = ("cloche.tasks.Task", "cloche.tasks.metrics.", "cloche.nets.parts.", "cloche.data.chunk.")
    families = {
        m for m in modules_imported(tree) if m.startswith(("cloche.tasks", "cloche.nets", "cloche.data")) and not m.startswith(allowed)
    }
    assert not families, families


def test_the_walk_sees_what_it_should():
    tree = ast.parse(
        'if task.kind == "classify": pass\nif kind in ("mlp", "x"): pass\nd = {"cnn": 1}\nmatch k:\n case "regress": pass\nf(kind="mlp")'
    )
    assert {w for _line, w in words_compared(tree)} & NAMES == {"classify", "mlp", "cnn", "regress"}
