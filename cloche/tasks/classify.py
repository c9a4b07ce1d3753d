"""Which class an example belongs to; with BCE also yes or no, and any number of labels at once."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
import torch
from torch import Tensor
import torch.nn.functional as F

from cloche.config import Fault, Port, RecipeError, TaskConfig, instead, show
from cloche.data.chunk import Chunk, Part
from cloche.errors import UserError
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, average, averages, given, scores, share
from cloche.tasks.task import Task
from cloche.words import _


class ClassifyConfig(TaskConfig):
    kind: Literal["classify"] = "classify"
    fits: ClassVar = ("pictures", "columns")
    loss: Literal["auto", "cross_entropy", "bce"] = Field(
        "auto", description=_("softmax and cross-entropy over classes, or a yes or no for each label")
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description=_("share of the right class's probability that is wanted of all classes alike"))

    def resolve(self, facts: dict[str, Any]) -> "ClassifyConfig":
        """auto: cross-entropy for three classes and more, BCE for two or for several labels at once."""
        labels, multi = facts["labels"], facts["multi"]
        fits = "bce" if multi or len(labels) == 2 else "cross_entropy"
        if not labels:
            raise RecipeError([instead("task.kind", "classify", _("the labels of this data are numbers"), "regress")])
        if len(labels) < 2:
            raise UserError(_("only one class: {name}").format(name=labels[0]), "", _("a classifier needs at least two"))
        if self.loss not in ("auto", fits) and (self.loss == "bce" or multi):  # two classes may choose
            told = _("bce is for two classes or several labels at once, cross_entropy for one class of many")
            raise RecipeError([instead("task.loss", self.loss, told, fits)])
        loss = fits if self.loss == "auto" else self.loss
        if self.smoothing and loss == "bce":
            told = _("is for cross_entropy, the loss here is bce")
            raise RecipeError([Fault(f"task.smoothing = {show(self.smoothing)}", told, _("leave it out"), ("task.smoothing", "0"))])
        return self.model_copy(update={"loss": loss})

    def build(self, prepare: Any, facts: dict[str, Any]) -> "Classify":
        return Classify(tuple(facts["labels"]), self.loss, facts["multi"], prepare.port, self.smoothing)


class Classify(Task):
    """K classes. `cross_entropy`: K logits. `bce`: one logit for two classes, K for several labels at once."""

    face: ClassVar = "maps"
    choose: ClassVar = ("accuracy", 1)
    headline: ClassVar = "accuracy"

    def __init__(self, labels: tuple[str, ...], loss: str, multi: bool, inputs: Port, smoothing: float = 0.0) -> None:
        self.labels, self.bce, self.multi, self.smoothing = labels, loss == "bce", multi, smoothing
        self.binary = self.bce and not multi
        self.ports = {"net": (inputs, Port("vector", (1,) if self.binary else (len(labels),), len(labels)))}

    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        logits = nets["net"](given(chunk)).float()  # (B, K)
        total = (self._losses(logits, chunk.data["label"], self.smoothing) * chunk.weight).sum()
        return total, None, {"right": (self._right(logits, chunk.data["label"]) * chunk.weight).sum().detach()}

    def measure(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Sums, Carry, dict[str, Tensor]]:
        logits, label, w = nets["net"](given(chunk)).float(), chunk.data["label"], chunk.weight.double()
        losses, k = self._losses(logits, label), len(self.labels)
        sums = {"loss": (losses * w).sum(), "n": w.sum(), "right": (self._right(logits, label) * w).sum()}
        if self.multi:
            said, true = (logits > 0).double() * w[:, None], label.double() * w[:, None]
            sums |= {"hits": (said * true).sum(0), "predicted": said.sum(0), "support": true.sum(0)}
            best = said.long().argmax(1)
        else:
            best = self._best(logits)
            sums["confusion"] = torch.bincount(label * k + best, w, minlength=k * k).view(k, k)
        return sums, None, {"loss": losses, "predicted": best, "probability": self.probabilities(logits).amax(1)}

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        """The likeliest label (or all that are likelier than not) and every probability, likeliest first."""
        out = []
        for row in self.probabilities(nets["net"](given(chunk)).float()).tolist():
            ranked = dict(sorted(zip(self.labels, row, strict=True), key=lambda pair: -pair[1]))
            names = [name for name, p in ranked.items() if p > 0.5] if self.multi else next(iter(ranked))
            out.append({"labels" if self.multi else "label": names, "probabilities": ranked})
        return out

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) logits → (B, K), softmax or sigmoid."""
        if self.binary:
            yes = torch.sigmoid(logits)
            return torch.cat([1 - yes, yes], 1)
        return torch.sigmoid(logits) if self.bce else F.softmax(logits, 1)

    def figures(self, sums: Sums) -> dict[str, Figure]:
        out = {"accuracy": share(float(sums["right"]), float(sums["n"])), "loss": average(sums)}
        return out | {k: Figure(v, n=int(sums["n"])) for k, v in averages(self.table(sums), self.multi).items()}

    def table(self, sums: Sums) -> dict[str, np.ndarray]:
        """Precision, recall, F1, support and how often predicted, (K,) each."""
        if not self.multi:
            c = sums["confusion"]  # (true, predicted)
            sums = {"hits": c.diagonal(), "predicted": c.sum(0), "support": c.sum(1)}
        return scores(*(sums[k].cpu().numpy() for k in ("hits", "predicted", "support")))

    def known(self, train: Part) -> dict[str, Any]:
        """The commonest answer of the training part."""
        sets, counts = np.unique(train.field("label"), axis=0, return_counts=True)
        return {"label": sets[counts.argmax()].tolist()}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        """What always giving that answer gets."""
        label, common = part.field("label").reshape(len(part), -1), np.array(known["label"]).reshape(-1)
        answer = (", ".join(np.array(self.labels)[common > 0]) or "–") if self.multi else self.labels[common[0]]
        figure = share(int((label == common).all(1).sum()), len(label))
        return {_('always answering "{answer}"').format(answer=answer): figure}

    def _losses(self, logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
        """(B,) float32; over several labels the mean. smoothing: never where it is measured (Szegedy et al. 2015, section 7)."""
        if not self.bce:
            return F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        target = label.float()[:, None] if self.binary else label
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)

    def _best(self, logits: Tensor) -> Tensor:
        return (logits[:, 0] > 0).long() if self.binary else logits.argmax(1)

    def _right(self, logits: Tensor, label: Tensor) -> Tensor:
        return ((logits > 0) == (label > 0.5)).all(1) if self.multi else self._best(logits) == label
