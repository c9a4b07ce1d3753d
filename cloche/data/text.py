"""Running text as tokens: a tokenizer fitted on the training part, and windows over a part's tokens, each foretold once.

    paragraphs ─ tokenizer ─ start, t₁ t₂ … t_N ─ windows of T + 1, each beginning with the last token of the one before

Beside each token stands the number of UTF-8 bytes that it is, so that figures can be told by byte whatever a token is.
"""

from collections import Counter
from dataclasses import replace
from functools import cached_property, lru_cache
import json
from pathlib import Path
from pydoc_data.topics import topics
import re
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
import torch

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.prepare import DataConfig, Prepared
from cloche.data.read.examples import Examples, examples_of, utf8
from cloche.data.table import Ragged, Table
from cloche.errors import UserError
from cloche.words import _, number

UNKNOWN = "<unk>"  # of words and characters; bytes are never unknown
# a word with the blank before it; line breaks; blanks but for the last before a word; a sign (for BPE signs in a row) with its blank
WORD = r" ?[\p{L}\p{M}\p{N}_]+|\n+|[^\S\n]+(?!\S)| ?[^\s\p{L}\p{M}\p{N}_]%s|\s"
PIECES = {"bpe": WORD % "+", "words": WORD % "", "characters": r"[\s\S]"}
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as their own Latin-1 character
MARKED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # as add_special_tokens does
BYTES = {chr(b): b for b in PLAIN} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(PLAIN)))}
LEAST_BYTES, LEAST_ROWS = 2000, 20


def train_tokenizer(texts: list[str], kind: str, size: int, specials: list[str]) -> str:
    """At most `size` tokens that give the text again when joined, as JSON, the same for the same texts; `specials` come first.

    kind: "bpe" merges bytes to pieces of words (Radford et al. 2019, section 2.2); of words and characters the rarest are one unknown one.
    """
    cut: Any = pre_tokenizers.Split(Regex(PIECES[kind]), "isolated")
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=sorted(BYTES), show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    else:
        first = specials if UNKNOWN in specials else [UNKNOWN, *specials]
        counts = Counter(piece for text in texts for piece, _place in cut.pre_tokenize_str(text))
        ranked = sorted(counts.keys() - set(first), key=lambda piece: (-counts[piece], piece))
        tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate([*first, *ranked][:size])}, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = cut
        tokenizer.add_special_tokens(specials)
    tokenizer.decoder = decoders.ByteLevel() if kind == "bpe" else decoders.Fuse()
    return tokenizer.to_str()


@lru_cache(maxsize=8)
def open_tokenizer(text: str) -> Tokenizer:
    """Raises: ValueError for what `train_tokenizer` never made: patterns, models and normalisers of others could run for ever."""
    given, ours = json.loads(text), [json.loads(train_tokenizer([], kind, 260, [])) for kind in PIECES]
    names = given["model"]["vocab"]
    fixed = [{**t, "added_tokens": [], "model": {**t["model"], "vocab": {}, "merges": []}} for t in (given, *ours)]
    marks = [{"id": names.get(t["content"], -1), "content": t["content"], **MARKED} for t in given["added_tokens"]]
    known = given["model"].get("unk_token") in (None, *names)
    if fixed[0] not in fixed[1:] or not known or sorted(names.values()) != list(range(len(names))) or marks != given["added_tokens"]:
        raise ValueError("no tokenizer of ours")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True  # "<eos>" in a person's text is text
    return tokenizer


class TextConfig(DataConfig):
    kind: Literal["text"] = "text"
    tokens: Literal["bpe", "words", "characters"] = Field("bpe", description=_("what a token is; bpe: a piece of a word"))
    vocabulary: int = Field(1024, ge=260, le=1_000_000, description=_("how many different tokens at most"))
    window: int = Field(256, ge=2, le=1_000_000, description=_("tokens of one example; a net without a state sees no further back"))
    in_order: ClassVar = True


def read_text(path: Path) -> Examples:
    """`text` as ragged UTF-8 bytes, a row a paragraph with the empty line after it; a line, where there are no paragraphs. notes: repeated.

    Raises: UserError for bytes that are not UTF-8 (file and byte), for an empty folder, and for empty or too short text.
    """
    found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else [path]
    return examples({p.name: utf8(p) for p in found}, str(path))


def read_pydocs() -> Examples:
    """The English of CPython's own documentation, as `help()` shows it; its length differs between versions of Python."""
    return examples({name: topics[name] for name in sorted(topics)}, "pydocs")


def examples(texts: dict[str, str], source: str) -> Examples:
    """texts: by the name of their file, in order."""
    for end, cut in (("\n\n", r"\n(?:[^\S\n]*\n)+"), ("\n", r"\n")):
        seen: dict[bytes, str] = {}  # paragraph → where it stood first
        pieces = [(piece, f"{name}:{n}") for name, text in texts.items() for n, piece in enumerate(re.split(cut, text), 1) if piece.strip()]
        for piece, where in pieces:
            seen.setdefault((piece.strip("\n").rstrip() + end).encode(), where)
        if len(seen) >= LEAST_ROWS:
            break
    size = sum(map(len, seen))
    if len(seen) < LEAST_ROWS or size < LEAST_BYTES:
        what = _("the text in {path} is too short") if seen else _("the text in {path} is empty")
        found = _("{n} bytes in {m} different paragraphs or lines").format(n=number(size), m=number(len(seen)))
        told = _("give at least {n} bytes in {m} paragraphs with an empty line between them, or as many lines")
        raise UserError(what.format(path=source), found, told.format(n=number(LEAST_BYTES), m=LEAST_ROWS))
    rows = {"text": Ragged.of(list(seen), np.uint8)}
    return examples_of("text", rows, list(seen.values()), ((row,) for row in seen), notes={"repeated": len(pieces) - len(seen)})


class TextPrepare(Prepared):
    """Gives tokens and bytes (B, T + 1); 0 bytes where nothing is to be foretold: the start, and what follows the end."""

    kind: Literal["text"] = "text"
    tokenizer: str
    window: int = Field(ge=2, le=1_000_000)
    labels: ClassVar[tuple[str, ...]] = ()
    ragged: ClassVar[bool] = True

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: TextConfig) -> "TextPrepare":
        texts = store.fields["text"].texts(rows["train"])
        return cls(tokenizer=train_tokenizer(texts, config.tokens, config.vocabulary, []), window=config.window)

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each token stands for; the unknown one, which is 0 where there is one, for nothing that can be shown."""
        names = sorted(vocabulary := open_tokenizer(self.tokenizer).get_vocab(), key=vocabulary.__getitem__)
        return [b"" if name == UNKNOWN else name.encode() if names[0] == UNKNOWN else bytes(BYTES[c] for c in name) for name in names]

    @property
    def port(self) -> Port:
        return Port("tokens", (self.window,), len(self.pieces))

    def encode(self, given: str | list[str]) -> dict[str, np.ndarray]:
        """A prompt or running texts, as what follows a paragraph: the tokens and how many bytes each stands for, (N + 1,) int32."""
        texts, tokenizer = [given] if isinstance(given, str) else given, open_tokenizer(self.tokenizer)
        found, sizes = tokenizer.encode_batch(texts), np.array([len(piece) for piece in self.pieces])
        tokens = np.concatenate([tokenizer.encode("\n\n").ids[-1:], *(e.ids for e in found)]).astype(np.int32)
        size = sizes[tokens] * (np.arange(len(tokens)) > 0)
        if not size[1:].all():  # unknown words are as long as they were
            size[1:] = [len(text[a:b].encode()) for text, e in zip(texts, found, strict=True) for a, b in e.offsets]
        return {"tokens": tokens, "bytes": size.astype(np.int32)}

    def decode(self, tokens: list[int]) -> bytes:
        return b"".join(self.pieces[t] or b"\xef\xbf\xbd" for t in tokens)

    def view(self, store: Any, ids: np.ndarray) -> tuple["Windows", np.ndarray]:
        texts = store.fields["text"].texts(ids)
        rows = Windows(self.encode(texts), self.window, "".join(texts).encode(), store.name(int(ids[0])))
        return rows, np.arange(rows.n)

    def device(self, chunk: Chunk) -> Chunk:
        """While training, all windows begin later by a number that each epoch draws, so that no token is always the first of its own."""
        later = chunk.draw % self.window if chunk.train else 0
        cut = slice(None) if "tokens_len" in chunk.data else torch.arange(self.window + 1, device=chunk.draw.device) + later
        return replace(chunk, data={name: t[..., cut].long() for name, t in chunk.data.items()})


class Windows(Table):
    """Rows of T + 1 running tokens, T apart, and the T that follow (after the last the first): views, not copies. raw: all their bytes."""

    running = True

    def __init__(self, running: dict[str, np.ndarray], T: int, raw: bytes, first: str) -> None:
        n, self.raw = max(1, -(-(len(running["tokens"]) - 1) // T)), raw
        whole = {k: np.pad(np.pad(a, (0, n * T + 1 - len(a))), (0, T), "wrap") for k, a in running.items()}
        fields = {k: np.lib.stride_tricks.sliding_window_view(a, 2 * T + 1, writeable=True)[::T] for k, a in whole.items()}
        super().__init__(fields, [_("{first}, from token {n} after it").format(first=first, n=number(i * T + 1)) for i in range(n)])
