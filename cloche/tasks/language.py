"""Which token comes next: the loss in nats a token; the figure in bits a byte, which compares tokens of any kind."""

from collections import Counter
import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F

from cloche.config import TaskConfig
from cloche.data.chunk import Chunk, Part
from cloche.data.text import TextPrepare
from cloche.decode.text import check_prompt
from cloche.tasks.metrics import Carry, Figure, Nets, Sums, average
from cloche.tasks.ngram import probabilities
from cloche.tasks.task import Task
from cloche.words import _


class LanguageConfig(TaskConfig):
    kind: Literal["language"] = "language"
    fits: ClassVar = ("text",)

    def build(self, prepare: TextPrepare, facts: dict[str, Any]) -> "Language":
        return Language(prepare)


class Language(Task):
    """Token t + 1 of a row is foretold from the tokens 0 … t, and from what the net carries over from the row before."""

    face: ClassVar = "continues"
    choose: ClassVar = ("bits_per_byte", -1)
    headline: ClassVar = "bits_per_byte"

    def __init__(self, prepare: TextPrepare) -> None:
        self.ports, self.unknown = {"net": (prepare.port, prepare.port)}, -1 if prepare.pieces[0] else 0
        texts = (prepare.decode([n]).decode(errors="replace") for n in range(len(prepare.pieces)))
        self.texts = [t[1:] if self.unknown == 0 and t[1:] and t[0] == " " else t for t in texts]  # a word is one answer wherever it stands

    def size(self, chunk: Chunk) -> Tensor:
        return (chunk.data["bytes"][:, 1:] > 0).sum(1)

    def loss(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Tensor, Carry, Sums]:
        losses, carry = self.losses(nets, chunk, carry)
        return (losses * chunk.weight[:, None]).sum(), carry, {}

    def losses(self, nets: Nets, chunk: Chunk, carry: Carry = None) -> tuple[Tensor, Carry]:
        """(B, T) float32 nats, 0 where nothing is to be foretold."""
        tokens, real = chunk.data["tokens"], chunk.data["bytes"][:, 1:] > 0
        logits, carry = nets["net"](tokens[:, :-1], carry)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(real) * real, carry

    def bits(self, losses: Tensor, chunk: Chunk) -> Tensor:
        """(B, T): what each token costs; an unknown one is spelled out besides, 8 bits a byte."""
        return losses.double() / math.log(2) + 8 * chunk.data["bytes"][:, 1:] * (chunk.data["tokens"][:, 1:] == self.unknown)

    def measure(self, nets: Nets, chunk: Chunk, carry: Carry) -> tuple[Sums, Carry, dict[str, Tensor]]:
        losses, carry = self.losses(nets, chunk, carry)
        w, size = chunk.weight.double(), chunk.data["bytes"][:, 1:]
        both = torch.stack([self.bits(losses, chunk).sum(1), size.sum(1).double()])  # (2, B)
        sums = {"loss": (losses.sum(1) * w).sum(), "n": self.count(chunk).double(), "rows": w.sum()}
        return sums | {"both": both @ w, "products": both * w @ both.T}, carry, {"loss": losses.sum(1) / (size > 0).sum(1).clamp(min=1)}

    def figures(self, sums: Sums) -> dict[str, Figure]:
        """bits_per_byte: all bits ÷ all bytes, its interval that of a ratio over rows (Cochran 1977, section 6.4); perplexity: by token."""
        (bits, size), ((bb, bs), (_sb, ss)), rows = sums["both"].tolist(), sums["products"].tolist(), float(sums["rows"])
        r, loss = bits / size, average(sums)
        half = 1.959964 * math.sqrt(max(bb - 2 * r * bs + r * r * ss, 0) * rows / max(rows - 1, 1)) / size  # from Σ (bits − r · bytes)²
        found = {"bits_per_byte": Figure(r, r - half, r + half, int(rows))}
        return found | {"loss": loss, "perplexity": Figure(float((sums["loss"] / sums["n"]).exp()), n=loss.n)}

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        """The five likeliest continuations of each prompt by one token, likeliest first. Raises: UserError for one over the context."""
        tokens, length = chunk.data["tokens"], chunk.data["tokens_len"]
        check_prompt(int(length.max()), nets["net"].context)
        logits = nets["net"](tokens[:, : int(length.max())])[0][torch.arange(len(tokens)), length - 1]  # (B, V)
        found = [Counter() for _row in tokens]
        for chances, row in zip(found, logits.float().softmax(1).tolist(), strict=True):
            for text, p in zip(self.texts, row, strict=True):
                chances[text] += p
        return [{"next": list(map(list, c.most_common(5))), "probabilities": dict(c.most_common(5))} for c in found]

    def known(self, train: Part) -> dict[str, Any]:
        return {"bytes": np.bincount(np.frombuffer(train.store.raw, np.uint8), minlength=256).tolist()}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        raw, counts = np.frombuffer(part.store.raw, np.uint8), np.array(known["bytes"]) + 0.5
        p = {_("how often each byte stands in the training part"): (counts / counts.sum())[raw]}
        if train is not None:  # else of another source, and only the counts are at hand
            p[_("an interpolated byte 5-gram")] = probabilities(train.store.raw, part.store.raw, 5)
        return {name: Figure(float(-np.log2(each).mean()), n=len(raw)) for name, each in p.items()}
