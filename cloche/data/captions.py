"""Pictures with a caption each: pictures from −1 to 1, captions as characters. A prompt is a caption without its picture."""

from functools import cached_property
from typing import Any, ClassVar, Literal
import unicodedata

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.pairs import SPECIALS, UNK
from cloche.data.prepare import DataConfig, PicturesPrepare, Prepared
from cloche.data.table import Ragged, Table
from cloche.data.text import open_tokenizer, train_tokenizer
from cloche.errors import UserError
from cloche.words import _, listed

ALIKE = str.maketrans("ʼ’`", "'''")  # the apostrophes of keyboards and of type: one letter


class CaptionsConfig(DataConfig):
    kind: Literal["captions"] = "captions"
    pixels: int = Field(16, ge=1, le=4096, description=_("the side of a picture as the net sees and draws it"))
    channels: Literal[1, 3] = Field(3, description=_("1 for grey, 3 for colour"))


class CaptionsPrepare(Prepared):
    """Gives image (B, C, pixels, pixels) in −1..1 where there is one, caption (B, L) and caption_len (B,)."""

    kind: Literal["captions"] = "captions"
    pictures: PicturesPrepare
    tokenizer: str
    ragged: ClassVar[bool] = True

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: CaptionsConfig) -> "CaptionsPrepare":
        keys = dict.fromkeys(("mean", "std"), (0.5,) * config.channels)  # (x − ½) / ½
        pictures = PicturesPrepare(pixels=config.pixels, channels=config.channels, labels=tuple(store.labels), **keys)
        return cls(pictures=pictures, tokenizer=train_tokenizer(_captions(store, rows["train"]), "characters", 100_000, SPECIALS))

    @cached_property
    def opened(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.pictures.labels

    @property
    def port(self) -> Port:
        return self.pictures.port

    @property
    def words(self) -> Port:
        return Port("tokens", (None,), self.opened.get_vocab_size())

    def text(self, chunk: Chunk) -> list[str]:
        rows = zip(chunk.data["caption"].tolist(), chunk.data["caption_len"].tolist(), strict=True)
        return [self.opened.decode(row[:n]) for row, n in rows]

    def view(self, store: Any, ids: np.ndarray) -> tuple[Table, np.ndarray]:
        tokens = [e.ids for e in self.opened.encode_batch(_captions(store, ids))]
        fixed = {k: f[ids].cpu().numpy() for k, f in store.fields.items() if k != "caption"}
        return Table(fixed | {"caption": Ragged.of(tokens, np.int64)}, [store.name(int(i)) for i in ids]), np.arange(len(ids))

    def encode(self, given: str) -> dict[str, np.ndarray]:
        """A prompt; "" is the empty one: any picture. Raises: UserError for letters that no caption of the training part has."""
        found = self.opened.encode(plain(given))
        if strange := [plain(given)[a:b] for token, (a, b) in zip(found.ids, found.offsets, strict=True) if token == UNK]:
            known = "".join(c for c in sorted(self.opened.get_vocab()) if len(c) == 1)
            what, told = _("the prompt has letters that no caption has: {letters}"), _("the captions have {letters}")
            raise UserError(what.format(letters=listed(strange, 12)), told.format(letters=known[:200]))
        return {"caption": np.array(found.ids, np.int64)}

    def device(self, chunk: Chunk) -> Chunk:
        return self.pictures.device(chunk) if "image" in chunk.data else chunk


def plain(text: str) -> str:  # one spelling of what reads alike
    return unicodedata.normalize("NFC", text).translate(ALIKE).strip().lower()


def _captions(store: Any, ids: np.ndarray) -> list[str]:
    return [plain(text) for text in store.fields["caption"].texts(ids)]
