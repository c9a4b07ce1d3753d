"""What is said in a clip, letter by letter, without knowing when: connectionist temporal classification.

audio (B, T, M) ─ net ─ letters and blank at each step (B, T', K) ─ sum over every alignment ─ −log p(target), the loss
Source: A. Graves et al. 2006.                                    └ best path ─ text
"""

from statistics import mode
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
import torch.nn.functional as F

from cloche.config import Port, TaskConfig
from cloche.data.chunk import Chunk, Part
from cloche.tasks.metrics import Figure, Nets, Sums, average, share
from cloche.tasks.task import Task, pairs
from cloche.words import _


class TranscribeConfig(TaskConfig):
    kind: Literal["transcribe"] = "transcribe"
    fits: ClassVar = ("audio",)

    def build(self, prepare: Any, facts: dict[str, Any]) -> "Transcribe":
        return Transcribe(prepare.alphabet, prepare.port)


class Transcribe(Task):
    """Letter k is alphabet[k − 1], 0 the blank. The loss is a mean over letters."""

    face: ClassVar = "streams"
    headline: ClassVar = "cer"

    def __init__(self, alphabet: str, inputs: Port) -> None:
        self.alphabet = alphabet
        self.ports = {"net": (inputs, Port("tokens", (None,), len(alphabet) + 1))}

    def size(self, chunk: Chunk) -> Tensor:
        return chunk.data["target_len"]

    def answer(self, nets: Nets, chunk: Chunk) -> list[dict[str, Any]]:
        logits, length = nets["net"](chunk.data["audio"], chunk.data["audio_len"])
        return [{"text": self.text(letters)} for letters in best_path(logits, length)]

    def truth(self, chunk: Chunk) -> list[str]:
        return [self.text(row) for row in chunk.data["target"].tolist()]

    def text(self, letters: list[int]) -> str:
        return "".join(self.alphabet[k - 1] for k in letters if k)

    def score(self, answers: list[dict[str, Any]], chunk: Chunk, nets: Nets) -> Sums:
        return _sums(pairs(self, answers, chunk))

    def figures(self, sums: Sums) -> dict[str, Figure]:
        """loss: nats a letter. cer: edits per true letter, with the normal interval of a ratio of sums. exact: clips without any."""
        out = {"loss": average(sums)} if "loss" in sums else {}
        if "edits" not in sums:
            return out
        e, c, ee, ec, cc, exact, n = sums["edits"].tolist()
        half = 1.959964 * max(ee - 2 * e / c * ec + (e / c) ** 2 * cc, 0.0) ** 0.5 / c
        cer = Figure(e / c, max(e / c - half, 0.0), e / c + half if e else share(0, c).high, int(n))
        return {"cer": cer, "exact": share(exact, n), **out}

    def known(self, train: Part) -> dict[str, Any]:
        return {"text": mode(self._texts(train))}

    def baselines(self, known: dict[str, Any], part: Part, train: Part | None) -> dict[str, Figure]:
        told = {_('always answering "{answer}"').format(answer=known["text"]): known["text"], _("saying nothing"): ""}
        return {name: self.figures(_sums([(text, truth) for truth in self._texts(part)]))["cer"] for name, text in told.items()}

    def _texts(self, part: Part) -> list[str]:
        return [self.text(part.store.fields["target"][i].tolist()) for i in part.ids]

    def losses(self, nets: Nets, chunk: Chunk) -> Tensor:
        """(B,) −log p of the target; 0, and no gradient, where it has more letters than the net has steps."""
        logits, length = nets["net"](chunk.data["audio"], chunk.data["audio_len"])
        p = F.log_softmax(logits.float(), -1).transpose(0, 1)  # (T', B, K)
        return F.ctc_loss(p, chunk.data["target"], length, chunk.data["target_len"], reduction="none", zero_infinity=True)


def best_path(logits: Tensor, length: Tensor) -> list[list[int]]:
    """The likeliest letter of each step; repeats become one, blanks fall away: 0 3 3 0 3 5 0 → 3 3 5 (section 3.2).

    Args: logits: (B, T', K), K = 0 the blank. length: (B,), how many steps are the row's own.
    """
    best = logits.argmax(-1)  # (B, T')
    new = torch.cat([best[:, :1] >= 0, best[:, 1:] != best[:, :-1]], 1)
    inside = torch.arange(best.shape[1], device=best.device) < length[:, None]
    return [row[kept].tolist() for row, kept in zip(best.cpu(), (new & inside & (best > 0)).cpu(), strict=True)]


def _sums(pairs: list[tuple[str, str]]) -> Sums:
    """`edits` (7,): edits e and true letters c, their squares and product summed over clips, clips told exactly, clips."""
    e, c = torch.tensor([(edits(said, true), len(true)) for said, true in pairs], dtype=torch.float64).T
    return {"edits": torch.stack([v.sum() for v in (e, c, e * e, e * c, c * c, e == 0, torch.ones_like(e))])}


def edits(said: str, true: str) -> int:
    """Levenshtein's distance: the fewest letters to change, add or drop."""
    row = list(range(len(true) + 1))
    for i, s in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, t in enumerate(true, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (s != t))
    return row[-1]
