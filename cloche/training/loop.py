"""The loop: every net of every family is trained here and nowhere else.

A step has four acts, one after the other: forward pass, loss, backward pass, update. Gradients add up over a step's
chunks and are cleared after the update. A step's loss is the sum over its rows ÷ their count, however they are cut and
whichever process did them.
"""

from contextlib import nullcontext
import time

import torch
from torch import Tensor

from cloche import rng, trust
from cloche.data.chunk import Chunk
from cloche.tasks.metrics import Sums, told
from cloche.training.clock import Clock
from cloche.training.evaluate import Interrupted, evaluate
from cloche.training.fault import check, no_memory, parameters, smaller, stopped
from cloche.training.job import Job, Place
from cloche.training.log import Progress, say
from cloche.training.objective import Objective, average, detached, gradient_norm
from cloche.training.optim import inner_of
from cloche.training.parallel import Group
from cloche.training.run import Run
from cloche.training.state import State
from cloche.words import _, number, percent


def loop(job: Job, run: Run, progress: Progress | None = None) -> tuple[Place, Clock]:
    """Train to the end, from the newest checkpoint where there is one. The nets hold the chosen weights afterwards.

    Raises: UserError when a gradient was not finite (naming step, layer and examples), when there was no memory, or when a signal
    asked to stop.
    """
    clock, progress = Clock(run.save_s), progress or Progress(job.epochs, job.noun, quiet=True)
    run.looping = True
    try:
        with rng.apart(job.train.device), job.precision.products():
            state, place = start(job, run)
            with job.group.watched(lambda: place.step + 1):
                # an epoch that was read but not validated when the run was stopped has an index still
                while place.index or (place.step < job.steps and not (job.config.patience and state.waited >= job.config.patience)):
                    place = _epoch(job, run, state, place, clock, progress)
                if run.last_saved < place.step:  # durable before anything else can fail
                    clock.save(run, state, place)
    finally:
        run.looping = False
    if run.stop:  # it came too late for a step or a validation to see it; what follows may take minutes
        raise stopped(run.stop)
    run.best_step = state.best_step if state.best else place.step
    state.load_weights(state.best or state.chosen())
    return place, clock


def start(job: Job, run: Run) -> tuple[State, Place]:
    for name, net in job.nets.items():
        net.train(name in job.trained)
        if name not in job.trained:
            net.requires_grad_(False)
    job.precision.apply(job.nets)
    trained = [p for n in job.trained for p in job.nets[n].parameters() if p.requires_grad]
    inner = inner_of(job.nets[n] for n in job.trained)
    objective = Objective(job.nets, job.task, job.precision)
    forward = job.group.wrap(objective, job.config.exact_sum)
    state = State(job, objective, forward, job.optim.build(trained, inner), torch.full((), -1, device=trained[0].device))
    if job.config.ema:
        state.ema = {k: t.detach().clone() for k, t in state.weights().items()}
    found = run.last()
    if found is None:
        return state, Place(0, 0, 0)
    with trust.believing(run.path / "checkpoints" / f"step-{run.last_saved}"):
        state.restore(*found)
    return state, Place(**found[1]["place"])


def _epoch(job: Job, run: Run, state: State, place: Place, clock: Clock, progress: Progress) -> Place:
    """From where it stands to the end of the epoch, or of the run."""
    draw, length = rng.draw(job.config.seed, place.epoch), job.order.steps(place.epoch)
    end = min(length, place.index + job.steps - place.step)
    while place.index < end:
        clock.start()
        chunks = job.chunks(place.epoch, place.index, draw)
        clock.data()
        norm = _remembering(job, run, state, chunks, place, clock)
        if norm is None:  # the same step again, in smaller chunks
            continue
        place = Place(place.step + 1, place.epoch, place.index + 1)
        clock.stop(sum(len(c.ids) for c in chunks))
        progress.step(place.epoch, place.index / length, state.shown, clock.rate, clock.mean_s * (job.steps - place.step))
        if place.step % job.config.log_steps == 0 or place.index == end:
            _log(job, run, state, place, norm)
        if place.index < end:
            _pause(job, run, state, place, clock)
    try:
        _end_of_epoch(job, run, state, place, clock, progress)
    except Interrupted:  # a signal in a validation that may take minutes: it begins again where it began
        clock.save(run, state, place)
        raise stopped(run.stop) from None
    except (RuntimeError, MemoryError) as fault:
        if no_memory(fault) and job.group.size == 1:
            clock.save(run, state, place)
        raise
    place = Place(place.step, place.epoch + 1, 0)
    _pause(job, run, state, place, clock)
    return place


def _pause(job: Job, run: Run, state: State, place: Place, clock: Clock) -> None:
    """Between two steps: a checkpoint where one is due, an end where a signal asked for it; of several processes, all or none."""
    stop, due = job.group.agree(run.stop, clock.save_is_due)
    if stop or due:
        check(job, run, state)
        clock.save(run, state, place)
    if stop and place.step < job.steps:
        raise stopped(stop)


def _remembering(job: Job, run: Run, state: State, chunks: list[Chunk], place: Place, clock: Clock) -> Tensor | None:
    """`step`; where the machine has no memory for it, None once its chunks are smaller, or a fault that says what to do."""
    carry, why = dict(state.carry), ""
    try:
        return step(job, state, chunks, place)
    except (RuntimeError, MemoryError) as fault:
        if not no_memory(fault):
            raise
        why = str(fault).partition("\n")[0] or type(fault).__name__
    state.carry = carry  # out here what the failed pass held is free again
    alone = job.group.size == 1  # else the others wait in another sum
    if alone:
        check(job, run, state)  # nothing is saved beyond a bad step
    told = smaller(job, run, state, place, why)
    if alone:
        clock.save(run, state, place)  # with what was logged; killed after this, the steps before are not done in smaller chunks
    if told:
        raise told
    say(_("no memory for step {step}: train.chunks = {n} from here on (other bits)").format(step=place.step + 1, n=job.config.chunks))
    return None


def step(job: Job, state: State, chunks: list[Chunk], place: Place) -> Tensor:
    """One update. Returns () the norm of the gradient."""
    group, ordered = job.group, job.group.size > 1 and job.config.exact_sum
    group.at(place.step)
    # the rows of all chunks, before any forward pass, so that each chunk can be divided by it
    counts = [job.task.count(chunk) * (not chunk.idle) for chunk in chunks]
    count = group.sum(sum(counts))
    seen: Sums = {}
    for k, chunk in enumerate(chunks):
        c = group.rank + k * group.size
        torch.manual_seed(rng.chunk_seed(job.config.seed, place.epoch, place.index, c))
        with nullcontext() if k == len(chunks) - 1 else group.apart(state.forward):
            # 1 forward pass and 2 loss
            total, carry, told = state.forward(chunk, state.carry.get(c))
            # 3 backward pass: gradients of the chunks add up
            (total / count).backward()
        if not chunk.idle:
            state.carry[c] = detached(carry)
        seen = add(seen, {"loss": total.detach(), "n": counts[k], **told})
        if ordered:
            state.order(chunk)
    # 4 update, unless a gradient was not finite now or ever before
    state.settle()
    trained = parameters(state)
    norm = gradient_norm(trained, job.optim.clip)
    wrong = group.sum((~torch.isfinite(seen["loss"])).to(torch.float32)) + ~torch.isfinite(norm)  # a loss of any process's
    state.bad_step = torch.where((state.bad_step < 0) & (wrong > 0), place.step, state.bad_step)
    bad = (state.bad_step >= 0).to(torch.float32)
    state.optimizer.found_inf = bad  # type: ignore[attr-defined]
    for settings in state.optimizer.param_groups:
        settings["lr"] = job.optim.lr * job.optim.factor(place.step / job.steps)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.objective.commit(1 - bad, group if not ordered else Group())
    if state.ema:
        average(state.ema, state.weights(), min(job.config.ema, (1 + place.step) / (10 + place.step)), 1 - bad)
    state.seen, state.epoch_seen = add(state.seen, seen), add(state.epoch_seen, seen)
    return norm


def add(a: Sums, b: Sums) -> Sums:
    return {k: a[k] + b[k] if k in a else b[k] for k in b} if a else dict(b)


def _figures(seen: Sums) -> str:
    """ "loss 0.142  accuracy 95.4 %" from the sums of the training passes."""
    n, loss = float(seen["n"]), float(seen["loss"]) / float(seen["n"])
    text = _("loss {value}").format(value=number(loss, 3) if loss < 1e5 else f"{loss:.1e}")
    return text + (_("  accuracy {share}").format(share=percent(float(seen["right"]) / n)) if "right" in seen else "")


def _log(job: Job, run: Run, state: State, place: Place, norm: Tensor) -> None:
    """The only place between two epochs where the host waits for the device."""
    check(job, run, state)
    state.fold()
    if job.group.leads:
        n = float(state.seen["n"])
        told = {k: float(v) / n for k, v in state.seen.items() if k != "n"}
        rate = job.optim.lr * job.optim.factor((place.step - 1) / job.steps)
        run.event(kind="step", step=place.step, epoch=place.epoch, n=n, lr=rate, norm=float(norm), **told)
        first, lowest = state.losses or (told["loss"], told["loss"])
        if told["loss"] > max(10 * lowest, first / 2):  # Megatron's factor; near zero ten times nothing is still nothing
            run.event(kind="leap", step=place.step, loss=told["loss"], lowest=lowest)
            say(
                _("the loss has leapt to {loss} at step {step} (lowest {lowest}); optim.clip = 1 bounds a step").format(
                    loss=number(told["loss"], 3), step=place.step, lowest=number(lowest, 3)
                )
            )
        state.losses = (first, min(lowest, told["loss"]))
        state.shown = _figures(state.epoch_seen)
    state.seen = {}


def _end_of_epoch(job: Job, run: Run, state: State, place: Place, clock: Clock, progress: Progress) -> None:
    """Validate, keep the best, tell the person. The validation part is all that selection ever sees."""
    figures, event = "", {}
    if job.group.leads:
        figures, n = _figures(state.epoch_seen), float(state.epoch_seen["n"])
        event = {f"train_{k}": float(v) / n for k, v in state.epoch_seen.items() if k != "n"}
    if job.validation is not None:
        t0, live = time.perf_counter(), {k: t.detach().clone() for k, t in state.weights().items()} if state.ema else {}
        state.load_weights(state.ema or {})
        try:
            sums, _rows = evaluate(job.nets, job.task, job.validation, job.precision, job.config.test_batch, job.group, lambda: run.stop)
        finally:
            state.load_weights(live)
        clock.validation_s += time.perf_counter() - t0
        found = job.task.figures(sums)
        event |= {f"validation_{k}": f.value for k, f in found.items()}
        figures += _("  validation {figure}").format(figure=told(job.task.choose[0], found[job.task.choose[0]].value))
        state.select(place, found)
    run.event(kind="epoch", step=place.step, epoch=place.epoch, best_step=state.best_step, **event)
    progress.epoch(place.epoch, figures, clock.rate)
    state.epoch_seen, state.carry = {}, {}
