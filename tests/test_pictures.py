"""The one picture decoder: golden values per mode, cut and hostile files, EXIF turns, one filter."""

import io
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
from PIL import Image
import pytest

from cloche.data.pictures import MAX_BYTES, MAX_PIXELS, Unreadable, decode

NBSP = "\u00a0"


def saved(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def photo(h=96, w=128, seed=0):
    """A smooth coloured picture that JPEG keeps well."""
    y, x = np.mgrid[:h, :w] / max(h, w)
    waves = [np.sin(7 * x + 3 * y + k + seed) + np.cos(5 * y - 2 * x * k) for k in range(3)]
    return np.clip(127 + 60 * np.stack(waves, -1), 0, 255).astype(np.uint8)  # (h, w, 3)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(w, h, depth, colour, rows, *chunks):
    """A PNG from raw scanlines; rows: bytes of each, without the filter byte."""
    body = b"".join(b"\0" + row for row in rows)
    head = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    middle = b"".join(chunk(n, b) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def over_white(value, alpha):
    return round((value * alpha + 255 * (255 - alpha)) / 255)


# Each case: the file's bytes and the array (h, w, c) that it must give.
def golden():
    cases = {}
    grey = np.array([[0, 100, 200], [255, 1, 128]], np.uint8)
    cases["L"] = saved(Image.fromarray(grey), "PNG"), grey[..., None]
    bits = Image.fromarray(grey).point(lambda v: 255 * (v > 99), "1")
    cases["1"] = saved(bits, "PNG"), np.array([[0, 255, 255], [255, 0, 255]], np.uint8)[..., None]
    la = np.stack([np.full((1, 3), 100, np.uint8), np.array([[0, 128, 255]], np.uint8)], -1)
    cases["LA"] = saved(Image.fromarray(la, "LA"), "PNG"), np.array([[[255], [over_white(100, 128)], [100]]], np.uint8)
    rgba = np.array([[[200, 0, 40, 0], [200, 0, 40, 64], [200, 0, 40, 255]]], np.uint8)
    flat = np.array([[[255] * 3, [over_white(v, 64) for v in (200, 0, 40)], [200, 0, 40]]], np.uint8)
    for form in ("PNG", "WEBP", "TIFF"):
        cases[f"RGBA {form}"] = saved(Image.fromarray(rgba), form, **({"lossless": True, "exact": True} if form == "WEBP" else {})), flat
    deep = np.array([[0, 128, 129, 257, 385, 386, 1000, 32767, 65407, 65535]], np.uint16)
    scaled = np.array([[0, 0, 1, 1, 1, 2, 4, 127, 255, 255]], np.uint8)[..., None]  # by hand: v / 257 to the nearest
    cases["I;16 PNG"] = saved(Image.fromarray(deep), "PNG"), scaled
    cases["I;16 TIFF"] = saved(Image.fromarray(deep), "TIFF"), scaled
    cases["I;16B TIFF"] = saved(Image.frombytes("I;16B", (10, 1), deep.astype(">u2").tobytes()), "TIFF"), scaled
    cases["I PGM"] = b"P5 10 1 65535\n" + deep.astype(">u2").tobytes(), scaled
    cases["I TIFF"] = saved(Image.fromarray(deep.astype(np.int32)), "TIFF"), scaled
    row16 = struct.pack(">3H", 7, 1000, 65535)
    cases["I;16 key"] = png(3, 1, 16, 0, [row16], (b"tRNS", b"\0\x07")), np.array([[[255], [4], [255]]], np.uint8)
    cases["RGB 16"] = png(1, 1, 16, 2, [struct.pack(">3H", 255, 256, 65535)]), np.array([[[0, 1, 255]]], np.uint8)  # the high byte
    row16 = struct.pack(">6H", 0x0A0B, 0, 65535, 65535, 0, 0)
    cases["RGB 16 key"] = png(2, 1, 16, 2, [row16], (b"tRNS", row16[:6])), np.array([[[255] * 3, [255, 0, 0]]], np.uint8)
    palette = (b"PLTE", bytes([9, 8, 7, 255, 0, 0, 0, 0, 255])), (b"tRNS", b"\xff\0\x80")
    cases["P"] = png(3, 1, 8, 3, [b"\0\1\2"], palette[0]), np.array([[[9, 8, 7], [255, 0, 0], [0, 0, 255]]], np.uint8)
    blue = [over_white(v, 128) for v in (0, 0, 255)]
    cases["P tRNS"] = png(3, 1, 8, 3, [b"\0\1\2"], *palette), np.array([[[9, 8, 7], [255] * 3, blue]], np.uint8)  # not solid red
    cases["RGB key"] = png(2, 1, 8, 2, [b"\5\6\7\5\6\x08"], (b"tRNS", b"\0\5\0\6\0\7")), np.array([[[255] * 3, [5, 6, 8]]], np.uint8)
    cases["L key"] = png(2, 1, 8, 0, [b"\x64\x65"], (b"tRNS", b"\0\x64")), np.array([[[255], [101]]], np.uint8)
    cases["L 4 bits key"] = png(2, 1, 4, 0, [b"\x5a"], (b"tRNS", b"\0\5")), np.array([[[255], [170]]], np.uint8)
    cases["L 2 bits key"] = png(4, 1, 2, 0, [b"\x1b"], (b"tRNS", b"\0\1")), np.array([[[0], [255], [170], [255]]], np.uint8)
    cases["1 key"] = png(2, 1, 1, 0, [b"\x40"], (b"tRNS", b"\0\0")), np.array([[[255], [255]]], np.uint8)
    colour = photo(8, 8)
    for form in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        cases[f"RGB {form}"] = saved(Image.fromarray(colour), form, **({"lossless": True} if form == "WEBP" else {})), colour
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    cases["CMYK TIFF"] = saved(cmyk, "TIFF"), np.full((8, 8, 3), (255, 0, 0), np.uint8)
    frames = [Image.new("RGB", (4, 3), c) for c in ("red", "blue")]
    red = np.full((3, 4, 3), (255, 0, 0), np.uint8)
    cases["animated GIF"] = saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), red
    cases["animated PNG"] = saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), red
    cases["animated WebP"] = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), red
    cases["two-page TIFF"] = saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]), red
    see_through = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    see_through.putpalette([255, 0, 0, 0, 0, 255])
    cases["GIF key"] = saved(see_through, "GIF", transparency=0), np.array([[[255] * 3, [0, 0, 255]]], np.uint8)
    cases["1×1"] = saved(Image.new("RGB", (1, 1), (3, 2, 1)), "PNG"), np.array([[[3, 2, 1]]], np.uint8)
    return cases


GOLDEN = golden()


@pytest.mark.parametrize("name", GOLDEN)
def test_each_mode_gives_its_golden_array(name):
    content, wanted = GOLDEN[name]
    got = decode(content, 64)
    assert got.array.dtype == np.uint8
    assert got.array.shape == wanted.shape
    np.testing.assert_array_equal(got.array, wanted)
    assert not got.turned


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_a_path_and_its_bytes_give_the_same_picture_whatever_its_name(form, tmp_path):
    content = saved(Image.fromarray(photo()), form)
    path = tmp_path / "picture.txt"
    path.write_bytes(content)
    np.testing.assert_array_equal(decode(path, 50).array, decode(content, 50).array)


@pytest.mark.parametrize("mode, tolerance", [("RGB", 4), ("CMYK", 4), ("L", 2)])
def test_jpeg_in_each_of_its_modes(mode, tolerance):
    image = Image.fromarray(photo()).convert(mode)
    got = decode(saved(image, "JPEG", quality=95, subsampling=0), 128).array
    wanted = np.asarray(image.convert("L" if mode == "L" else "RGB")).astype(int).reshape(got.shape)
    assert np.abs(got - wanted).mean() < tolerance


def test_inverted_cmyk_of_adobe_is_not_a_negative():
    got = decode(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), 16).array
    assert np.abs(got.astype(int) - (255, 0, 0)).max() < 6


def test_the_first_picture_of_a_phone_s_mpo():
    exif = Image.Exif()
    exif[274] = 8
    content = saved(Image.fromarray(photo(40, 64)), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 40))], exif=exif, quality=98)
    got = decode(content, 100)
    assert np.abs(got.array.astype(int) - np.rot90(photo(40, 64))).mean() < 3
    assert (got.turned, got.array.shape) == (True, (64, 40, 3))


def test_larger_axes_shrink_each_on_its_own_by_antialiased_bilinear():
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (32, 32))  # (64, 64); without antialiasing it stays black and white
    assert np.abs(decode(saved(Image.fromarray(fine), "PNG"), 8).array.astype(int)[1:-1, 1:-1] - 127.5).max() < 2
    coarse = Image.fromarray(photo(64, 64))
    wanted = coarse.resize((16, 64), Image.Resampling.BILINEAR).resize((16, 16), Image.Resampling.BILINEAR)  # one axis after the other
    np.testing.assert_array_equal(decode(saved(coarse, "PNG"), 16).array, np.asarray(wanted))
    wide = saved(Image.fromarray(photo(10, 100)), "PNG")
    assert decode(wide, 20).array.shape == (10, 20, 3)


def test_a_filter_worked_by_hand():
    """4 → 2: triangle of half-width 2 around 1 and 3, clipped at the border: weights 3, 3, 1 over 7 and their mirror."""
    content = saved(Image.fromarray(np.array([[0, 70, 140, 210]], np.uint8)), "PNG")
    np.testing.assert_array_equal(decode(content, 2).array[..., 0], [[50, 160]])


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 1), (3, 2)])
def test_extreme_shapes(size):
    content = saved(Image.new("L", size, 77), "PNG")
    got = decode(content, 48).array
    assert got.shape == (min(size[1], 48), min(size[0], 48), 1)
    assert (got == 77).all()


@pytest.mark.parametrize("h, w", [(1200, 1603), (384, 400), (200, 1600), (191, 191)])
def test_the_draft_of_a_big_jpeg_is_close_to_the_full_decode_and_repeatable(h, w):
    image = Image.fromarray(photo(h, w))
    content = saved(image, "JPEG", quality=92)
    got = decode(content, 96).array
    full = np.asarray(Image.open(io.BytesIO(content)).resize((96, 96), Image.Resampling.BILINEAR))
    assert np.abs(got.astype(int) - full).mean() < 1
    np.testing.assert_array_equal(got, decode(content, 96).array)


# ---- upright

FLIPS = {1: "", 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
FLIPS |= {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


def lying(image, mark):
    """The picture as a camera stores it under an EXIF mark: the inverse of what brings it upright."""
    return image if mark == 1 else image.transpose(Image.Transpose[FLIPS[mark]])


@pytest.mark.parametrize("mark", FLIPS)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "TIFF LZW"])
@pytest.mark.parametrize("pixels", [200, 20])
def test_eight_orientations_give_equal_arrays(mark, form, pixels):
    array = photo(40, 60)
    exif = Image.Exif()
    exif[274] = mark
    options = {"WEBP": {"lossless": True}, "TIFF LZW": {"compression": "tiff_lzw"}}.get(form, {})
    content = saved(lying(Image.fromarray(array), mark), form.split()[0], exif=exif, **options)
    upright = decode(saved(Image.fromarray(array), "PNG"), pixels).array
    got = decode(content, pixels)
    np.testing.assert_array_equal(got.array, upright)
    assert got.array.shape == upright.shape
    assert got.turned == (mark != 1)


@pytest.mark.parametrize("mark", FLIPS)
def test_eight_orientations_of_a_jpeg(mark):
    array = photo(40, 64)
    exif = Image.Exif()
    exif[274] = mark
    content = saved(lying(Image.fromarray(array), mark), "JPEG", quality=98, subsampling=0, exif=exif)
    got = decode(content, 100)
    assert np.abs(got.array.astype(int) - array).mean() < 2
    assert (got.turned, got.array.shape) == (mark != 1, (40, 64, 3))


@pytest.mark.parametrize("mark", [0, 9, 255])
def test_a_mark_that_does_not_exist_turns_nothing(mark):
    exif = Image.Exif()
    exif[274] = mark
    got = decode(saved(Image.fromarray(photo(40, 60)), "JPEG", exif=exif), 100)
    assert got.array.shape == (40, 60, 3)
    assert not got.turned


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"MM\0*\xff\xff\xff\xff", b"neither MM nor II"])
def test_a_damaged_exif_block_costs_no_picture(block):
    content = saved(Image.fromarray(photo(40, 60)), "JPEG", exif=b"Exif\0\0" + block, dpi=(72, 72))
    assert decode(content, 100).array.shape == (40, 60, 3)


def test_a_mark_behind_the_pixels_of_a_png_does_not_count():
    exif = Image.Exif()
    exif[274] = 6
    whole = saved(Image.fromarray(photo(40, 60)), "PNG", exif=exif)
    at = whole.index(b"eXIf") - 4
    length = 12 + int.from_bytes(whole[at : at + 4], "big")
    moved = whole[:at] + whole[at + length : -12] + whole[at : at + length] + whole[-12:]
    assert decode(whole, 100).array.shape == (60, 40, 3)
    assert decode(moved, 100).array.shape == (40, 60, 3)


# ---- what cannot be read


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "TIFF LZW"])
@pytest.mark.parametrize("percent", range(5, 100, 5))
def test_a_file_cut_at_every_5_percent_is_named_with_the_byte(form, percent):
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    options = {"progressive": {"progressive": True}, "TIFF LZW": {"compression": "tiff_lzw"}}.get(form, {})
    whole = saved(Image.fromarray(noise), "JPEG" if form == "progressive" else form.split()[0], **options)
    decode(whole, 64)
    cut = whole[: len(whole) * percent // 100]
    wanted = "ends at byte|damaged" if "TIFF" in form else "^ends at byte " + f"{len(cut):,}".replace(",", NBSP) + "$"
    with pytest.raises(Unreadable, match=wanted):
        decode(cut, 64)


def test_the_reason_names_a_cut_at_65_536_as_people_write_numbers():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    with pytest.raises(Unreadable, match=f"^ends at byte 65{NBSP}536$"):
        decode(saved(Image.fromarray(noise), "JPEG", quality=95)[:65536], 48)


def test_empty_and_foreign_files(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(Unreadable, match="^empty file$"):
        decode(empty, 48)
    with pytest.raises(Unreadable, match="^not a picture: none of JPEG, PNG"):
        decode(b"<!doctype html><title>404</title>", 48)
    with pytest.raises(Unreadable, match="^not a picture"):
        decode(saved(Image.new("RGB", (4, 4)), "ICO"), 48)  # a format that Pillow knows and the list does not
    with pytest.raises(Unreadable, match="^No such file or directory$"):
        decode(tmp_path / "gone.jpg", 48)
    with pytest.raises(Unreadable, match="^ends at byte 2$|^damaged"):
        decode(b"BM", 48)


def test_damage_in_the_middle_is_told_as_damage():
    content = bytearray(saved(Image.fromarray(photo()), "PNG"))
    at = content.index(b"IDAT") + 4
    content[at : at + 40] = bytes(40)
    with pytest.raises(Unreadable, match="^damaged: "):
        decode(bytes(content), 64)


def test_floating_point_and_32_bit_greys_are_refused_by_name():
    with pytest.raises(Unreadable, match="mode F"):
        decode(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 48)
    with pytest.raises(Unreadable, match="mode LAB"):
        decode(saved(Image.new("LAB", (4, 4)), "TIFF"), 48)
    for low, high in ((0, 65536), (-3, 9)):
        values = np.array([[low, high]], np.int32)
        with pytest.raises(Unreadable, match=f"grey values from {low} to {high}, beyond 16 bits"):
            decode(saved(Image.fromarray(values), "TIFF"), 48)


def head_only(w, h):
    """A PNG whose header lies about its size: a hundred bytes that would decode to gigabytes."""
    return png(w, h, 8, 6, [b"\0\0\0\0"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("w, h", [(8001, 8000), (65536, 1), (1, 65536), (10000, 10000), (13000, 13000), (20000, 20000), (2**31 - 1,) * 2])
def test_too_many_pixels_are_refused_from_the_header_without_a_warning(w, h):
    found = f"{w:,} × {h:,} pixels".replace(",", NBSP) + f", more than the 64{NBSP}000{NBSP}000, or 65{NBSP}535 a side"
    with pytest.raises(Unreadable, match=re.escape(found)):
        decode(head_only(w, h), 48)


def test_as_many_pixels_as_the_cap_are_read():
    with pytest.raises(Unreadable, match="^ends at byte|^damaged"):  # no word of its size: its pixels were looked for
        decode(head_only(8000, 8000), 48)
    assert MAX_PIXELS == 8000 * 8000


@pytest.mark.parametrize("w, h, found", [(30000, 30000, "900 000 000|30 000 × 30 000"), (16_711_684, 3, "16 711 684 × 3 pixels")])
def test_a_webp_of_140_bytes_that_claims_a_wide_canvas_is_named_at_once(w, h, found):
    frames = [Image.new("RGBA", (2, 2), (1, 2, 3, k)) for k in (4, 5)]
    content = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    at = content.index(b"VP8X") + 12
    content[at : at + 6] = (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
    t0 = time.monotonic()
    with pytest.raises(Unreadable, match=found.replace(" ", r"\s")):
        decode(bytes(content), 48)
    assert time.monotonic() - t0 < 1


def test_a_sparse_file_of_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "huge.bmp"
    with path.open("wb") as file:
        file.write(b"BM" + bytes(60))
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(Unreadable, match="512 MB, more than the 512 MB"):
        decode(path, 48)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bomb_costs_no_memory(tmp_path):
    """M9: 20 587 bytes that decode to 507 MB. The peak of a fresh process stays under 150 MB."""
    bomb = tmp_path / "bomb.png"
    row = bytes(13000 * 3)
    squeeze = zlib.compressobj(9)
    body = b"".join(squeeze.compress(b"\0" + row) for _ in range(13000)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    code = (
        "import sys; from pathlib import Path; from cloche.data.pictures import decode, Unreadable\n"
        "try: decode(Path(sys.argv[1]), 48)\n"
        "except Unreadable: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bomb)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000  # not ru_maxrss, which a child inherits
    assert done.stderr == ""


def test_memory_that_runs_out_is_not_called_a_bad_file(monkeypatch):
    def full(*_given):
        raise MemoryError

    content = saved(Image.fromarray(photo()), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", full)
    with pytest.raises(MemoryError):
        decode(content, 48)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_random_bytes_flipped_never_raise_anything_else(form):
    """300 damaged files a format: each is a picture or Unreadable, and header and picture agree on the frame."""
    g = np.random.default_rng(1)
    whole = np.frombuffer(saved(Image.fromarray(photo(16, 24)), form), np.uint8)
    for _ in range(300):
        bad = whole.copy()
        at = g.integers(0, min(len(bad), g.choice([64, len(bad)])), 3)
        bad[at] = g.integers(0, 256, 3)
        try:
            got = decode(bad.tobytes(), 32)
        except Unreadable as reason:
            assert str(reason)
            continue
        assert max(got.array.shape[:2]) <= 32 and got.array.shape[2] in (1, 3)
