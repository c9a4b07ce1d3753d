"""Pictures with what they show in words, of kind "captions": a folder of pictures with a captions.tsv, or digits told in six languages."""

from pathlib import Path

import numpy as np

from cloche.data.pictures import framed
from cloche.data.read.examples import Examples, plain, utf8
from cloche.data.read.folder import read_pictures, reasons
from cloche.data.table import Ragged
from cloche.errors import UserError
from cloche.words import _, listed, number

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NUMBERS = {  # zero to nine
    "en": "zero one two three four five six seven eight nine",
    "hi": "शून्य एक दो तीन चार पाँच छह सात आठ नौ",
    "sw": "sifuri moja mbili tatu nne tano sita saba nane tisa",
    "af": "nul een twee drie vier vyf ses sewe agt nege",
    "uk": "нуль один два три чотири п'ять шість сім вісім дев'ять",
    "pl": "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć",
}


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
    read = read_pictures(root, [Path(file) for file in sorted(there)], pixels, left_out)
    rows = [(file, read[Path(file)], caption) for file, caption in said if Path(file) in read]
    if not rows:
        raise UserError(_("no picture in {path} can be read").format(path=root), reasons(left_out))
    told = [(file, picture.digest, caption) for file, picture, caption in rows]
    return _examples(framed([picture.array for _file, picture, _caption in rows]), told, left_out=left_out)


def _examples(fields: dict, rows: list[tuple[str, np.ndarray, str]], **more: object) -> Examples:
    """rows: name, hash and caption of a picture. Captions of one picture are a group: they stand in one part."""
    names, groups, captions = zip(*((f"{name} · {caption}", g, caption.encode()) for name, g, caption in rows), strict=True)
    fields = fields | {"caption": Ragged.of(captions, np.uint8)}
    return plain("captions", fields, list(names), zip(groups, captions, strict=True), group=np.stack(groups), **more)
