"""Parts that never share content, folds that cover everything once, orders that a resume can find its place in."""

import hashlib

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from cloche import rng
from cloche.data.chunk import ByTokens, Lanes, Part, Shuffled
from cloche.data.read.examples import NONE, TEST, TRAIN, VALIDATION
from cloche.data.split import check_classes, split, twins
from cloche.data.table import on_grid
from cloche.errors import UserError

PARTS = ("train", "validation", "test")


def digests(contents):
    """(n, 16) of any contents: equal ones share it."""
    rows = [np.frombuffer(hashlib.blake2b(repr(c).encode(), digest_size=16).digest(), np.uint8) for c in contents]
    return np.stack(rows)


def parted(contents, label, given_parts=None, validation=0.1, test=0.2, fold=0, in_order=False):
    n = len(label)
    return split(
        digests(contents),
        np.asarray(label),
        np.zeros(n, np.uint8) if given_parts is None else np.uint8(given_parts),
        validation,
        test,
        fold,
        in_order,
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

    n, lengths, running = 1000, None, False
    fields = {"columns": torch.arange(1000)}

    def to(self, device):
        return self

    def rows(self, ids):
        return {"columns": torch.from_numpy(np.asarray(ids))}

    def name(self, i):
        return str(i)

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
    seen = [(c.ids[c.weight > 0].tolist(), c.train) for _i, c in Part("test", Plain(), own, Plain(), fill=fill).once(batch)]
    assert [i for ids, _train in seen for i in ids] == own.tolist()
    assert not any(train for _ids, train in seen)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=120),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 50),
)
@example(lengths=[1] * 50 + [200], batch=4, seed=0, epoch=0)
@example(lengths=[8] * 5, batch=1, seed=0, epoch=3)
@example(lengths=[8] * 9, batch=4, seed=0, epoch=3)
@example(lengths=[3], batch=8, seed=0, epoch=0)
def test_by_tokens_every_row_once_and_no_step_above_its_budget(lengths, batch, seed, epoch):
    order = ByTokens(np.array(lengths), batch, seed)
    cost = np.array([on_grid(n) for n in lengths])
    steps = [order.ids(epoch, i) for i in range(order.steps(epoch))]
    assert sorted(np.concatenate([ids for ids, _first in steps]).tolist()) == list(range(len(lengths)))
    assert order.steps(epoch) == order.steps(0) == order.steps(epoch + 1)
    places = sorted((first, len(ids)) for ids, first in steps)  # positions of an epoch: no gap, none twice
    assert [first for first, _n in places] == np.cumsum([0, *(n for _first, n in places)])[:-1].tolist()
    for ids, first in steps:
        assert len(ids) > 1 or len(lengths) == 1
        fewest = 2 + (len(ids) == 3 and first + 3 == len(lengths))  # the longest row would stand alone: it joins the two before it
        assert cost[ids].max() * len(ids) <= batch * cost.mean() or len(ids) <= fewest


def test_by_tokens_keeps_like_lengths_together_and_is_pure():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    order = ByTokens(lengths, 16, 7)
    steps = {(e, i): order.ids(e, i) for e in range(3) for i in range(order.steps(e))}
    for (e, i), (ids, first) in reversed(steps.items()):  # in any order, from the same or a fresh object
        for again in (order.ids(e, i), ByTokens(lengths, 16, 7).ids(e, i)):
            np.testing.assert_array_equal(again[0], ids)
            assert again[1] == first
    padded = sum(on_grid(int(lengths[ids].max())) * len(ids) for ids, _first in steps.values()) / 3
    assert padded < 1.05 * sum(on_grid(int(n)) for n in lengths)  # hardly any filler
    assert padded < 0.65 * 500 * on_grid(int(lengths.max()))
    whole = [np.concatenate([steps[e, i][0] for i in range(order.steps(e))]) for e in range(3)]
    whole.append(np.concatenate([ByTokens(lengths, 16, 8).ids(0, i)[0] for i in range(order.steps(0))]))
    means = np.array([[lengths[order.ids(e, i)[0]].mean() for i in range(order.steps(e))] for e in range(40)])
    follows = [np.corrcoef(m, np.arange(len(m)))[0, 1] for m in means]
    assert abs(np.mean(follows)) < 0.1  # the steps are shuffled: not short ones first
    for a in range(4):
        for b in range(a):
            assert np.count_nonzero(whole[a] == whole[b]) < 25
    first, second = ({frozenset(steps[e, i][0].tolist()) for i in range(order.steps(e))} for e in (0, 1))
    assert len(first & second) < 5  # other rows meet in a step


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), batch=st.integers(1, 40))
@example(n=10, batch=4)
@example(n=9, batch=8)
def test_lanes_read_on_where_they_were_and_end_in_fillers(n, batch):
    order = Lanes(n, batch)
    steps = [order.ids(3, i) for i in range(order.steps(3))]
    each = -(-n // min(batch, n))
    count = -(-n // each)  # lanes: none without a row
    assert len({len(ids) for ids, _first in steps}) == 1 and len(steps[0][0]) == count <= batch  # one shape
    lanes = np.stack([ids for ids, _first in steps], 1)  # (lanes, steps)
    assert sorted(lanes[lanes >= 0].tolist()) == list(range(n))
    for lane in lanes:
        real = lane[lane >= 0]
        assert (lane[: len(real)] == real).all() and (np.diff(real) == 1).all()
    assert (lanes[:, 0] >= 0).all() and order.steps(0) == order.steps(3) == each
    assert [first for _ids, first in steps] == [i * count for i in range(len(steps))]
    np.testing.assert_array_equal(order.ids(0, 0)[0], order.ids(3, 0)[0])  # every epoch alike


def test_lanes_by_hand():
    """Ten rows in four lanes of three: the last lane holds one row and waits."""
    assert [Lanes(10, 4).ids(0, i)[0].tolist() for i in range(3)] == [[0, 3, 6, 9], [1, 4, 7, -1], [2, 5, 8, -1]]


def assert_lanes(chunks, own):
    """Every row once, each lane in order and without a gap, what has ended marked as a filler; returns the number of lanes."""
    real = [c.weight > 0 for c in chunks]
    assert sorted(i for c, r in zip(chunks, real, strict=True) for i in c.ids[r].tolist()) == sorted(own.tolist())
    assert [c.fillers for c in chunks] == [bool((~r).any()) for r in real]
    (lanes,) = {len(c.ids) for c in chunks}
    assert torch.cat([c.at for c in chunks]).tolist() == list(range(len(chunks) * lanes))
    where = {row: i for i, row in enumerate(own.tolist())}
    for before, after, goes_on in zip(chunks, chunks[1:], real[1:], strict=False):
        assert not (goes_on & (before.weight == 0)).any()  # what has ended does not begin again
        follows = [where[b] - where[a] for a, b in zip(before.ids[goes_on].tolist(), after.ids[goes_on].tolist(), strict=True)]
        assert follows == [1] * len(follows)
    return lanes


@pytest.mark.parametrize("n, batch", [(10, 4), (100, 8), (200, 8), (333, 7), (5, 1), (7, 7), (3, 50), (1, 3)])
def test_a_carried_part_is_read_in_lanes_once(n, batch):
    """Evaluation with a state: in lanes too, which are long, so that their cold starts count little."""
    own = np.random.default_rng(n).permutation(1000)[:n]
    part = Part("test", Plain(), own, Plain(), carried=True)
    chunks = [c for _i, c in part.once(batch)]
    assert not any(c.train for c in chunks)
    assert assert_lanes(chunks, own) <= min(batch, max(1, n // 16))


@pytest.mark.parametrize("n, batch", [(10, 4), (9, 8), (12, 4), (5, 1), (7, 7), (3, 50)])
def test_the_steps_of_a_carried_part_are_lanes(n, batch):
    own = np.random.default_rng(n).permutation(1000)[:n]
    part = Part("train", Plain(), own, Plain(), carried=True)
    order = part.order(batch, 0)
    assert isinstance(order, Lanes)
    steps = [part.step(order, 2, k, 1, batch, rng.draw(0, 2)) for k in range(order.steps(2))]
    assert all(len(chunks) == 1 and chunks[0].train for chunks in steps)
    assert assert_lanes([chunks[0] for chunks in steps], own) == -(-n // -(-n // min(batch, n)))


def test_the_order_of_a_part_follows_its_rows():
    class Uneven(Plain):
        lengths = np.arange(1000)

    own = np.array([3, 900, 40])
    assert isinstance(Part("train", Plain(), own, Plain()).order(2, 0), Shuffled)
    order = Part("train", Uneven(), own, Plain()).order(2, 0)
    assert isinstance(order, ByTokens) and order.cost.tolist() == [on_grid(n) for n in own]  # of the part's rows, not of the first ones
    assert isinstance(Part("train", Uneven(), own, Plain(), carried=True).order(2, 0), Lanes)


def test_the_head_of_a_chunk_is_its_first_rows():
    part = Part("train", Plain(), np.arange(100, 110), Plain())
    (whole,) = part.step(Shuffled(10, 10, 0), 0, 0, 1, 10, rng.draw(0, 0))
    head = whole.head(3)
    assert head.ids.tolist() == whole.ids[:3].tolist() and head.at.tolist() == [0, 1, 2] and head.weight.tolist() == [1, 1, 1]
    assert {k: t.tolist() for k, t in head.data.items()} == {k: t[:3].tolist() for k, t in whole.data.items()}
    assert torch.equal(head.draw, whole.draw) and head.train and len(whole.ids) == 10
    assert len(whole.head(99).ids) == 10


# ---- parts in order


@pytest.mark.parametrize(
    "n, validation, test, wanted", [(100, 0.1, 0.2, (70, 10, 20)), (10, 0.0, 0.25, (8, 0, 2)), (7, 0.3, 0.0, (5, 2, 0))]
)
def test_running_text_and_time_are_cut_as_they_stand(n, validation, test, wanted):
    """The test part last, the validation part before it; twins and classes do not matter."""
    rows = parted([i % 3 for i in range(n)], np.arange(n) % 2, validation=validation, test=test, in_order=True)
    assert_cover(rows, n)
    assert tuple(len(rows[p]) for p in PARTS) == wanted
    assert np.concatenate([rows[p] for p in PARTS]).tolist() == list(range(n))


@pytest.mark.parametrize("named", [[TRAIN] * 50 + [TEST] * 50, [TEST] * 50 + [NONE] * 50])
def test_official_parts_are_kept_in_order_too(named):
    """A share of the rest, not of the whole, is the validation part: the end of it."""
    rows = parted(range(100), np.zeros(100, int), named, validation=0.2, in_order=True)
    assert_cover(rows, 100)
    assert rows["test"].tolist() == np.flatnonzero(np.array(named) == TEST).tolist()
    assert tuple(len(rows[p]) for p in PARTS) == (40, 10, 50)
    assert rows["validation"].min() > rows["train"].max()
    named = np.array([TRAIN] * 6 + [VALIDATION] * 2 + [TEST] * 2)
    rows = parted(range(10), np.zeros(10, int), named, in_order=True)
    assert [rows[p].tolist() for p in PARTS] == [[*range(6)], [6, 7], [8, 9]]


def test_folds_of_what_is_cut_in_order_are_refused():
    with pytest.raises(UserError, match="cut in order, so there are no folds(.|\n)*data.fold = 1"):
        parted(range(20), np.zeros(20, int), fold=1, in_order=True)
    with pytest.raises(UserError, match="nothing is left to train on"):
        parted(range(20), np.zeros(20, int), validation=0.5, test=0.5, in_order=True)
