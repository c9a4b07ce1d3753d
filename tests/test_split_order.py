"""Parts that never share content, folds that cover everything once, orders that a resume can find its place in."""

import hashlib

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from cloche import rng
from cloche.data.chunk import Part
from cloche.data.order import Shuffled
from cloche.data.read.examples import NONE, TEST, TRAIN, VALIDATION
from cloche.data.split import check_classes, split, twins
from cloche.errors import UserError

PARTS = ("train", "validation", "test")


def digests(contents):
    """(n, 16) of any contents: equal ones share it."""
    rows = [np.frombuffer(hashlib.blake2b(repr(c).encode(), digest_size=16).digest(), np.uint8) for c in contents]
    return np.stack(rows)


def parted(contents, label, given_parts=None, validation=0.1, test=0.2, fold=0):
    n = len(label)
    return split(
        digests(contents),
        np.asarray(label),
        np.zeros(n, np.uint8) if given_parts is None else np.uint8(given_parts),
        validation,
        test,
        fold,
    )


def assert_cover(rows, n):
    assert set(rows) == set(PARTS)
    assert sorted(np.concatenate([rows[p] for p in PARTS]).tolist()) == list(range(n))  # each row once
    assert all((np.diff(rows[p]) > 0).all() for p in PARTS)


def part_of(rows, n):
    out = np.empty(n, object)
    for name in PARTS:
        out[rows[name]] = name
    return out


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, salt=st.integers(0, 1000), shuffle=st.randoms(use_true_random=False))
def test_seventy_ten_twenty_within_each_class_whatever_the_classes(sizes, salt, shuffle):
    label = [c for c, size in enumerate(sizes) for _ in range(size)]
    shuffle.shuffle(label)
    n, rows = len(label), parted([(salt, i) for i in range(len(label))], label)
    assert_cover(rows, n)
    for c, size in enumerate(sizes):
        counts = [np.count_nonzero(np.array(label)[rows[p]] == c) for p in PARTS]
        if size == 1:
            assert counts == [1, 0, 0]
        assert np.abs(np.array(counts) - size * np.array([0.7, 0.1, 0.2])).max() <= 1
        assert counts[0] >= 1  # no class that training never sees
    check_classes(np.array(label), [str(c) for c in range(len(sizes))], rows)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, copies=st.lists(st.integers(1, 5), min_size=1, max_size=20), shuffle=st.randoms(use_true_random=False))
def test_twins_never_part_and_rows_in_another_order_change_nothing(sizes, copies, shuffle):
    rows_of = [(c, i) for c, size in enumerate(sizes) for i in range(size)]
    contents = [row for k, row in enumerate(rows_of) for _ in range(copies[k % len(copies)])]
    label, n = [c for c, _i in contents], len(contents)
    if len(set(contents)) < 2:
        return
    rows = parted(contents, label)
    assert_cover(rows, n)
    where = part_of(rows, n)
    for content in set(contents):
        assert len({where[i] for i in range(n) if contents[i] == content}) == 1
    assert twins(digests(contents), rows) == 0
    order = list(range(n))
    shuffle.shuffle(order)
    again = part_of(parted([contents[i] for i in order], [label[i] for i in order]), n)
    assert again.tolist() == where[order].tolist()


def test_twins_with_different_labels_stay_together_in_any_row_order():
    """Two people named the same picture differently: still one part, and the same one from whichever folder it is read first."""
    contents = [f"picture {i}" for i in range(40)] + [f"picture {i}" for i in range(8)]
    label = np.array([0] * 20 + [1] * 20 + [1] * 8)
    where = part_of(parted(contents, label), 48)
    assert where[:8].tolist() == where[40:].tolist()
    order = np.arange(48)[::-1]
    again = part_of(parted([contents[i] for i in order], label[order]), 48)
    assert again.tolist() == where[order].tolist()


@pytest.mark.parametrize("copies", [(10,), (1, 9), (9, 1), (5, 5), (1, 1, 8), (8, 1, 1)])
def test_a_class_of_few_pictures_in_many_copies_is_still_trained_on(copies):
    for salt in range(20):  # any ranking of the contents
        contents = [("many", salt, i) for i, n in enumerate(copies) for _ in range(n)] + [("other", i) for i in range(30)]
        label = np.array([0] * sum(copies) + [1] * 30)
        check_classes(label, ["few", "other"], parted(contents, label))


@pytest.mark.parametrize("k", [2, 3, 5, 7, 10, 49])
def test_folds_cover_every_row_exactly_once_as_test(k):
    label = np.random.default_rng(k).integers(0, 3, 157)
    contents = [i // 2 for i in range(157)]  # twins too, some with two labels
    tested = np.zeros(157, int)
    for fold in range(k):
        rows = parted(contents, label, validation=0.1, test=1 / k, fold=fold)
        assert_cover(rows, 157)
        assert twins(digests(contents), rows) == 0
        tested[rows["test"]] += 1
    assert (tested == 1).all()


def test_folds_rotate_the_same_ranking_and_keep_the_shares():
    label = np.repeat([0, 1], [100, 40])
    seen = [parted(range(140), label, fold=fold) for fold in range(5)]
    for rows in seen:
        assert [np.count_nonzero(label[rows[p]] == c) for c in (0, 1) for p in PARTS] == [70, 10, 20, 28, 4, 8]
    for fold in range(5):  # the validation part of a fold is the beginning of the next fold's test part
        assert set(seen[fold]["validation"]) <= set(seen[(fold + 1) % 5]["test"])
    assert len({tuple(rows["test"]) for rows in seen}) == 5


def test_a_fold_beyond_the_last_is_refused():
    """test = 0.2 has folds 0 … 4: nobody may cross-validate over an empty sixth."""
    assert len(parted(range(100), np.zeros(100, int), fold=4)["test"]) == 20
    with pytest.raises(UserError, match="fold = 5"):
        parted(range(100), np.zeros(100, int), fold=5)


@pytest.mark.parametrize("named", [(TRAIN, TEST), (TRAIN, VALIDATION, TEST), (TRAIN, VALIDATION), (NONE, TEST)])
def test_official_parts_are_kept(named):
    given_parts = np.resize(named, 120)
    label = np.random.default_rng(0).integers(0, 2, 120)
    rows = parted(range(120), label, given_parts)
    assert_cover(rows, 120)
    assert rows["test"].tolist() == np.flatnonzero(given_parts == TEST).tolist()
    if VALIDATION in named:
        assert rows["validation"].tolist() == np.flatnonzero(given_parts == VALIDATION).tolist()
    else:  # a share of the training part, within each class
        free = np.flatnonzero(given_parts != TEST)
        assert set(rows["validation"]) <= set(free)
        for c in (0, 1):
            assert abs(np.count_nonzero(label[rows["validation"]] == c) - 0.1 * np.count_nonzero(label[free] == c)) <= 1
    assert len(parted(range(120), label, given_parts, validation=0.0)["validation"]) == (
        0 if VALIDATION not in named else np.count_nonzero(given_parts == VALIDATION)
    )


def test_twins_across_official_parts_are_counted():
    contents = [*range(10), 3, 3, 99]
    rows = parted(contents, np.zeros(13, int), [TRAIN] * 10 + [TEST] * 3)
    assert twins(digests(contents), rows) == 2


def test_a_fold_of_data_with_its_own_test_part_is_refused():
    with pytest.raises(UserError, match="no folds to rotate(.|\n)*data.fold = 3"):
        parted(range(20), np.zeros(20, int), [TRAIN] * 15 + [TEST] * 5, fold=3)


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match="nothing is left to train on(.|\n)*40 examples"):
        parted(range(40), np.zeros(40, int), validation=0.6, test=0.5)


def test_a_class_that_training_never_sees_is_named():
    label = np.array([0, 0, 1, 2, 2])
    rows = {"train": np.array([0, 3]), "validation": np.array([1]), "test": np.array([2, 4])}
    with pytest.raises(UserError, match="training part has no example of maize"):
        check_classes(label, ["beans", "maize", "rice"], rows)


@pytest.mark.parametrize(
    "label", [np.linspace(-1, 1, 100, dtype=np.float32)[:, None], np.eye(4, dtype=np.float32)[np.arange(100) % 4]], ids=["number", "labels"]
)
def test_numbers_and_sets_of_labels_are_parted_too(label):
    rows = parted(range(100), label)
    assert_cover(rows, 100)
    strata = np.zeros(100, int) if label.shape[1] == 1 else label.argmax(1)
    for c in np.unique(strata):
        size = np.count_nonzero(strata == c)
        counts = [np.count_nonzero(strata[rows[p]] == c) for p in PARTS]
        assert np.abs(np.array(counts) - size * np.array([0.7, 0.1, 0.2])).max() <= 1


def test_the_ranking_does_not_follow_the_order_of_the_rows():
    rows = parted(range(1000), np.zeros(1000, int))
    assert abs(rows["test"].mean() - 499.5) < 60  # a cut of the first fifth would give 99.5


# ---- orders


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), batch=st.integers(1, 70), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
@example(n=65, batch=64, seed=0, epoch=0)
@example(n=129, batch=64, seed=0, epoch=1)
@example(n=1, batch=64, seed=0, epoch=0)
@example(n=5, batch=1, seed=0, epoch=0)
def test_every_row_once_an_epoch_and_a_last_single_row_is_merged(n, batch, seed, epoch):
    order = Shuffled(n, batch, seed)
    steps = [order.ids(epoch, i) for i in range(order.steps(epoch))]
    ids = np.concatenate([ids for ids, _first in steps])
    assert sorted(ids.tolist()) == list(range(n))
    assert [first for _ids, first in steps] == [i * batch for i in range(len(steps))]  # positions are counted on
    sizes, rest = [len(ids) for ids, _first in steps], n % batch
    assert sizes[:-1] == [batch] * (len(sizes) - 1)
    assert sizes[-1] == (n if n < batch else batch + 1 if rest == 1 else rest or batch)


def test_orders_are_pure_and_differ_between_epochs_and_seeds():
    order = Shuffled(200, 30, 7)
    assert order.steps(0) == 7  # 6 · 30 and the last 20
    forwards = {(e, i): order.ids(e, i)[0] for e in range(3) for i in range(7)}
    for (e, i), ids in reversed(forwards.items()):  # in any order, from the same or a fresh object
        np.testing.assert_array_equal(order.ids(e, i)[0], ids)
        np.testing.assert_array_equal(Shuffled(200, 30, 7).ids(e, i)[0], ids)
    whole = [np.concatenate([forwards[e, i] for i in range(7)]) for e in range(3)] + [Shuffled(200, 200, 8).ids(0, 0)[0]]
    for a in range(4):
        assert np.abs(np.corrcoef(whole[a], np.arange(200))[0, 1]) < 0.25
        for b in range(a):
            assert np.abs(np.corrcoef(whole[a], whole[b])[0, 1]) < 0.25
            assert np.count_nonzero(whole[a] == whole[b]) < 10
    np.testing.assert_array_equal(np.concatenate([Shuffled(200, 45, 7).ids(0, i)[0] for i in range(5)]), whole[0])  # the batch only cuts


class Plain:
    """A store whose rows are their own numbers, and a preparation that does nothing."""

    n = 1000

    def rows(self, ids):
        return {"columns": torch.from_numpy(np.asarray(ids))}

    def device(self, chunk):
        return chunk


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 90), batch=st.integers(2, 40), chunks=st.integers(1, 6), fill=st.booleans())
def test_a_step_in_chunks_sees_the_rows_and_positions_of_the_whole_step(n, batch, chunks, fill):
    own = np.random.default_rng(n).permutation(1000)[:n]
    part, order = Part("train", Plain(), own, Plain(), fill=fill), Shuffled(n, batch, 3)
    for index in range(order.steps(1)):
        ids, first = order.ids(1, index)
        got = part.step(order, 1, index, chunks, batch, rng.draw(3, 1))
        real = [chunk.weight > 0 for chunk in got]
        assert np.concatenate([c.ids[r] for c, r in zip(got, real, strict=True)]).tolist() == own[ids].tolist()
        assert np.concatenate([c.at[r] for c, r in zip(got, real, strict=True)]).tolist() == list(range(first, first + len(ids)))
        assert len(got) <= chunks and all(c.train for c in got)
        assert all(c.fillers == bool((~r).any()) for c, r in zip(got, real, strict=True))
        if batch > chunks:  # else a chunk is one row by the person's own choice
            assert all(r.sum() > 1 for r in real) or len(ids) == 1
        if not fill:
            assert all(r.all() for r in real)
        elif len(ids) <= batch:
            assert len({len(c.ids) for c in got}) <= 2  # one shape, and the one row longer of a merged chunk


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 100, 256])
def test_evaluation_reads_every_row_of_a_part_once_in_its_own_order(batch, fill):
    own = np.arange(100)[::-1] * 3
    seen = [(c.ids[c.weight > 0].tolist(), c.train) for c in Part("test", Plain(), own, Plain(), fill=fill).once(batch)]
    assert [i for ids, _train in seen for i in ids] == own.tolist()
    assert not any(train for _ids, train in seen)
