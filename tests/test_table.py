"""Rows of different lengths: taken out by number, padded to a grid with zeros, the same whatever stands beside them."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from cloche.data.table import GRID, Ragged, Table, on_grid
from cloche.data.text import TextPrepare

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def ragged(rows, dtype=np.int64):
    """As a table holds it: values as a tensor."""
    made = Ragged.of(rows, dtype)
    return Ragged(torch.from_numpy(made.values), made.offsets)


def numbered(lengths, width=0):
    """Rows without a zero in them, so that padding shows."""
    shape = (width,) if width else ()
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end).reshape(-1, *[1] * len(shape)) * np.ones(shape, int) + 1 for n, end in zip(lengths, ends, strict=True)]


def test_taken_rows_by_hand():
    """Three rows end to end; two of them out of order, the shorter padded with zeros to the grid."""
    made = ragged([[1, 2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11, 12]])
    assert made.values.tolist() == list(range(1, 13)) and made.offsets.tolist() == [0, 3, 3, 12]
    assert len(made) == 3 and made.lengths.tolist() == [3, 0, 9] and made[2].tolist() == list(range(4, 13))
    rows, length = made.take(np.array([2, 0]))
    assert rows.tolist() == [[*range(4, 13), *[0] * 7], [1, 2, 3, *[0] * 13]]
    assert length.tolist() == [9, 3] and length.dtype == torch.int64
    rows, length = made.take(np.array([0, 1, 0]))  # the grid follows the longest that is taken, and a row may come twice
    assert rows.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [0] * 8, [1, 2, 3, 0, 0, 0, 0, 0]] and length.tolist() == [3, 0, 3]
    assert made.values.tolist() == list(range(1, 13))  # filling the gaps with zeros touches no row


def test_bytes_numbers_and_nothing():
    made = Ragged.of([b"abc", b"", "ż".encode()], np.uint8)
    assert made.values.tolist() == [97, 98, 99, 0xC5, 0xBC] and made.values.dtype == np.uint8
    assert Ragged.of([[0.5], [1, 2]], np.float32).values.dtype == np.float32
    nothing = Ragged.of([], np.float32)
    assert len(nothing) == 0 and nothing.offsets.tolist() == [0] and nothing.values.dtype == np.float32
    rows, length = ragged([b"", b""]).take(np.array([1, 0]))
    assert rows.shape == (2, GRID) and not rows.any() and length.tolist() == [0, 0]


@pytest.mark.parametrize("length, padded", [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 24)])
def test_the_grid(length, padded):
    assert on_grid(length) == padded


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, width=st.integers(0, 3), data=st.data())
def test_any_rows_come_out_as_they_went_in(lengths, width, data):
    rows = numbered(lengths, width)
    made, ids = ragged(rows), data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    taken, length = made.take(np.array(ids))
    assert length.tolist() == [lengths[i] for i in ids]
    assert taken.shape[:2] == (len(ids), on_grid(max(lengths[i] for i in ids)))
    for row, i in zip(taken, ids, strict=True):
        np.testing.assert_array_equal(row[: lengths[i]], rows[i].reshape(lengths[i], *row.shape[1:]))
        assert not row[lengths[i] :].any()
    few = TextPrepare.gather(TextPrepare, [{"x": rows[i]} for i in ids])  # what a person gives is padded as a table pads
    assert torch.equal(few["x"], taken) and torch.equal(few["x_len"], length)


def test_a_table_gives_a_ragged_field_padded_beside_its_lengths():
    rows = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 7]]
    label, frames = np.array([2, 0, 1]), [np.full((n, 2), n, np.float32) for n in (3, 1, 2)]
    table = Table({"tokens": Ragged.of(rows, np.int64), "frames": Ragged.of(frames, np.float32), "label": label}, main="tokens")
    assert table.n == 3 and table.lengths.tolist() == [1, 9, 2] and not table.running
    out = table.rows(np.array([2, 0]))
    assert set(out) == {"tokens", "tokens_len", "frames", "frames_len", "label"}
    assert out["tokens"].tolist() == [[7, 7, *[0] * 6], [5, *[0] * 7]] and out["tokens_len"].tolist() == [2, 1]
    assert out["frames"].shape == (2, 8, 2) and out["frames"][0, :, 0].tolist() == [2, 2, *[0] * 6] and out["frames_len"].tolist() == [2, 3]
    assert out["label"].tolist() == [1, 2]
    assert out["tokens"].dtype == torch.int64 and out["frames"].dtype == torch.float32
    assert [table.name(i) for i in range(3)] == ["0", "1", "2"] and Table({"label": label}, ["a", "b", "c"]).name(1) == "b"


def test_a_table_of_fixed_fields_costs_the_same_a_row():
    table = Table({"columns": np.arange(12.0).reshape(4, 3)})
    assert table.lengths is None and table.rows(np.array([3, 3]))["columns"].tolist() == [[9, 10, 11]] * 2


def test_a_table_moves_with_its_ragged_fields():
    table = Table({"tokens": Ragged.of([[1], [2, 3]], np.int64), "label": np.arange(2)}, main="tokens")
    assert table.to(torch.device("meta")) is table
    assert table.fields["tokens"].values.device.type == table.fields["label"].device.type == "meta"
    assert table.fields["tokens"].offsets.tolist() == [0, 1, 3]  # what is counted with stays on the host
