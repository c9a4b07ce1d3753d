"""What a source text is in another language or form: the loss by token, the figures by writing the whole target out."""

from statistics import mode
from typing import Any, ClassVar, Literal

from pydantic import Field
from sacrebleu.metrics import BLEU
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.config import TaskConfig
from cloche.data.chunk import Chunk, Part
from cloche.data.pairs import PAD, UNK, PairsPrepare
from cloche.decode.beam import beam, greedy
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, average, share
from cloche.tasks.task import Task, pairs
from cloche.words import _


class TranslateConfig(TaskConfig):
    kind: Literal["translate"] = "translate"
    fits: ClassVar = ("pairs",)
    smoothing: float = Field(0.0, ge=0, lt=1, description=_("share of the right token's probability that is wanted of all tokens alike"))
    beam: int = Field(1, ge=1, le=100, description=_("how many targets are followed at once when answering; 1 takes the likeliest token"))

    def build(self, prepare: PairsPrepare, facts: dict[str, Any]) -> "Translate":
        return Translate(prepare, self)


class Translate(Task):
    """Teacher forcing: target token u + 1 is foretold from the source and the true tokens 0 … u."""

    face: ClassVar = "pairs"
    headline: ClassVar = "exact"

    def __init__(self, prepare: PairsPrepare, config: TranslateConfig) -> None:
        self.prepare, self.smoothing, self.width, self.ports = prepare, config.smoothing, config.beam, {"net": (prepare.port,) * 2}
        self.limit = prepare.longest + prepare.longest // 4 + 1  # a target may be a quarter longer than the longest in training

    def size(self, chunk: Chunk) -> Tensor:
        return chunk.data["target_len"] - 1

    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        return (self.losses(nets, chunk, self.smoothing) * chunk.weight).sum(), None, {}

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        return [{"text": self.prepare.text(ids)} for ids in self.written(nets["net"], chunk)]

    def written(self, net: nn.Module, chunk: Chunk) -> list[list[int]]:
        memory = net.encode(chunk.data["source"], chunk.data["source_len"])
        return greedy(net, memory, self.limit) if self.width == 1 else beam(net, memory, self.limit, self.width)

    def truth(self, chunk: Chunk) -> list[str]:  # an unknown token leaves a mark, so that no answer equals it
        return [self.prepare.text(row) + "\ufffd" * (UNK in row) for row in chunk.data["target"].tolist()]

    def score(self, answers: list[dict[str, Any]], chunk: Chunk, nets: Nets) -> Sums:
        """Exact matches and rows; what corpus BLEU is made of: n-grams of 1 … 4 words that match, those that there are, lengths."""
        said, true = map(list, zip(*pairs(self, answers, chunk), strict=True))
        found = BLEU(force=True).corpus_score(said, [true])  # force: no warning about text that looks cut into words already
        grams = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        return {"exact": torch.tensor([sum(map(str.__eq__, said, true)), len(true)]).double(), "bleu": torch.tensor(grams).double()}

    def figures(self, sums: Sums) -> dict[str, Figure]:
        """loss: nats a token. exact: share of answers that are the target. bleu: of all answers together, 0 … 100."""
        out = {"loss": average(sums)}
        if "exact" in sums:
            (right, rows), grams = sums["exact"].tolist(), sums["bleu"].long().tolist()
            bleu = BLEU.compute_bleu(grams[:4], grams[4:8], *grams[8:], smooth_method="exp").score
            out |= {"exact": share(right, rows), "bleu": Figure(bleu, n=int(rows))}
        return out

    def known(self, train: Part) -> dict[str, Any]:
        return {"text": mode(self._texts(train, "target"))}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        source, true = (self._texts(part, side) for side in ("source", "target"))
        always, copied = _('always answering "{answer}"').format(answer=known["text"]), sum(map(str.__eq__, source, true))
        return {_("copying the source"): share(copied, len(true)), always: share(true.count(known["text"]), len(true))}

    def _texts(self, part: Part, side: str) -> list[str]:
        return [self.prepare.text(part.store.fields[side][i].tolist()) for i in part.ids]

    def losses(self, nets: Nets, chunk: Chunk, smoothing: float = 0.0) -> Tensor:
        source, length, target = (chunk.data[name] for name in ("source", "source_len", "target"))
        logits = nets["net"](source, length, target[:, :-1]).float().transpose(1, 2)  # (B, V, U - 1)
        return F.cross_entropy(logits, target[:, 1:], ignore_index=PAD, reduction="none", label_smoothing=smoothing).sum(1)
