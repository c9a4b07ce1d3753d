"""The one picture decoder of training, evaluation, prediction and serving: file bytes → (h, w, c) uint8, a pure function."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import io
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from cloche.words import _, number, size

MAX_PIXELS, MAX_SIDE = 64_000_000, 65_535  # Pillow's time grows by the square of a row: a minute for 140 bytes of WebP, 16 million wide
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
# How a file begins, its format, how a whole one ends, and where in it the length stands.
FORMATS = (
    (rb"\xff\xd8\xff", "JPEG", b"\xff\xd9", slice(0)),
    (rb"\x89PNG\r\n\x1a\n", "PNG", b"IEND\xaeB`\x82", slice(0)),
    (rb"RIFF....WEBP", "WEBP", b"", slice(4, 8)),
    (rb"BM", "BMP", b"", slice(2, 6)),
    (rb"GIF8[79]a", "GIF", b";", slice(0)),
    (rb"II[*+]\0|MM\0[*+]", "TIFF", b"", slice(0)),
    (rb"P[1-6]\s", "PPM", b"", slice(0)),
)
GREY, COLOUR = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"), ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
KEY_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # Pillow brings the pixels of these PNGs to 8 bits, but not their transparent colour
UPRIGHT = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), 2))
Image.init()  # fills Image.OPEN


class Unreadable(Exception):
    """A file that gives no picture; its text is the reason, in the person's language."""


class Picture(NamedTuple):
    array: np.ndarray  # (h, w, c) uint8; c is 1 (grey) or 3 (red, green, blue)
    turned: bool  # its EXIF mark said that it did not lie upright


def decode(source: Path | bytes, pixels: int) -> Picture:
    """The picture in a regular file, or in its bytes, upright and no larger than pixels × pixels.

    The format is known by content; of an animation the first frame is taken. Grey modes stay one channel, others become three. Alpha and
    a transparent colour lie over white. 16-bit grey is round(v / 257), of 16-bit colour the high byte is kept. Then it is turned by its
    EXIF mark (in a PNG one before the pixels), and each axis longer than `pixels` is shrunk to it by Pillow's antialiased BILINEAR.

    Raises: Unreadable for an empty, cut, damaged or foreign file, one beyond MAX_PIXELS, MAX_SIDE or MAX_BYTES, and floating-point pixels.
    """
    with _opened(source) as (image, mark):
        key_scale = KEY_SCALE.get(image.tile[0][3], 1) if image.format == "PNG" else 1
        image.draft(None, (2 * pixels, 2 * pixels))  # a big JPEG loads several times as fast; the stated filter does the last halving
        image.load()
        flat = _flat(image, key_scale)
        if mark in UPRIGHT and image.format != "TIFF":  # Pillow turns a TIFF and its size itself
            flat = flat.transpose(Image.Transpose[UPRIGHT[mark]])
    array = np.array(shrunk(flat, pixels))  # (h, w) or (h, w, 3)
    return Picture(array.reshape(*array.shape[:2], -1), mark in UPRIGHT)


def framed(pictures: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Pictures of many sizes as one `image` (n, H, W, C) uint8, each in the top-left corner, and their own `size` (n, 2) int32."""
    image = np.zeros((len(pictures), *np.max([array.shape for array in pictures], 0)), np.uint8)
    for row, array in zip(image, pictures, strict=True):
        row[: array.shape[0], : array.shape[1]] = array  # one channel broadcasts to three
    return {"image": image, "size": np.array([array.shape[:2] for array in pictures], np.int32)}


def shrunk(image: Image.Image, pixels: int) -> Image.Image:
    """Each axis longer than `pixels` reduced to it on its own; a shorter one stays."""
    return image.resize((min(image.width, pixels), min(image.height, pixels)), Image.Resampling.BILINEAR)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Image.Image, int]]:
    """The picture with its header read and bounded, and its EXIF mark; a fault here or inside the `with` leaves as Unreadable."""
    n_bytes, mark, cut = 0, 1, False
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            head, n_bytes = file.read(16), file.seek(0, io.SEEK_END)
            name, end, length = next((rest for start, *rest in FORMATS if re.match(start, head, re.DOTALL)), ("", b"", slice(0)))
            if not name:
                raise Unreadable(_("not a picture: none of JPEG, PNG, WebP, BMP, GIF, TIFF, PPM") if n_bytes else _("empty file"))
            if n_bytes > MAX_BYTES:
                raise Unreadable(_("{size}, more than the {most} that are read").format(size=size(n_bytes), most=size(MAX_BYTES)))
            file.seek(max(0, n_bytes - 16))
            cut = not file.read().rstrip(b"\0").endswith(end) or n_bytes < int.from_bytes(head[length], "little")
            file.seek(0)
            image = Image.OPEN[name][0](file, "")  # not Image.open: that warns of a big picture before our bound is looked at
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError(f"{number(image.width)} × {number(image.height)}")
            if image.mode not in GREY + COLOUR:
                raise Unreadable(_("mode {mode} (F is floating point): save it as RGB or grey, 8 or 16 bits").format(mode=image.mode))
            with suppress(Exception):  # a damaged mark; the pixels may well be whole. A PNG's own getexif would decode them to look behind
                mark = Image.Image.getexif(image).get(274, 1)
            yield image, mark
    except (Unreadable, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # ours above, or Pillow's own of a WebP: "Image size (400000000 pixels) exceeds …"
        found = re.sub(r".*\((\d+) pixels.*", lambda m: number(int(m[1])), str(error))
        text = _("{found} pixels, more than the {most}, or {side} a side, that are read")
        raise Unreadable(text.format(found=found, most=number(MAX_PIXELS), side=number(MAX_SIDE))) from error
    except Exception as error:  # Pillow's parsers raise a dozen types on bad bytes; each means this file and nothing else
        cut = cut or "truncat" in str(error).lower()
        reason = _("ends at byte {byte}").format(byte=number(n_bytes)) if cut else _("damaged: {detail}").format(detail=error)
        raise Unreadable(getattr(error, "strerror", None) or reason) from error  # strerror: the disk or its permissions


def _flat(image: Image.Image, key_scale: float) -> Image.Image:
    """A loaded picture in mode L or RGB: 16 bits to 8, alpha and the transparent colour over white."""
    key, grey = image.info.get("transparency"), image.mode in GREY
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable(_("grey values from {low} to {high}, beyond 16 bits").format(low=values.min(), high=values.max()))
        table = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # round(v / 257)
        if key is not None:
            table[key] = 255
        return Image.fromarray(table[values])
    if key is not None and key_scale != 1:
        image.info["transparency"] = tuple(int(k * key_scale) for k in key) if isinstance(key, tuple) else int(key * key_scale)
    plain = "L" if grey else "RGB"
    if not image.has_transparency_data:
        return image.convert(plain)
    over, paper = image.convert(plain + "A"), Image.new(plain, image.size, "white")
    paper.paste(over, mask=over.getchannel("A"))
    return paper
