"""The loop: every net of every family is trained here and nowhere else.

A step has four acts, one after the other: forward pass, loss, backward pass, update. Gradients add up over a step's
chunks and are cleared after the update. A step's loss is the sum over its rows ÷ their count, however they are cut.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
import math
import time
from typing import Any, Literal

from pydantic import Field
import torch
from torch import Tensor

from cloche import rng, trust
from cloche.config import Frozen
from cloche.data.chunk import Chunk, Order, Part
from cloche.errors import FAILED, INTERRUPTED, STOPPED, UserError
from cloche.tasks import Task
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, told
from cloche.training.evaluate import evaluate
from cloche.training.log import Progress
from cloche.training.objective import Objective, average, detached, gradient_norm
from cloche.training.optim import OptimConfig
from cloche.training.precision import Precision
from cloche.training.run import Run
from cloche.words import _, listed, number, percent


class TrainConfig(Frozen):
    epochs: int | None = Field(None, ge=1, description=_("times that every training example is seen"))
    steps: int | None = Field(None, ge=1, description=_("updates in all, in place of epochs"))
    batch: int = Field(64, ge=1, description=_("examples of one step"))
    chunks: int = Field(1, ge=1, description=_("forward passes that a step is cut into, to save memory"))
    test_batch: int = Field(256, ge=1, description=_("examples of one forward pass in evaluation"))
    seed: int = Field(0, ge=0, lt=2**31, description=_("what all randomness hangs on"))
    select: Literal["best", "last"] = Field("best", description=_("which weights are kept: best on the validation part, or last"))
    patience: int = Field(0, ge=0, description=_("epochs without a better validation figure before stopping; 0 never stops early"))
    ema: float = Field(0.0, ge=0, lt=1, description=_("keep the running average of the weights: its memory; 0 for none"))
    log_steps: int = Field(10, ge=1, description=_("steps between two lines of the log"))
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description=_("number format; auto tries on this machine"))
    layout: Literal["auto", "plain", "channels_last"] = Field(
        "auto", description=_("memory layout of pictures; auto tries on this machine")
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description=_("where it is trained: auto, cpu, cuda, cuda:1"))


@dataclass(frozen=True)
class Place:
    """Where a run stands: steps done, the epoch and the step within it that come next."""

    step: int
    epoch: int
    index: int


@dataclass
class Job:
    """Everything that the loop needs, built."""

    nets: Nets
    trained: tuple[str, ...]
    task: Task
    train: Part
    validation: Part | None
    order: Order
    optim: OptimConfig
    config: TrainConfig
    precision: Precision
    noun: str = "examples"

    @cached_property
    def steps(self) -> int:
        if self.config.steps:
            return self.config.steps
        return sum(self.order.steps(e) for e in range(self.config.epochs or 1))

    @property
    def epochs(self) -> int:
        return self.config.epochs or math.ceil(self.steps / self.order.steps(0))


@dataclass
class State:
    """What a checkpoint holds, beside the place."""

    job: Job
    objective: Objective
    optimizer: torch.optim.Optimizer
    bad_step: Tensor  # () int64, the first step with a non-finite gradient; -1 while there is none
    carry: dict[int, Carry] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    seen: Sums = field(default_factory=dict)  # since the last line of the log
    epoch_seen: Sums = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_value: tuple[float, float] = (-math.inf, -math.inf)
    best_step: int = 0
    waited: int = 0
    shown: str = ""  # the figures of the last line of the log, as text: the bar must not wait for the device

    def weights(self) -> dict[str, Tensor]:
        return {f"{n}/{k}": t for n in self.job.trained for k, t in self.job.nets[n].state_dict().items()}

    def chosen(self) -> dict[str, Tensor]:
        """The weights that are judged and kept: the running average where there is one."""
        return self.ema or self.weights()

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        for n in self.job.trained if tensors else ():
            self.job.nets[n].load_state_dict({k.removeprefix(f"{n}/"): t for k, t in tensors.items() if k.startswith(f"{n}/")})

    def tensors(self) -> dict[str, Tensor]:
        out = {f"net/{k}": t for k, t in self.weights().items()} | {f"best/{k}": t for k, t in self.best.items()}
        out |= {f"ema/{k}": t for k, t in self.ema.items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            out |= {f"optim/{i}/{k}": torch.as_tensor(t) for k, t in kept.items() if t is not None}
        for c, carry in self.carry.items():
            out |= {f"carry/{c}/{k}": t for k, t in (carry or {}).items()}
        return out | {f"seen/{k}": t for k, t in self.seen.items()} | {f"epoch_seen/{k}": t for k, t in self.epoch_seen.items()}

    def numbers(self) -> dict[str, Any]:
        return {
            "best_value": [v if math.isfinite(v) else None for v in self.best_value],
            "best_step": self.best_step,
            "optim": self.job.optim.kind,
            "waited": self.waited,
        }

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        device = self.bad_step.device
        group = lambda name: {k.removeprefix(f"{name}/"): t.to(device) for k, t in tensors.items() if k.startswith(f"{name}/")}  # noqa: E731
        try:
            self.load_weights(group("net"))
        except RuntimeError as fault:
            raise UserError(
                _("the checkpoint does not fit this net"), str(fault).splitlines()[-1].strip(), _("start anew with --again")
            ) from None
        if numbers["optim"] != self.job.optim.kind:
            told = _("{old} there, {new} now").format(old=numbers["optim"], new=self.job.optim.kind)
            raise UserError(_("the checkpoint holds the memory of another optimizer"), told, _("start anew with --again"))
        kept = self.optimizer.state_dict()
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        for key, t in group("optim").items():
            i, name = key.split("/")
            like = parameters[int(i)]  # fused kernels walk weights and state together: same memory layout
            kept["state"].setdefault(int(i), {})[name] = torch.empty_like(like).copy_(t) if t.shape == like.shape else t
        self.optimizer.load_state_dict(kept)
        for key, t in group("carry").items():
            c, name = key.split("/")
            self.carry.setdefault(int(c), {})[name] = t  # type: ignore[index]
        self.seen, self.epoch_seen, self.best, self.ema = group("seen"), group("epoch_seen"), group("best"), group("ema")
        self.best_value = tuple(-math.inf if v is None else v for v in numbers["best_value"])  # type: ignore[assignment]
        self.best_step, self.waited = numbers["best_step"], numbers["waited"]
        like = {k: t.shape for k, t in self.weights().items()}
        if any(found and {k: t.shape for k, t in found.items()} != like for found in (self.best, self.ema)):
            raise ValueError("the best weights or their average are of another net")


def loop(job: Job, run: Run, progress: Progress | None = None) -> tuple[Place, "Clock"]:
    """Train to the end, from the newest checkpoint where there is one. The nets hold the chosen weights afterwards.

    Raises: UserError when a gradient was not finite (naming step and examples), or when a signal asked to stop.
    """
    clock, progress = Clock(), progress or Progress(job.epochs, job.noun, quiet=True)
    run.looping = True
    try:
        with rng.apart(job.train.device):
            state, place = start(job, run)
            while place.step < job.steps and not (job.config.patience and state.waited >= job.config.patience):
                place = _epoch(job, run, state, place, job.steps, clock, progress)
            if run.last_saved < place.step:  # durable before anything else can fail
                clock.save(run, state, place)
    finally:
        run.looping = False
    run.best_step = state.best_step if state.best else place.step
    state.load_weights(state.best or state.chosen())
    return place, clock


def start(job: Job, run: Run) -> tuple[State, Place]:
    for name, net in job.nets.items():
        net.train(name in job.trained)
        if name not in job.trained:
            net.requires_grad_(False)
    job.precision.apply(job.nets)
    parameters = [p for n in job.trained for p in job.nets[n].parameters() if p.requires_grad]
    optimizer = job.optim.build(parameters)
    state = State(job, Objective(job.nets, job.task, job.precision), optimizer, torch.full((), -1, device=parameters[0].device))
    if job.config.ema:
        state.ema = {k: t.detach().clone() for k, t in state.weights().items()}
    found = run.last()
    if found is None:
        return state, Place(0, 0, 0)
    with trust.believing(run.path / "checkpoints" / f"step-{run.last_saved}"):
        state.restore(*found)
    return state, Place(**found[1]["place"])


def _epoch(job: Job, run: Run, state: State, place: Place, steps: int, clock: "Clock", progress: Progress) -> Place:
    """From where it stands to the end of the epoch, or of the run."""
    draw, length = rng.draw(job.config.seed, place.epoch), job.order.steps(place.epoch)
    for index in range(place.index, length):
        clock.start()
        chunks = job.train.step(job.order, place.epoch, index, job.config.chunks, job.config.batch, draw)
        clock.data()
        norm = step(job, state, chunks, place)
        place = Place(place.step + 1, place.epoch, index + 1)
        clock.stop(sum(len(c.ids) for c in chunks))
        progress.step(place.epoch, (index + 1) / length, state.shown, clock.rate, clock.mean_s * (steps - place.step))
        if place.step % job.config.log_steps == 0 or index + 1 == length or place.step == steps:
            _log(job, run, state, place, norm)
        if index + 1 == length or place.step == steps:
            break
        if clock.save_is_due or run.stop:
            _check(job, state)
            clock.save(run, state, place)
        if run.stop:
            raise stopped(run.stop)
    _end_of_epoch(job, run, state, place, clock, progress)
    place = Place(place.step, place.epoch + 1, 0)
    if clock.save_is_due or run.stop:
        clock.save(run, state, place)
    if run.stop and place.step < steps:
        raise stopped(run.stop)
    return place


def step(job: Job, state: State, chunks: list[Chunk], place: Place) -> Tensor:
    """One update. Returns () the norm of the gradient."""
    count = sum(job.task.count(chunk) for chunk in chunks)  # before any forward pass, so that each chunk can be divided by it
    seen: Sums = {}
    for c, chunk in enumerate(chunks):
        torch.manual_seed(rng.chunk_seed(job.config.seed, place.epoch, place.index, c))
        # 1 forward pass and 2 loss
        total, carry, told = state.objective(chunk, state.carry.get(c))
        state.carry[c] = detached(carry)
        # 3 backward pass: gradients of the chunks add up
        (total / count).backward()
        seen = add(seen, {"loss": total.detach(), "n": job.task.count(chunk), **told})
    # 4 update, unless a gradient was not finite now or ever before
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters, job.optim.clip)
    state.bad_step = torch.where((state.bad_step < 0) & ~torch.isfinite(norm), place.step, state.bad_step)
    bad = (state.bad_step >= 0).to(torch.float32)
    state.optimizer.found_inf = bad  # type: ignore[attr-defined]
    for group in state.optimizer.param_groups:
        group["lr"] = job.optim.lr * job.optim.factor(place.step / job.steps)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.objective.commit(1 - bad)
    if state.ema:
        average(state.ema, state.weights(), min(job.config.ema, (1 + place.step) / (10 + place.step)), 1 - bad)
    state.seen, state.epoch_seen = add(state.seen, seen), add(state.epoch_seen, seen)
    return norm


def add(a: Sums, b: Sums) -> Sums:
    return {k: a[k] + b[k] if k in a else b[k] for k in b} if a else dict(b)


def stopped(why: str) -> UserError:
    code = INTERRUPTED if why == "SIGINT" else STOPPED
    return UserError(
        _("stopped; everything done so far is saved"), "", _("type the same command: it goes on where it was"), code=code, name="stopped"
    )


def _figures(seen: Sums) -> str:
    """ "loss 0.142  accuracy 95.4 %" from the sums of the training passes."""
    n, loss = float(seen["n"]), float(seen["loss"]) / float(seen["n"])
    text = _("loss {value}").format(value=number(loss, 3) if loss < 1e5 else f"{loss:.1e}")
    return text + (_("  accuracy {share}").format(share=percent(float(seen["right"]) / n)) if "right" in seen else "")


def _log(job: Job, run: Run, state: State, place: Place, norm: Tensor) -> None:
    """The only place between two epochs where the host waits for the device."""
    _check(job, state)
    n = float(state.seen["n"])
    told = {k: float(v) / n for k, v in state.seen.items() if k != "n"}
    rate = job.optim.lr * job.optim.factor((place.step - 1) / job.steps)
    run.event(kind="step", step=place.step, epoch=place.epoch, n=n, lr=rate, norm=float(norm), **told)
    state.seen, state.shown = {}, _figures(state.epoch_seen)


def _check(job: Job, state: State) -> None:
    """End the run when a gradient was not finite.

    The weights are still those of the last good step: play the bad one again to see whose it was.
    """
    bad = int(state.bad_step)
    if bad < 0:
        return
    epoch, index = 0, bad
    while index >= job.order.steps(epoch):
        epoch, index = epoch + 1, index - job.order.steps(epoch)
    chunks = job.train.step(job.order, epoch, index, job.config.chunks, job.config.batch, rng.draw(job.config.seed, epoch))
    ids = [int(i) for chunk in chunks for i, w in zip(chunk.ids, chunk.weight, strict=True) if w > 0]
    culprits = [int(i) for chunk in chunks for i in chunk.ids[_not_finite(job, chunk)]]
    layers = [n for n, p in state.objective.nets.named_parameters() if not torch.isfinite(p).all()]
    what = _("the loss or its gradient is not a finite number at step {step}; nothing from that step on was applied").format(step=bad + 1)
    whose = _("examples {ids}").format(ids=listed(map(str, culprits or ids), 8))
    whose += _(" · layers {names}").format(names=listed(layers)) if layers else ""
    do = _("lower optim.lr (now {lr}) or set optim.clip = 1, and look at those examples; no weight was touched since")
    raise UserError(what, whose, do.format(lr=job.optim.lr), code=FAILED, name="not-finite")


@torch.no_grad()
def _not_finite(job: Job, chunk: Chunk) -> Tensor:
    """(B,) whose own loss or input is not finite."""
    for net in job.nets.values():
        net.eval()  # batch normalisation would spread one bad row over all
    with job.precision.autocast(chunk.weight.device):
        _sums, _carry, rows = job.task.measure(job.nets, job.precision.place(chunk), None)
    wrong = ~torch.isfinite(rows["loss"])
    for t in chunk.data.values():
        if t.is_floating_point():
            wrong |= ~torch.isfinite(t.reshape(len(t), -1)).all(1)
    return wrong & (chunk.weight > 0)


def _end_of_epoch(job: Job, run: Run, state: State, place: Place, clock: "Clock", progress: Progress) -> None:
    """Validate, keep the best, tell the person. The validation part is all that selection ever sees."""
    figures, event = _figures(state.epoch_seen), {}
    n = float(state.epoch_seen["n"])
    event = {f"train_{k}": float(v) / n for k, v in state.epoch_seen.items() if k != "n"}
    if job.validation is not None:
        t0, live = time.perf_counter(), {k: t.detach().clone() for k, t in state.weights().items()} if state.ema else {}
        state.load_weights(state.ema or {})
        sums, _rows = evaluate(job.nets, job.task, job.validation, job.precision, job.config.test_batch)
        state.load_weights(live)
        clock.validation_s += time.perf_counter() - t0
        found = job.task.figures(sums)
        event |= {f"validation_{k}": f.value for k, f in found.items()}
        figures += _("  validation {figure}").format(figure=told(job.task.choose[0], found[job.task.choose[0]].value))
        _select(job, state, place, found)
    run.event(kind="epoch", step=place.step, epoch=place.epoch, best_step=state.best_step, **event)
    progress.epoch(place.epoch, figures, clock.rate)
    state.epoch_seen, state.carry = {}, {}


def _select(job: Job, state: State, place: Place, found: dict[str, Figure]) -> None:
    name, sign = job.task.choose
    value = (sign * found[name].value, -found["loss"].value)  # equal accuracy: the lower loss
    if all(math.isfinite(v) for v in value) and value > state.best_value:
        state.best_value, state.best_step, state.waited = value, place.step, 0
        if job.config.select == "best":
            state.best = {k: t.detach().clone() for k, t in state.chosen().items()}
    else:
        state.waited += 1


class Clock:
    """Durations only: nothing depends on what time it is."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.waiting_s = self.validation_s = self.saving_s = 0.0
        self.rows = 0
        self._t0 = self._saved = self.begun = time.perf_counter()
        self._last_save_s = 0.25  # a first guess; then what the last one took
        self.first_step_at = 0.0

    def start(self) -> None:
        self._t0 = time.perf_counter()

    def data(self) -> None:
        self.waiting_s += time.perf_counter() - self._t0

    def stop(self, rows: int) -> None:
        self.steps_s.append(time.perf_counter() - self._t0)
        self.rows += rows
        self.first_step_at = self.first_step_at or time.perf_counter()

    @property
    def mean_s(self) -> float:
        recent = self.steps_s[-20:]
        return sum(recent) / max(len(recent), 1)

    @property
    def rate(self) -> float:
        """Examples a second of late."""
        return self.rows / max(len(self.steps_s), 1) / max(self.mean_s, 1e-9)

    @property
    def save_is_due(self) -> bool:
        """A checkpoint may cost 1 % of the time since the last."""
        return time.perf_counter() - self._saved > 100 * self._last_save_s

    def save(self, run: Run, state: State, place: Place) -> None:
        t0 = time.perf_counter()
        numbers = {"place": asdict(place), "seconds": run.spent_s + t0 - self.begun, **state.numbers()}
        run.save(place.step, state.tensors(), numbers)
        self._saved = time.perf_counter()
        self._last_save_s = self._saved - t0
        self.saving_s += self._last_save_s
