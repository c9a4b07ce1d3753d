"""The reader of IDX files: what MNIST's files give, and every way in which they can lie."""

import gzip
import struct
import time
import zlib

import numpy as np
from PIL import Image
import pytest

from cloche.data.read.examples import NONE, TEST, TRAIN, row_digests
from cloche.data.read.idx import looks_like_idx, read_idx
from cloche.errors import UserError

NAMES = {("train", "images"): "train-images-idx3-ubyte", ("train", "labels"): "train-labels-idx1-ubyte"}
NAMES |= {("test", "images"): "t10k-images-idx3-ubyte", ("test", "labels"): "t10k-labels-idx1-ubyte"}


def packed(array):
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def arrays(h=6, w=5):
    g = np.random.default_rng(0)
    return {
        ("train", "images"): g.integers(0, 256, (7, h, w)),
        ("train", "labels"): np.array([3, 0, 1, 1, 2, 0, 3]),
        ("test", "images"): g.integers(0, 256, (2, h, w)),
        ("test", "labels"): np.array([2, 5]),
    }


def put(root, suffix="", dot="-", **replaced):
    """The four files; replaced: name with _ for - → bytes (None leaves the file out)."""
    for key, array in arrays().items():
        name = NAMES[key]
        content = replaced.get(name.replace("-", "_"), packed(array))
        if content is not None:
            (root / (name.replace("-idx", f"{dot}idx") + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    return root


def expect_fault(root, **wanted):
    with pytest.raises(UserError) as caught:
        read_idx(root, 28)
    for name, text in wanted.items():
        assert text.replace(" ", "\u00a0") == getattr(caught.value, name).replace(" ", "\u00a0"), caught.value
    return caught.value


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_the_four_files(suffix, dot, tmp_path):
    put(tmp_path, suffix, dot)
    assert looks_like_idx(tmp_path)
    got = read_idx(tmp_path, 28)
    wanted = np.concatenate([arrays()["train", "images"], arrays()["test", "images"]])
    np.testing.assert_array_equal(got.fields["image"], wanted[..., None])
    assert (got.kind, got.fields["image"].dtype, got.fields["size"].dtype) == ("pictures", np.uint8, np.int32)
    assert got.fields["size"].tolist() == [[6, 5]] * 9
    assert got.label.tolist() == [3, 0, 1, 1, 2, 0, 3, 2, 5]
    assert got.label.dtype == np.int64
    assert got.labels == ["0", "1", "2", "3", "4", "5"]
    assert got.part.tolist() == [TRAIN] * 7 + [TEST] * 2
    assert got.names == [f"train {k}" for k in range(7)] + ["test 0", "test 1"]
    np.testing.assert_array_equal(got.digest, row_digests(wanted.astype(np.uint8)))
    assert (got.left_out, got.notes) == ([], {})


def test_the_unpacked_file_is_taken_where_both_lie(tmp_path):
    put(tmp_path)
    for key, array in arrays().items():
        (tmp_path / (NAMES[key] + ".gz")).write_bytes(gzip.compress(packed(array * 0)))
    assert read_idx(tmp_path, 28).label.max() == 5


def test_test_may_be_called_test(tmp_path):
    put(tmp_path)
    for kind in ("images", "labels"):
        (tmp_path / NAMES["test", kind]).rename(tmp_path / NAMES["test", kind].replace("t10k", "test"))
    assert read_idx(tmp_path, 28).part.tolist() == [TRAIN] * 7 + [TEST] * 2


def test_train_alone_tells_no_split(tmp_path):
    put(tmp_path, t10k_images_idx3_ubyte=None, t10k_labels_idx1_ubyte=None)
    got = read_idx(tmp_path, 28)
    assert got.part.tolist() == [NONE] * 7
    assert got.labels == ["0", "1", "2", "3"]


def test_larger_pictures_shrink_by_the_decoder_s_filter(tmp_path):
    put(tmp_path)
    got = read_idx(tmp_path, 4)
    assert got.fields["image"].shape == (9, 4, 4, 1)
    assert got.fields["size"].tolist() == [[4, 4]] * 9
    row = Image.fromarray(arrays()["train", "images"][3].astype(np.uint8)).resize((4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(got.fields["image"][3, :, :, 0], np.asarray(row))
    np.testing.assert_array_equal(got.digest, read_idx(tmp_path, 28).digest)  # of what the file holds


def test_mnist_s_size_takes_a_second(tmp_path):
    g = np.random.default_rng(0)
    files = {"train": 60_000, "test": 10_000}
    for part, n in files.items():
        (tmp_path / NAMES[part, "images"]).write_bytes(packed(g.integers(0, 256, (n, 28, 28), np.uint8)))
        (tmp_path / NAMES[part, "labels"]).write_bytes(packed(g.integers(0, 10, n, np.uint8)))
    t0 = time.monotonic()
    got = read_idx(tmp_path, 48)
    assert time.monotonic() - t0 < 5  # measured 0.3
    assert got.fields["image"].shape == (70_000, 28, 28, 1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_cut_file_tells_both_sizes(suffix, tmp_path):
    whole = packed(arrays()["train", "images"])
    put(tmp_path, suffix, train_images_idx3_ubyte=whole[:-1])
    what = f"train-images-idx3-ubyte{suffix} is damaged"
    expect_fault(tmp_path, what=what, found="it has 225 bytes, its header promises 226", do="download or copy it again")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_is_too_long(suffix, tmp_path):
    put(tmp_path, suffix, train_labels_idx1_ubyte=packed(arrays()["train", "labels"]) + b"\0")
    expect_fault(tmp_path, found="it has more than the 15 bytes that its header promises")


@pytest.mark.parametrize("n_bytes", [0, 3, 15])
def test_a_file_that_ends_in_its_header(n_bytes, tmp_path):
    put(tmp_path, train_images_idx3_ubyte=packed(arrays()["train", "images"])[:n_bytes])
    expect_fault(tmp_path, found=f"it ends at byte {n_bytes}, inside its header")


def test_a_wrong_magic_number(tmp_path):
    put(tmp_path, train_images_idx3_ubyte=packed(np.zeros((20, 1))))
    expect_fault(tmp_path, found="it begins with 2050 instead of 2051")
    put(tmp_path, t10k_labels_idx1_ubyte=packed(np.zeros((2, 3, 3))))
    expect_fault(tmp_path, what="t10k-labels-idx1-ubyte is damaged", found="it begins with 2051 instead of 2049")


@pytest.mark.parametrize("shape, told", [((0, 28, 28), "0 × 28 × 28"), ((2**32 - 1,) * 3, "4 294 967 295 × 4 294 967 295 × 4 294 967 295")])
def test_sizes_are_bounded(shape, told, tmp_path):
    put(tmp_path, train_images_idx3_ubyte=struct.pack(">4I", 2051, *shape) + bytes(100))
    expect_fault(tmp_path, found=f"its header promises {told} bytes")


def test_a_header_that_promises_gigabytes_costs_nothing(tmp_path):
    put(tmp_path, train_images_idx3_ubyte=struct.pack(">4I", 2051, 2_000_000, 28, 28) + bytes(100))
    t0 = time.monotonic()
    expect_fault(tmp_path, found="it has 116 bytes, its header promises 1 568 000 016")
    assert time.monotonic() - t0 < 1


def test_a_gzip_bomb_costs_nothing(tmp_path):
    put(tmp_path, ".gz")
    squeeze = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    swollen = squeeze.compress(struct.pack(">4I", 2051, 7, 6, 5)) + b"".join(squeeze.compress(block) for _ in range(100)) + squeeze.flush()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(swollen)
    t0 = time.monotonic()
    expect_fault(tmp_path, found="it has more than the 226 bytes that its header promises")
    assert time.monotonic() - t0 < 0.2  # unpacking it all takes 0.3


def test_a_damaged_gzip(tmp_path):
    put(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, found in (
        (whole[:-8] + b"\0\0\0\0" + whole[-4:], "CRC check failed"),
        (whole[:-20], "Compressed file ended before"),
        (b"<html>", "Not a gzipped file (b'<h')"),
        (whole[:12] + b"\xff" * 8 + whole[20:], "Error -3 while decompressing"),
    ):
        path.write_bytes(content)
        told = expect_fault(tmp_path, what="train-images-idx3-ubyte.gz is damaged")
        assert found in told.found


def test_counts_that_differ(tmp_path):
    put(tmp_path, train_images_idx3_ubyte=packed(np.zeros((2000, 2, 2))), train_labels_idx1_ubyte=packed(np.zeros(1999)))
    expect_fault(tmp_path, what="train-images-idx3-ubyte and its labels do not belong together", found="2 000 pictures but 1 999 labels")


def test_sizes_that_differ_between_train_and_test(tmp_path):
    put(tmp_path, t10k_images_idx3_ubyte=packed(np.zeros((2, 3, 9))))
    expect_fault(tmp_path, what="the pictures of train and test differ in size", found="6 × 5 in train, 3 × 9 in test")


def test_labels_that_are_missing(tmp_path):
    put(tmp_path, ".gz", t10k_labels_idx1_ubyte=None)
    expect_fault(tmp_path, what="the labels of t10k-images-idx3-ubyte.gz are missing", do="add t10k-labels-idx1-ubyte.gz")


def test_train_that_is_missing(tmp_path):
    put(tmp_path, train_images_idx3_ubyte=None)
    assert looks_like_idx(tmp_path)
    expect_fault(tmp_path, what=f"{tmp_path} lacks the training pictures", do="add train-images-idx3-ubyte.gz")


def test_what_does_not_look_like_idx(tmp_path):
    (tmp_path / "train-labels-idx1-ubyte").touch()
    (tmp_path / "train-images.csv").touch()
    (tmp_path / "t10k-images-idx3-ubyte").mkdir()
    assert not looks_like_idx(tmp_path)
    assert not looks_like_idx(tmp_path / "gone")
    assert not looks_like_idx(tmp_path / "train-images.csv")
