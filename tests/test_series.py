"""Series: what the reader refuses and names, the airline figures, how time is cut, windows, preparation and its undoing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cloche.data.chunk import Part
from cloche.data.series import SeriesConfig, SeriesPrepare, read_airline, read_series
from cloche.data.store import Store
from cloche.errors import UserError

YEARS = [1520, 1676, 2042, 2364, 2700, 2867, 3408, 3939, 4421, 4572, 5140, 5714]  # Box & Jenkins 1970: the totals of 1949 to 1960


def read(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_series(path)


def opened(values, **keys):
    values = np.asarray(values, float).reshape(len(values), -1)
    examples = replace(
        read_airline(),
        fields={"values": values},
        names=[str(i) for i in range(len(values))],
        **{k: np.zeros((len(values), 16) if k == "digest" else len(values), np.int64) for k in ("digest", "label", "part")},
    )
    config = SeriesConfig(source="made", **keys)
    store = Store(examples)
    rows = config.parts(store)
    return store, rows, SeriesPrepare.fit(store, rows, config)


def test_airline_is_the_published_series():
    found = read_airline()
    values = found.fields["values"]
    assert values.shape == (144, 1) and values.reshape(12, 12).sum(1).tolist() == YEARS
    assert values[:12, 0].tolist() == [112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118]
    assert values[-12:, 0].tolist() == [417, 391, 419, 461, 472, 535, 622, 606, 508, 461, 390, 432]
    assert (found.names[0], found.names[-1], len({d.tobytes() for d in found.digest})) == ("1949-01", "1960-12", 144)


@pytest.mark.parametrize(
    "text, names, values",
    [
        ("month,a,b\n1950-11,1,2\n1950-12,3,5\n1951-01,4,-1e3\n", ["1950-11", "1950-12", "1951-01"], [[1, 2], [3, 5], [4, -1000]]),
        ("\ufeffTag;Wert\r\n2024-02-28;1,5\r\n2024-02-29;2\r\n2024-03-01;3,25\r\n", None, [[1.5], [2], [3.25]]),  # a sheet saved in Poland
        ('n\t"x, y"\n5\t1\n10\t2\n15\t4\n\n', ["5", "10", "15"], [[1], [2], [4]]),
        ("t,x\n2020-01-31,1\n2020-02-29,2\n2020-03-31,3\n", None, [[1], [2], [3]]),  # ends of months
        ("t,x\n2019-07-01,1\n2020-07-01,2\n2021-07-01,3\n", None, [[1], [2], [3]]),  # years, one of them longer
        ("t,x\n2020-01-01 22:00,1\n2020-01-01 23:00,2\n2020-01-02 00:00,3\n", None, [[1], [2], [3]]),
    ],
)
def test_reads(tmp_path, text, names, values):
    found = read(tmp_path, text)
    assert found.fields["values"].tolist() == values and found.kind == "series" and found.labels == []
    assert names is None or found.names == names


MONTHS = "month,people\n1950-01,5\n1950-02,6\n1950-03,7\n"


@pytest.mark.parametrize(
    "text, found",
    [
        (MONTHS + "1950-07,8\n1950-08,9\n", "line 5: 1950-07 after 1950-03"),  # a gap
        (MONTHS + "1950-03,8\n", "line 5: 1950-03 after 1950-03"),  # twice
        (MONTHS + "1949-12,8\n", "line 5: 1949-12 after 1950-03"),  # unsorted
        ("day,x\n2024-02-27,1\n2024-02-28,2\n2024-03-01,3\n2024-03-02,4\n2024-03-03,4\n", "line 4: 2024-03-01 after 2024-02-28"),
        ("n,x\n1,5\n1,6\n1,7\n", "line 3: 1 after 1, line 4: 1 after 1"),
        (MONTHS + "1950-04,NaN\n", 'line 5: people is "NaN"'),
        (MONTHS + "1950-04,\n1950-05,inf\n", 'line 5: people is "", line 6: people is "inf"'),
        (MONTHS + "1950-04,n/a\n", 'line 5: people is "n/a"'),
        (MONTHS + "now,8\n", 'line 5: month is "now"'),
        (MONTHS + "1950-13,8\n", 'line 5: month is "1950-13"'),
        (MONTHS + "4,8\n", 'line 5: month is "4"'),  # another kind of time
        (MONTHS + "1950-04,8,9\n", "line 5: 3 cells, not 2"),
        ("month,people,same\n1950-01,5,2\n1950-02,6,2\n1950-03,7,2.0\n", "same"),  # never changes
        ("1950-01,5\n1950-02,6\n1950-03,7\n1950-04,8\n", "line 1: 1950-01, 5; 3 more"),  # no header
        ("month,people\n1950-01,5\n1950-02,6\n", "line 1: month, people; 2 more"),
        ("", "line 1: ; 0 more"),
        (MONTHS.encode() + b"1950-04,\xff8\n", "byte 51: 0xff"),
        (MONTHS + '1950-04,"8\n', "unexpected end of data"),
    ],
)
def test_bad_input_is_named_by_its_line(tmp_path, text, found):
    with pytest.raises(UserError) as fault:
        read(tmp_path, text)
    assert fault.value.found == found and "mine.csv" in fault.value.what and fault.value.do


def test_time_is_cut_before_the_first_test_origin():
    _store, rows, _prepare = opened(read_airline().fields["values"], log=True)
    assert rows["train"].tolist() == list(range(109)) and rows["test"].tolist() == list(range(109, 144)) and not len(rows["validation"])


def test_windows_of_a_part_foretell_its_rows_only():
    store, rows, prepare = opened(np.arange(40) ** 2.0, look=5, horizon=3, season=2, origins=4)
    (train, ids), (test, more) = (prepare.view(store, rows[k]) for k in ("train", "test"))
    assert ids.tolist() == list(range(7, 32)) and more.tolist() == list(range(34, 38))  # the test part begins at row 34
    found = train.rows(ids)
    assert found["history"][0, :, 0].tolist() == [i**2 for i in range(7)] and found["truth"][0, :, 0].tolist() == [49, 64, 81]
    assert found["truth"].max() == 33**2  # the last row before the cut
    assert test.rows(more)["history"][0, -1, 0] == 33**2 and test.rows(more)["truth"][-1, -1, 0] == 39**2
    assert test.name(34) == "34"


def test_scale_is_the_seasonal_error_of_all_rows_before_the_origin():
    y = np.random.default_rng(0).uniform(1, 9, (60, 2))
    store, rows, prepare = opened(y, look=4, horizon=3, season=6, origins=8)
    windows, ids = prepare.view(store, rows["test"])
    for t, scale in zip(ids, windows.rows(ids)["scale"].numpy(), strict=True):
        np.testing.assert_allclose(scale, np.abs(y[6:t] - y[: t - 6]).mean(0))


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("season, horizon, look", [(12, 12, 12), (4, 10, 3), (1, 5, 2), (7, 3, 9)])
def test_undoing_the_preparation_gives_the_truth(log, season, horizon, look):
    y = np.exp(np.random.default_rng(1).normal(size=(90, 2)).cumsum(0) / 5)
    store, rows, prepare = opened(y, log=log, season=season, horizon=horizon, look=look, origins=9)
    chunk = Part("test", *prepare.view(store, rows["test"]), prepare).take(np.arange(9))
    assert chunk.data["past"].shape == (9, look, 2) and chunk.data["past"].dtype == chunk.data["future"].dtype == torch.float32
    torch.testing.assert_close(prepare.undo(chunk.data["future"], chunk), chunk.data["truth"], rtol=1e-5, atol=1e-5)


def test_what_is_prepared_by_hand():
    """Season 1, plain differences 1, 2, 4, 1, … of the training rows: z = (difference − mean) / std; the future counts from the last."""
    y = np.cumsum([0, 1, 2, 4, 1, 2, 4, 1, 2, 4, 8, 16.0])
    store, rows, prepare = opened(y, look=2, horizon=2, season=1, origins=1)
    trained = np.diff(y[:10])
    assert prepare.mean == pytest.approx([trained.mean()]) and prepare.std == pytest.approx([trained.std(ddof=1)])
    data = Part("test", *prepare.view(store, rows["test"]), prepare).take(np.array([0])).data
    assert data["past"].flatten().tolist() == pytest.approx(((np.array([2, 4]) - trained.mean()) / trained.std(ddof=1)).tolist())
    assert data["future"].flatten().tolist() == pytest.approx(((np.array([8, 16]) - 4) / trained.std(ddof=1)).tolist())


def test_a_persons_own_series_is_read_as_the_windows_are(tmp_path):
    y = np.random.default_rng(2).uniform(5, 9, (60, 1))
    store, rows, prepare = opened(y, look=4, horizon=3, season=6, origins=8)
    path = tmp_path / "own.csv"
    path.write_text("t,x\n" + "".join(f"{i},{v!r}\n" for i, v in enumerate(y[:52, 0].tolist())))
    windows, ids = prepare.view(store, rows["test"])
    wanted = windows.rows(ids[ids == 52])["history"]
    for given in (path, str(path), y[:52], y[:52, 0].tolist()):
        assert torch.equal(prepare.gather([prepare.encode(given)])["history"], wanted)
    with pytest.raises(UserError, match="needs 12 rows of 1 numbers") as fault:
        prepare.encode(y[:11])
    assert fault.value.found == "11 rows of 1"
    with pytest.raises(UserError, match="cannot be read"):
        prepare.encode("nowhere.csv")


def test_other_data_has_to_hold_a_window_of_the_same_columns():
    _store, _rows, prepare = opened(np.arange(90.0) ** 2, look=4, horizon=3, season=6, origins=8)
    for other, found in ((np.arange(14.0), "14 rows of 1"), (np.ones((90, 2)), "90 rows of 2")):
        store, _rows, _other = opened(np.arange(90.0) ** 2, look=4, horizon=3, season=6, origins=8)
        store.fields["values"] = torch.from_numpy(other.reshape(len(other), -1))
        with pytest.raises(UserError, match="needs 15 rows of 1 numbers") as fault:
            prepare.view(store, np.arange(len(other)))
        assert fault.value.found == found


def test_a_series_too_short_says_by_how_much():
    with pytest.raises(UserError, match="too short") as fault:
        opened(np.arange(70.0), log=True)
    assert fault.value.found == "70 rows" and fault.value.do.startswith("2 more are needed")
    opened(np.arange(1, 73.0) ** 2)


def test_a_logarithm_needs_numbers_above_zero_and_a_series_something_to_learn():
    y = np.random.default_rng(3).uniform(1, 2, 90)
    y[80] = -0.5
    with pytest.raises(UserError, match="above zero") as fault:
        opened(y, log=True)
    assert fault.value.found == "80: -0.5"
    with pytest.raises(UserError, match="only repeats itself"):
        opened(np.tile(np.arange(12.0), 8))
