"""Pictures with a caption each: pictures from −1 to 1, captions as characters. A prompt is a caption without its picture."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal
import unicodedata

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.pairs import SPECIALS, UNK
from cloche.data.pictures import framed
from cloche.data.prepare import DataConfig, PicturesPrepare, Prepared
from cloche.data.read.examples import Examples, examples_of, utf8
from cloche.data.read.folder import read_pictures, reasons
from cloche.data.table import Ragged, Table
from cloche.data.text import open_tokenizer, train_tokenizer
from cloche.errors import UserError
from cloche.words import _, listed, number

ALIKE = str.maketrans("ʼ’`", "'''")  # the apostrophes of keyboards and of type: one letter
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NUMBERS = {  # zero to nine
    "en": "zero one two three four five six seven eight nine",
    "hi": "शून्य एक दो तीन चार पाँच छह सात आठ नौ",
    "sw": "sifuri moja mbili tatu nne tano sita saba nane tisa",
    "af": "nul een twee drie vier vyf ses sewe agt nege",
    "uk": "нуль один два три чотири п'ять шість сім вісім дев'ять",
    "pl": "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć",
}


class CaptionsConfig(DataConfig):
    kind: Literal["captions"] = "captions"
    pixels: int = Field(16, ge=1, le=4096, description=_("the side of a picture as the net sees and draws it"))
    channels: Literal[1, 3] = Field(3, description=_("1 for grey, 3 for colour"))


def spoken(digits: Examples) -> Examples:
    """Every picture of a digit six times, its caption the number's name in one language each, in the order of NUMBERS."""
    names, n = [words.split() for words in NUMBERS.values()], len(NUMBERS)
    rows = [(name, g, words[k]) for name, g, k in zip(digits.names, digits.digest, digits.label, strict=True) for words in names]
    fields = {k: np.repeat(a, n, 0) for k, a in digits.fields.items()}
    return _examples(fields, rows, label=np.repeat(digits.label, n), labels=digits.labels)


def read_captions(root: Path, pixels: int) -> Examples:
    """ROOT/captions.tsv, a line `file TAB caption` for each picture below ROOT; a picture may have several lines.

    Returns: `image` and `size` as of pictures, `caption` UTF-8 bytes; pictures that cannot be decoded are left out by name.
    Raises: UserError for bytes that are not UTF-8, lines that are no caption, captions without picture, pictures without caption, or none.
    """
    path, said, left_out = root / "captions.tsv", [], []
    for n, line in enumerate(utf8(path).split("\n"), 1):
        file, _tab, caption = (cell.strip() for cell in line.partition("\t"))
        if line.strip() and not (file and caption and "\t" not in caption):
            what = _("line {n} of {path} is not a picture with its caption").format(n=number(n), path=path)
            raise UserError(what, line[:60], _("one a line: my.png, a tab, what it shows"))
        said += [(file, caption)] * bool(file)
    named = {file for file, _caption in said}
    there = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.suffix.lower() in ENDINGS}
    if lost := sorted(named - there):
        raise UserError(_("{path} names pictures that are not there").format(path=path), listed(lost, 8), _("mend these lines"))
    if untold := sorted(there - named):
        raise UserError(_("pictures without a caption in {path}").format(path=path), listed(untold, 8), _("add a line for each"))
    read = {name.as_posix(): p for name, p in read_pictures(root, [Path(file) for file in sorted(there)], pixels, left_out).items()}
    rows = [(file, read[file][1], caption) for file, caption in said if file in read]
    if not rows:
        raise UserError(_("no picture in {path} can be read").format(path=root), reasons(left_out))
    return _examples(framed([read[file][0].array for file, _digest, _caption in rows]), rows, left_out=left_out)


def _examples(fields: dict, rows: list[tuple[str, np.ndarray, str]], **more: object) -> Examples:
    """rows: name, hash and caption of a picture. Captions of one picture are a group: they stand in one part."""
    names, groups, captions = zip(*((f"{name} · {caption}", g, caption.encode()) for name, g, caption in rows), strict=True)
    fields = fields | {"caption": Ragged.of(captions, np.uint8)}
    return examples_of("captions", fields, list(names), zip(groups, captions, strict=True), group=np.stack(groups), **more)


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
        captions = map(plain, store.fields["caption"].texts(rows["train"]))
        return cls(pictures=pictures, tokenizer=train_tokenizer(list(captions), "characters", 100_000, SPECIALS))

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
        tokens = [e.ids for e in self.opened.encode_batch([plain(text) for text in store.fields["caption"].texts(ids)])]
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
