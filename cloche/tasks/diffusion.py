"""Pictures from noise, under a prompt: a net learns to tell the noise in a noised picture, at every level of it.

learn    picture, caption, level, noise ─ x = α·x0 + σ·ε ─ net(x, level, text(caption)) ≈ v = α·ε − σ·x0
answer   noise ─ [net with and without the prompt ─ guidance ─ x0 ─ solver] × steps ─ picture
"""

from typing import Any, ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor

from cloche import rng
from cloche.config import Fault, Port, RecipeError, TaskConfig
from cloche.data.chunk import Chunk, Part
from cloche.decode.diffusion import SOLVERS, Denoise, from_velocity, generators, guided, noised, normal, schedule, velocity
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, average, share
from cloche.tasks.task import Task
from cloche.words import _

UNTOLD = 0.1  # share of the training rows without their caption, so that the net knows both (Ho & Salimans 2022, section 3.2)


class DiffusionConfig(TaskConfig):
    kind: Literal["diffusion"] = "diffusion"
    fits: ClassVar = ("captions",)
    guidance: float = Field(1.5, ge=0, description=_("how far the prompt pulls: 1 as learned; more: truer to it, and less varied"))
    steps: int = Field(20, ge=1, le=1000, description=_("steps from noise to picture"))
    sampler: Literal["ddim", "ddpm"] = Field("ddim", description=_("ddim draws noise once, ddpm anew in each step"))
    samples: int = Field(600, ge=1, description=_("pictures that are drawn to be judged"))
    judge: str = Field("", description=_('a run of a classifier, or "recipe:NAME", that says what the pictures show; "" for none'))

    def resolve(self, facts: dict[str, Any]) -> "DiffusionConfig":
        if facts["labels"] or not self.judge:
            return self
        raise RecipeError([Fault("task.judge", _("these captions have no classes that a judge could name"), 'task.judge = ""')])

    def build(self, prepare: Any, facts: dict[str, Any]) -> "Diffusion":
        return Diffusion(self, prepare)


class Diffusion(Task):
    face: ClassVar = "denoises"
    headline: ClassVar = "agreement"  # where there is a judge

    def __init__(self, config: DiffusionConfig, prepare: Any) -> None:
        self.config, self.prepare, self.samples = config, prepare, config.samples if config.judge else 0
        self.ports = {"net": (prepare.port, prepare.port), "text": (prepare.words, Port("memory", (None, None)))}

    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        time, told = rng.uniform(chunk.draw, rng.NOISE, chunk.at, 2).unbind(1)  # (B,) each
        losses = self._errors(nets, chunk, time, told >= UNTOLD, torch.randn_like(chunk.data["image"]))
        return (losses * chunk.weight).sum(), None, {}

    def losses(self, nets: Nets, chunk: Chunk) -> Tensor:
        """Each row at a time and with a noise of its own, the same whenever it is asked."""
        time, noise = rng.uniform(0 * chunk.draw, rng.NOISE, chunk.ids, 1)[:, 0], normal(generators(chunk.ids), chunk.data["image"])
        return self._errors(nets, chunk, time, time >= 0, noise)

    def _errors(self, nets: Nets, chunk: Chunk, time: Tensor, told: Tensor, noise: Tensor) -> Tensor:
        """(B,) float32 mean squared error of v over a picture, the weight of the levels as Salimans & Ho 2022: SNR + 1."""
        x0, level, memory = chunk.data["image"], schedule(time), nets["text"](chunk.data["caption"], chunk.data["caption_len"] * told)
        v = nets["net"](noised(x0, level, noise), level, memory).float()
        return (v - velocity(x0, level, noise)).square().flatten(1).mean(1)

    def denoiser(self, nets: Nets, chunk: Chunk) -> Denoise:
        """The x0 that the nets believe in under the chunk's captions; with and without them in one batch of twice the rows."""
        tokens, length = chunk.data["caption"], chunk.data["caption_len"]
        memory = nets["text"](torch.cat([tokens, tokens]), torch.cat([length, 0 * length]))

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            told, untold = nets["net"](torch.cat([x, x]), torch.cat([level, level]), memory).float().chunk(2)
            return from_velocity(x, level, guided(told, untold, self.config.guidance))[0].clamp(-1, 1)

        return denoise

    def sample(self, denoise: Denoise, ids: Tensor) -> Tensor:
        mine, empty = generators(ids), torch.zeros(len(ids), *self.prepare.port.shape, device=ids.device)
        levels = schedule(torch.linspace(1, 0, self.config.steps + 1, device=ids.device))
        return SOLVERS[self.config.sampler](denoise, normal(mine, empty), levels, mine)  # (B, C, h, w) in −1..1

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        drawn = map(self.prepare.pictures.pixels_of, self.sample(self.denoiser(nets, chunk), chunk.ids))  # (h, w, C) in 0..1
        return [{"image": image.astype(float).round(4).tolist()} for image in drawn]

    def score(self, answers: list[dict[str, Any]], chunk: Chunk, nets: Nets) -> Sums:
        if "judge" not in nets:
            return {}
        pictures = torch.tensor([a["image"] for a in answers], device=chunk.ids.device).permute(0, 3, 1, 2)  # (B, C, h, w)
        agreed, w = nets["judge"](pictures).argmax(1) == chunk.data["label"], chunk.weight.double()
        return {"agreed": (agreed * w).sum(), "judged": w.sum()}

    def figures(self, sums: Sums) -> dict[str, Figure]:
        loss = {"loss": average(sums)}
        return loss | ({"agreement": share(float(sums["agreed"]), float(sums["judged"]))} if "agreed" in sums else {})

    def known(self, train: Part) -> dict[str, Any]:
        return {"label": int(torch.from_numpy(train.field("label")).bincount().argmax())}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        same, told = part.field("label") == known["label"], _('always drawing "{name}"')
        return {told.format(name=self.prepare.labels[known["label"]]): share(int(same.sum()), len(same))} if self.config.judge else {}
