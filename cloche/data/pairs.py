"""Pairs of texts as tokens: one vocabulary for both sides, fitted on the training part, with the marks that say what is wanted."""

from dataclasses import replace
from functools import cached_property
import re
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from cloche.config import Frozen, Port
from cloche.data.chunk import Chunk
from cloche.data.prepare import DataConfig, RowsOf
from cloche.data.table import Ragged, Table, pad
from cloche.data.text import open_tokenizer, train_tokenizer
from cloche.errors import UserError
from cloche.words import _

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]  # in the order of their numbers
MARK = re.compile(r"<[^<>\s]{1,16}>")  # <pl> before a source: which language is wanted (Johnson et al. 2017, arXiv 1611.04558)


class PairsConfig(DataConfig):
    kind: Literal["pairs"] = "pairs"
    rows: int = Field(20_000, ge=20, le=10_000_000, description=_("how many pairs are made"))
    tokens: Literal["characters", "bpe"] = Field("bpe", description=_("what a text is cut into: single characters, or pieces of words"))
    vocabulary: int = Field(8000, ge=300, le=1_000_000, description=_("how many different tokens at most"))


class PairsPrepare(Frozen):
    """Source tokens that end with EOS; target tokens between BOS and EOS. longest: of a target of the training part."""

    kind: Literal["pairs"] = "pairs"
    tokenizer: str
    marks: tuple[str, ...] = Field(strict=False)  # where every source begins with one: each is a token of its own
    longest: int = Field(ge=0, le=1_000_000)
    labels: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def fit(cls, store: RowsOf, rows: dict[str, np.ndarray], config: PairsConfig) -> "PairsPrepare":
        source, target = (_texts(store, side, rows["train"]) for side in ("source", "target"))
        found = [m[0] for text in source if (m := MARK.match(text))]
        marks = sorted(set(found)) if len(found) == len(source) else []
        both = [text[text.index(">") + 1 :] if marks else text for text in source] + target
        plain = cls(tokenizer=train_tokenizer(both, config.tokens, config.vocabulary, [*SPECIALS, *marks]), marks=marks, longest=0)
        return plain.model_copy(update={"longest": int(plain.view(store, rows["train"])[0].fields["target"].lengths.max())})

    @cached_property
    def opened(self) -> Tokenizer:
        opened = open_tokenizer(self.tokenizer)
        if [opened.token_to_id(m) for m in SPECIALS] != [PAD, BOS, EOS, UNK] or None in map(opened.token_to_id, self.marks):
            raise ValueError("no tokenizer of pairs")
        return opened

    @property
    def port(self) -> Port:
        return Port("tokens", (None,), self.opened.get_vocab_size())

    def tokens(self, texts: list[str], marked: bool) -> list[list[int]]:
        """Only the mark that a source begins with is a token of its own; whatever else looks like one is text."""
        marks = [next((m for m in self.marks * marked if text.startswith(m)), "") for text in texts]
        found = self.opened.encode_batch([text[len(m) :] for text, m in zip(texts, marks, strict=True)])
        return [[self.opened.token_to_id(m)] * bool(m) + e.ids for m, e in zip(marks, found, strict=True)]

    def text(self, ids: list[int]) -> str:
        """Tokens → text, without marks and what frames it."""
        return self.opened.decode(ids, skip_special_tokens=True)

    def view(self, store: Any, ids: np.ndarray) -> tuple[Table, np.ndarray]:
        source, target = (self.tokens(_texts(store, side, ids), side == "source") for side in ("source", "target"))
        framed = {"source": [[*row, EOS] for row in source], "target": [[BOS, *row, EOS] for row in target]}
        fields = {side: Ragged.of(texts, np.int32) for side, texts in framed.items()}
        return Table(fields, [store.name(int(i)) for i in ids], main="source"), np.arange(len(ids))

    def encode(self, given: str) -> dict[str, np.ndarray]:
        text, marks = given.strip(), ", ".join(self.marks)
        if not text or not text.startswith(self.marks or ("",)):
            do = _("give one of {marks}, then the text").format(marks=marks) if marks else ""
            raise UserError(_("the text does not begin with what is wanted") if text else _("the text is empty"), text[:60], do)
        return {"source": np.array([*self.tokens([text], True)[0], EOS], np.int32)}

    def gather(self, encoded: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return dict(zip(("source", "source_len"), pad([e["source"] for e in encoded]), strict=True))

    def device(self, chunk: Chunk) -> Chunk:
        return replace(chunk, data={name: t.long() for name, t in chunk.data.items()})


def _texts(store: Any, side: str, ids: np.ndarray) -> list[str]:
    offsets, values = store.fields[side].offsets, store.fields[side].values.cpu().numpy()
    return [bytes(values[offsets[i] : offsets[i + 1]]).decode() for i in ids]
