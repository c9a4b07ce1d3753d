"""The reader of class folders: layouts, names, junk, hostile entries, faults that people see."""

import io
import os
from pathlib import Path
import socket
import sys
import threading

import numpy as np
from PIL import Image
import pytest

from cloche.data.pictures import decode
from cloche.data.read import folder
from cloche.data.read.examples import NONE, TEST, TRAIN, VALIDATION, digest
from cloche.data.read.folder import natural, read_folder, shown
from cloche.errors import UserError

posix = pytest.mark.skipif(sys.platform == "win32", reason="names and files that Windows does not have")


def put(path: Path, value=0, h=4, w=4, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (w, h), value if mode == "L" else (value, value, 0)).save(path, **options)
    return path


def two_classes(root: Path):
    """Two sound classes, so that a test can add what it is about."""
    put(root / "beans" / "1.png", 10)
    put(root / "maize" / "1.png", 20)
    return root


def expect_fault(root, **wanted):
    with pytest.raises(UserError) as caught:
        read_folder(root, 8)
    for name, text in wanted.items():
        assert text in getattr(caught.value, name), (name, caught.value)
    return caught.value


# ---- layouts


def test_class_folders_with_folders_inside(tmp_path):
    for k, name in enumerate(["maize/10.png", "maize/2.png", "maize/field 1/7.png", "beans/a.png"]):
        put(tmp_path / name, k)
    got = read_folder(tmp_path, 8)
    assert got.kind == "pictures"
    assert got.labels == ["beans", "maize"]
    assert got.names == ["beans/a.png", "maize/2.png", "maize/10.png", "maize/field 1/7.png"]
    assert got.fields["image"][:, 0, 0, 0].tolist() == [3, 1, 0, 2]
    assert got.label.tolist() == [0, 1, 1, 1]
    assert got.part.tolist() == [NONE] * 4
    assert (got.left_out, got.notes) == ([], {"ignored": 0, "merged": 0, "turned": 0})
    assert {k: (v.shape, v.dtype) for k, v in got.fields.items()} == {"image": ((4, 4, 4, 1), np.uint8), "size": ((4, 2), np.int32)}
    assert [a.dtype for a in (got.label, got.digest, got.part)] == [np.int64, np.uint8, np.uint8]
    np.testing.assert_array_equal(got.digest[0], digest((tmp_path / "beans" / "a.png").read_bytes()))


def test_every_row_is_the_decoder_s_picture_in_the_top_left_corner(tmp_path):
    shapes = {"a/1.png": (3, 9), "a/2.png": (20, 2), "b/1.png": (8, 8), "b/2.png": (1, 1)}
    g = np.random.default_rng(0)
    for k, (name, (h, w)) in enumerate(shapes.items()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(g.integers(1, 256, (h, w) if k % 2 else (h, w, 3), np.uint8)).save(path)
    got = read_folder(tmp_path, 8)
    assert got.fields["image"].shape == (4, 8, 8, 3)
    for row, size, name in zip(got.fields["image"], got.fields["size"], got.names, strict=True):
        wanted = decode(tmp_path / name, 8).array
        assert size.tolist() == list(wanted.shape[:2])
        np.testing.assert_array_equal(row[: size[0], : size[1]], np.repeat(wanted, 3 // wanted.shape[2], -1))  # grey in all three channels
        assert not row[size[0] :].any()
        assert not row[:, size[1] :].any()


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "VALID", "Test"), ("TRAIN", "Validation", "TEST")])
def test_parts_that_the_source_gives(names, tmp_path):
    for k, name in enumerate(names):
        put(tmp_path / name / "b" / "1.png", 10 * k)
        put(tmp_path / name / "a" / "x" / "1.png", 10 * k + 1)
    (tmp_path / "labels.csv").touch()
    put(tmp_path / "extra" / "c" / "1.png")
    put(tmp_path / names[0] / "loose.png")
    got = read_folder(tmp_path, 8)
    assert got.part.tolist() == [TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TEST]
    assert got.fields["image"][:, 0, 0, 0].tolist() == [1, 0, 11, 10, 21, 20]
    assert got.labels == ["a", "b"]
    outside = {name for name, reason in got.left_out if reason == "not in a class folder"}
    assert outside == {"extra/c/1.png", "labels.csv", f"{names[0]}/loose.png"}


def test_train_alone_is_split_like_any_folder(tmp_path):
    two_classes(tmp_path / "train")
    got = read_folder(tmp_path, 8)
    assert (got.labels, got.part.tolist()) == (["beans", "maize"], [NONE, NONE])


def test_classes_may_be_called_like_a_part(tmp_path):
    """Trains among other vehicles, valid and invalid: no parts without train and one more."""
    put(tmp_path / "train" / "1.png")
    put(tmp_path / "bus" / "1.png")
    assert read_folder(tmp_path, 8).labels == ["bus", "train"]
    put(tmp_path / "more" / "valid" / "1.png")
    put(tmp_path / "more" / "invalid" / "1.png")
    assert read_folder(tmp_path / "more", 8).labels == ["invalid", "valid"]


def test_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    for k in range(30):
        put(tmp_path / f"c{k % 3}" / f"{k}.png", k)
    (tmp_path / "c1" / "note.txt").touch()
    first = read_folder(tmp_path, 8)
    whole = os.scandir
    monkeypatch.setattr(folder.os, "scandir", lambda path: reversed(list(whole(path))))
    second = read_folder(tmp_path, 8)
    assert (first.names, first.left_out) == (second.names, second.left_out)
    np.testing.assert_array_equal(first.digest, second.digest)


# ---- names


def test_natural_order():
    wanted = ["", "00000", "00001", "1", "2", "२", "10", "१०", "a", "item 9", "item 12", "x" * 200 + "7", "²", "Ä"]
    assert sorted(set(wanted), key=natural) == wanted


def test_twelve_numbered_classes_and_zeros_kept(tmp_path):
    for k in range(12):
        put(tmp_path / str(k) / "1.png", k)
        put(tmp_path / "padded" / f"{k:05}" / "1.png", k)
    got = read_folder(tmp_path, 8)
    assert got.labels == [str(k) for k in range(12)] + ["padded"]
    assert read_folder(tmp_path / "padded", 8).labels == [f"{k:05}" for k in range(12)]


@posix
def test_names_in_any_script(tmp_path):
    odd = ["मक्का", "line\nbreak", "-rf", "🌽 maize", " leading", "a'b\"c", "{path}", "%s", "सोर्घम", "x" * 250, "مرحبا"]
    for k, name in enumerate(odd):
        put(tmp_path / name / f"{name[:9]}.png", k)
    got = read_folder(tmp_path, 8)
    assert set(got.labels) == set(odd)
    assert "line\\nbreak/line\\nbrea.png" in got.names
    assert "मक्का/मक्का.png" in got.names
    assert not any("\n" in name for name in got.names)
    assert [odd[k] for k in got.fields["image"][:, 0, 0, 0]] == [got.labels[k] for k in got.label]


@posix
def test_a_name_that_is_no_utf_8_can_be_written_as_json(tmp_path):
    two_classes(tmp_path)
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/1.png")))
    got = read_folder(tmp_path, 8)
    assert "caf\\udce9" in got.labels
    "".join(got.labels + got.names).encode()


def test_shown_keeps_joiners_and_escapes_what_could_forge_a_line():
    assert shown("क्\u200dष 👩\u200d🌾 a b") == "क्\u200dष 👩\u200d🌾 a b"
    assert shown("a\nb\t\x1b[31m\u202e\udcff") == "a\\nb\\t\\x1b[31m\\u202e\\udcff"


@posix
def test_folders_that_unicode_makes_equal_are_one_class(tmp_path):
    put(tmp_path / "caf\u00e9" / "1.png")
    put(tmp_path / "cafe\u0301" / "2.png")
    put(tmp_path / "tea" / "1.png")
    if len(os.listdir(tmp_path)) < 3:
        pytest.skip("this file system makes the names equal itself")
    got = read_folder(tmp_path, 8)
    assert (got.labels, got.label.tolist(), got.notes["merged"]) == (["caf\u00e9", "tea"], [0, 0, 1], 1)


# ---- what is ignored or left out


def test_junk_is_ignored_and_counted(tmp_path):
    two_classes(tmp_path)
    for name in (".DS_Store", "beans/Thumbs.db", "maize/desktop.ini", "beans/.hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("__MACOSX/1.png", ".ipynb_checkpoints/1.png", "beans/.ipynb_checkpoints/1.png"):
        put(tmp_path / name)
    got = read_folder(tmp_path, 8)
    assert (got.labels, len(got), got.notes["ignored"], got.left_out) == (["beans", "maize"], 2, 7, [])


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    two_classes(tmp_path)
    beans = tmp_path / "beans"
    (beans / "empty.jpg").touch()
    (beans / "page.jpg").write_text("<!doctype html>")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    (beans / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (beans / "fine.txt").write_bytes(whole.getvalue())  # by content, not by name
    (tmp_path / "read me.md").write_text("hello")
    (tmp_path / "rye").mkdir()
    got = read_folder(tmp_path, 8)
    assert got.names == ["beans/1.png", "beans/fine.txt", "maize/1.png"]
    byte = f"{len(whole.getvalue()) // 2:,}".replace(",", "\u00a0")
    assert got.left_out == [
        ("beans/cut.jpg", f"ends at byte {byte}"),
        ("beans/empty.jpg", "empty file"),
        ("beans/page.jpg", "not a picture: none of JPEG, PNG, WebP, BMP, GIF, TIFF, PPM"),
        ("read me.md", "not in a class folder"),
        ("rye", "empty class folder"),
    ]


def test_rows_close_up_where_a_whole_header_hides_a_cut_picture(tmp_path):
    """Of 40 files every third fails only when decoded; the frame is of those that did not."""
    g = np.random.default_rng(0)
    for k in range(40):
        path = put(tmp_path / f"c{k % 2}" / f"{k}.png", k, h=5 + k % 3)
        if k % 3 == 0:
            whole = io.BytesIO()
            Image.fromarray(g.integers(0, 256, (6, 6), np.uint8)).save(whole, "PNG")
            path.write_bytes(whole.getvalue()[:-30])
    got = read_folder(tmp_path, 8)
    kept = [k for c in (0, 1) for k in range(c, 40, 2) if k % 3]
    assert got.names == [f"c{k % 2}/{k}.png" for k in kept]
    assert got.fields["image"].shape == (26, 7, 4, 1)
    assert got.fields["image"][:, 0, 0, 0].tolist() == kept
    assert got.fields["size"].tolist() == [[5 + k % 3, 4] for k in kept]
    assert len(got.left_out) == 14
    for row, (h, w), k in zip(got.fields["image"], got.fields["size"], kept, strict=True):
        assert (row[:h, :w] == k).all()
        assert row.sum() == h * w * k
    for k, name in enumerate(got.names):
        np.testing.assert_array_equal(got.digest[k], digest((tmp_path / name).read_bytes()))


def test_a_class_whose_pictures_all_fail_is_no_label(tmp_path):
    two_classes(tmp_path)
    (tmp_path / "rye").mkdir()
    (tmp_path / "rye" / "1.jpg").write_text("x")
    cut = io.BytesIO()
    Image.effect_noise((32, 32), 90).save(cut, "PNG")
    (tmp_path / "amaranth").mkdir()
    (tmp_path / "amaranth" / "1.png").write_bytes(cut.getvalue()[:-200])
    got = read_folder(tmp_path, 8)
    assert (got.labels, got.label.tolist()) == (["beans", "maize"], [0, 1])
    assert ("rye", "no readable picture in this class folder") in got.left_out
    assert ("amaranth", "no readable picture in this class folder") in got.left_out


def test_a_file_that_goes_after_it_was_listed_is_left_out(tmp_path, monkeypatch):
    two_classes(tmp_path)
    gone = put(tmp_path / "beans" / "2.png", 3)
    first = folder.decode

    def then_gone(content, pixels):
        gone.unlink(missing_ok=True)
        return first(content, pixels)

    monkeypatch.setattr(folder, "decode", then_gone)
    monkeypatch.setattr(folder.os, "cpu_count", lambda: 1)  # one thread, which reads beans/1.png first
    assert read_folder(tmp_path, 8).left_out == [("beans/2.png", "No such file or directory")]


@pytest.mark.parametrize("mark", range(1, 9))
def test_exif_turns_are_counted_and_the_frame_fits(mark, tmp_path):
    exif = Image.Exif()
    exif[274] = mark
    put(tmp_path / "a" / "1.jpg", 9, h=4, w=7, mode="RGB", exif=exif)
    put(tmp_path / "b" / "1.jpg", 9, h=2, w=2, mode="RGB")
    got = read_folder(tmp_path, 8)
    assert got.fields["size"][0].tolist() == ([4, 7] if mark < 5 else [7, 4])
    assert got.fields["image"].shape[1:3] == tuple(got.fields["size"][0])
    assert got.notes["turned"] == (mark > 1)


@posix
def test_pipes_sockets_loops_and_dangling_links_never_block(tmp_path, monkeypatch):
    two_classes(tmp_path)
    beans = tmp_path / "beans"
    os.mkfifo(beans / "pipe.jpg")
    os.mkfifo(tmp_path / "root pipe")
    monkeypatch.chdir(beans)  # the path of a socket is at most 108 bytes long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
    (beans / "loop").symlink_to(tmp_path)
    (tmp_path / "linked class").symlink_to(beans)
    (beans / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (beans / "itself.jpg").symlink_to(beans / "itself.jpg")
    (beans / "linked.png").symlink_to(tmp_path / "maize" / "1.png")
    (beans / "to a pipe.png").symlink_to(beans / "pipe.jpg")
    found = []
    reader = threading.Thread(target=lambda: found.append(read_folder(tmp_path, 8)), daemon=True)
    reader.start()
    reader.join(20)
    assert found, "blocked"
    got = found[0]
    assert got.names == ["beans/1.png", "beans/linked.png", "maize/1.png"]
    assert dict(got.left_out) == {
        "beans/pipe.jpg": "not a regular file",
        "root pipe": "not a regular file",
        "beans/socket.jpg": "not a regular file",
        "beans/loop": "link to a folder: not followed",
        "linked class": "link to a folder: not followed",
        "beans/gone.jpg": "link to nothing",
        "beans/itself.jpg": "link to nothing",
        "beans/to a pipe.png": "not a regular file",
    }


def test_what_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is put in by hand."""
    two_classes(tmp_path)
    put(tmp_path / "beans" / "locked.png")
    put(tmp_path / "maize" / "vault" / "1.png")
    whole_open, whole_scan = Path.open, os.scandir

    def refusing(path, *given, **named):
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return whole_open(path, *given, **named)

    def no_listing(path):
        if Path(path).name == "vault":
            raise PermissionError(13, "Permission denied", str(path))
        return whole_scan(path)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(folder.os, "scandir", no_listing)
    got = read_folder(tmp_path, 8)
    assert got.left_out == [("beans/locked.png", "Permission denied"), ("maize/vault", "Permission denied")]
    assert len(got) == 2


# ---- faults that people see


def test_a_path_that_is_missing_or_a_file_is_told(tmp_path):
    """As a recipe may name one; of a path on the command line `kind_of` tells the nearest name."""
    expect_fault(tmp_path / "gone", what=f"{tmp_path / 'gone'} has no class folders with pictures", found="No such file or directory")
    expect_fault(put(tmp_path / "one.png"), what="one.png has no class folders with pictures", found="Not a directory")


def test_an_empty_folder_and_one_without_pictures(tmp_path):
    expect_fault(tmp_path, what=f"{tmp_path} has no class folders with pictures", found="there is nothing in it", do=f"{tmp_path}/maize")
    (tmp_path / "maize").mkdir()
    (tmp_path / "notes.txt").touch()
    expect_fault(tmp_path, what="has no class folders", found="notes.txt (not in a class folder), maize (empty class folder)")


def test_pictures_without_class_folders_are_told_how_to_lie(tmp_path):
    for k in range(5):
        put(tmp_path / f"{k}.png")
    found = "0.png (not in a class folder), 1.png (not in a class folder), 2.png (not in a class folder) and 2 more"
    expect_fault(
        tmp_path, what="has no class folders with pictures", found=found, do="put the pictures of each class into a folder of its own"
    )
    put(tmp_path / "split" / "train" / "1.png")
    put(tmp_path / "split" / "test" / "1.png")
    expect_fault(tmp_path / "split", found="test/1.png (not in a class folder), train/1.png")


def test_one_class_only(tmp_path):
    put(tmp_path / "photos" / "maize" / "1.png")
    (tmp_path / "photos" / "beans").mkdir()
    told = expect_fault(tmp_path / "photos", what="one class only: maize", found="beans (empty class folder)")
    assert (told.code, told.do.split(";")[0]) == (2, "a classifier needs at least two folders, one for each class")
    expect_fault(tmp_path, what="one class only: photos", do=f"if they lie inside this one, give {tmp_path / 'photos'}")
    (tmp_path / "photos" / "beans" / "1.png").write_text("x")
    expect_fault(tmp_path / "photos", what="one class only: maize", found="beans/1.png (not a picture")


def test_nothing_readable_names_three(tmp_path):
    for k in range(5):
        put(tmp_path / f"c{k % 2}" / f"{k}.png").write_bytes(b"")
    told = expect_fault(tmp_path, what=f"no picture in {tmp_path} can be read")
    assert told.found == "c0/0.png (empty file), c0/2.png (empty file), c0/4.png (empty file) and 2 more"


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_class_that_train_lacks(part, tmp_path):
    two_classes(tmp_path / "train")
    two_classes(tmp_path / part)
    put(tmp_path / part / "rye" / "1.png")
    what, found = "the class rye does not occur in train", f"one of its pictures is {part}/rye/1.png"
    expect_fault(tmp_path, what=what, found=found, do="add pictures of it to train")
    (tmp_path / "train" / "rye").mkdir()
    (tmp_path / "train" / "rye" / "1.png").write_text("x")
    expect_fault(tmp_path, what="the class rye does not occur in train")


def test_a_class_may_be_missing_from_test(tmp_path):
    two_classes(tmp_path / "train")
    put(tmp_path / "test" / "beans" / "1.png")
    assert read_folder(tmp_path, 8).part.tolist() == [TRAIN, TRAIN, TEST]


def test_memory_errors_and_our_own_mistakes_are_not_swallowed(tmp_path, monkeypatch):
    two_classes(tmp_path)

    def broken(_content, _pixels):
        raise MemoryError("33 GB")

    monkeypatch.setattr(folder, "decode", broken)
    with pytest.raises(MemoryError, match="33 GB"):
        read_folder(tmp_path, 8)
