"""Pairs of texts as tokens: one vocabulary for both sides, fitted on the training part, with the marks that say what is wanted."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
import re
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.prepare import DataConfig, Prepared
from cloche.data.read.examples import Examples, examples_of, utf8
from cloche.data.table import Ragged, Table
from cloche.data.text import open_tokenizer, train_tokenizer
from cloche.errors import UserError
from cloche.words import _, listed, number

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]  # in the order of their numbers
MARK = re.compile(r"<[^<>\s]{1,16}>")  # <pl> before a source: which language is wanted (Johnson et al. 2017, arXiv 1611.04558)


class PairsConfig(DataConfig):
    kind: Literal["pairs"] = "pairs"
    rows: int = Field(20_000, ge=20, le=10_000_000, description=_("how many pairs are made"))
    tokens: Literal["characters", "bpe"] = Field("bpe", description=_("what a text is cut into: single characters, or pieces of words"))
    vocabulary: int = Field(8000, ge=300, le=1_000_000, description=_("how many different tokens at most"))


def read_pairs(path: Path) -> Examples:
    """`source` and `target` as ragged UTF-8 bytes; a pair with an empty side is left out.

    Raises: UserError for bytes that are not UTF-8, lines without exactly one tab, files of unequal length, not two files, or no pairs.
    """
    pairs = {_("line {n}").format(n=number(n)): pair for n, pair in enumerate(_beside(path) if path.is_dir() else _tabbed(path), 1)}
    sides = {name: (a.encode(), b.encode()) for name, (a, b) in pairs.items() if a and b}
    left_out = [(name, _("the target is empty") if a else _("the source is empty")) for name, (a, b) in pairs.items() if not (a and b)]
    if not sides:
        what, found = _("there are no pairs in {path}").format(path=path), listed(f"{name}: {why}" for name, why in left_out)
        raise UserError(what, found, _("one pair a line: source, a tab, target"))
    return examples(list(sides.values()), list(sides), left_out=left_out)


def examples(pairs: list[tuple[bytes, bytes]], names: list[str], **more: Any) -> Examples:
    sides = {side: Ragged.of(texts, np.uint8) for side, texts in zip(("source", "target"), zip(*pairs, strict=True), strict=True)}
    return examples_of("pairs", sides, names, ((a, b"\t", b) for a, b in pairs), **more)


def _tabbed(path: Path) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.split("\t")] for line in _lines(path)]
    if wrong := [number(n) for n, cells in enumerate(lines, 1) if len(cells) != 2]:
        what, told = _("{path} has lines without exactly one tab").format(path=path), _("line {lines}").format(lines=listed(wrong, 6))
        raise UserError(what, told, _("one pair a line: source, a tab, target"))
    return lines


def _beside(root: Path) -> list[tuple[str, str]]:
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
    if len(files) != 2:
        what, found = _("{path} has not two files, a source and a target").format(path=root), listed(p.name for p in files)
        raise UserError(what, found or _("no files"), _("give a .tsv file, or a folder with two text files"))
    sides = [[line.strip() for line in _lines(p)] for p in files]
    if len(sides[0]) != len(sides[1]):
        told = ", ".join(f"{p.name}: {number(len(side))}" for p, side in zip(files, sides, strict=True))
        what = _("the two files of {path} differ in their number of lines").format(path=root)
        raise UserError(what, told, _("line n of one belongs to line n of the other"))
    return list(zip(*sides, strict=True))


def _lines(path: Path) -> list[str]:
    return text.rstrip("\n").split("\n") if (text := utf8(path)) else []


class PairsPrepare(Prepared):
    """Source tokens that end with EOS; target tokens between BOS and EOS. longest: of a target of the training part."""

    kind: Literal["pairs"] = "pairs"
    tokenizer: str
    marks: tuple[str, ...] = Field(strict=False)  # where every source begins with one: each is a token of its own
    longest: int = Field(ge=0, le=1_000_000)
    labels: ClassVar[tuple[str, ...]] = ()
    ragged: ClassVar[bool] = True

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: PairsConfig) -> "PairsPrepare":
        source, target = (store.fields[side].texts(rows["train"]) for side in ("source", "target"))
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
        source, target = (self.tokens(store.fields[side].texts(ids), side == "source") for side in ("source", "target"))
        framed = {"source": [[*row, EOS] for row in source], "target": [[BOS, *row, EOS] for row in target]}
        fields = {side: Ragged.of(texts, np.int32) for side, texts in framed.items()}
        return Table(fields, [store.name(int(i)) for i in ids], main="source"), np.arange(len(ids))

    def encode(self, given: str) -> dict[str, np.ndarray]:
        text = given.strip()
        if not text or not text.startswith(self.marks or ("",)):
            do = _("give one of {marks}, then the text").format(marks=", ".join(self.marks)) if self.marks else ""
            raise UserError(_("the text does not begin with what is wanted") if text else _("the text is empty"), text[:60], do)
        return {"source": np.array([*self.tokens([text], True)[0], EOS], np.int32)}

    def device(self, chunk: Chunk) -> Chunk:
        return replace(chunk, data={name: t.long() for name, t in chunk.data.items()})
