"""The task translate: sums that do not depend on how rows are cut, figures equal to sacrebleu's and to counting by hand."""

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F

from cloche.data.chunk import Part
from cloche.data.pairs import PAD, PairsConfig, PairsPrepare, examples
from cloche.data.store import Store
from cloche.nets.transformer import TransformerConfig
from cloche.tasks.translate import TranslateConfig

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["one two", "two", "three one one", "two three", "one", "three three three", "two one", "one three"]
TARGETS = ["a b", "b", "c a a", "b c", "a", "c c c", "b a", "a c"]


@pytest.fixture(scope="module")
def made():
    store = Store(examples([(a.encode(), b.encode()) for a, b in zip(WORDS, TARGETS, strict=True)], WORDS))
    rows = {"train": np.arange(8)}
    prepare = PairsPrepare.fit(store, rows, PairsConfig(source="x.tsv", tokens="characters"))
    view, ids = prepare.view(store, rows["train"])
    part = Part("train", view, ids, prepare)
    task = TranslateConfig().build(prepare, {})
    torch.manual_seed(0)
    nets = {"net": TransformerConfig(width=32, layers=1, heads=4, dropout=0.0).build(*task.ports["net"], task.face)}
    return task, part, nets


def added(sums: list[dict]) -> dict:
    return {k: sum(s[k] for s in sums) for k in sums[0]}


@torch.inference_mode()
def test_the_loss_is_the_sum_over_real_tokens_however_the_rows_are_cut(made):
    task, part, nets = made
    chunk = part.take(np.arange(8))
    source, length, target = (chunk.data[k] for k in ("source", "source_len", "target"))
    logits, wanted = nets["net"](source, length, target[:, :-1]), target[:, 1:]
    real = wanted != PAD
    by_hand = F.cross_entropy(logits[real], wanted[real], reduction="sum")
    torch.testing.assert_close(task.loss(nets, chunk, None)[0], by_hand)
    assert task.count(chunk) == real.sum() == sum(len(t) + 1 for t in TARGETS)
    for batch in (1, 3, 5):
        chunks = [c for _i, c in part.once(batch)]
        torch.testing.assert_close(sum(task.loss(nets, c, None)[0] for c in chunks), by_hand)
        sums = added([task.measure(nets, c, None)[0] for c in chunks])
        assert task.figures(sums)["loss"].value == pytest.approx(float(by_hand / real.sum()), rel=1e-6)
    rows = task.measure(nets, chunk, None)[2]["loss"]
    torch.testing.assert_close((rows * (chunk.data["target_len"] - 1)).sum(), by_hand)


@torch.inference_mode()
def test_smoothing_is_torchs_and_only_in_training(made):
    _task, part, nets = made
    task, chunk = TranslateConfig(smoothing=0.2).build(made[0].prepare, {}), part.take(np.arange(8))
    target = chunk.data["target"]
    logits = nets["net"](chunk.data["source"], chunk.data["source_len"], target[:, :-1])
    even = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, reduction="sum")
    real = (target[:, 1:] != PAD)[..., None]
    wanted = 0.8 * even - 0.2 * (logits.log_softmax(-1).mean(-1, keepdim=True) * real).sum()
    torch.testing.assert_close(task.loss(nets, chunk, None)[0], wanted)
    torch.testing.assert_close(task.measure(nets, chunk, None)[0]["loss"], even.double())


@torch.inference_mode()
def test_a_filler_changes_nothing(made):
    task, part, nets = made
    plain = part.take(np.arange(3))
    filled = Part("train", part.store, part.ids[:3], part.prepare, fill=True)
    chunk = next(filled.once(8))[1]
    assert len(chunk.ids) == 8 and chunk.weight.sum() == 3
    torch.testing.assert_close(task.loss(nets, chunk, None)[0], task.loss(nets, plain, None)[0])
    assert task.count(chunk) == task.count(plain)
    a, b = (task.score(task.answer(nets, c), c, nets) | task.measure(nets, c, None)[0] for c in (chunk, plain))
    for k in b:
        torch.testing.assert_close(a[k], b[k])


def test_exact_matches_and_bleu_add_up_over_chunks_and_equal_sacrebleu(made):
    task, part, nets = made
    said = ["a b", "b.", "c a", "c b", "", "c c c", "b a a b", "a c"]
    whole = [
        "the cat sat on the mat",
        "a dog, and two birds",
        "it is so, is it not?",
        "on the mat sat it",
        "x",
        "nothing at all here",
        "y",
        "z z z z",
    ]
    for answers in (said, whole):
        sums = []
        for _i, chunk in part.once(3):
            texts = [{"text": answers[i]} for i in chunk.ids.tolist()]
            sums.append(task.score(texts, chunk, nets))
        found = task.figures(added(sums) | {"loss": torch.tensor(1.0), "n": torch.tensor(2.0)})
        assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, [TARGETS]).score, rel=1e-12)
        right = sum(map(str.__eq__, answers, TARGETS))
        assert (found["exact"].value, found["exact"].n) == (right / 8, 8)
    truth = [{"text": t} for t in TARGETS]
    chunk = part.take(np.arange(8))
    assert task.truth(chunk) == TARGETS
    perfect = task.figures(task.score(truth, chunk, nets) | {"loss": torch.tensor(1.0), "n": torch.tensor(2.0)})
    assert perfect["exact"].value == 1


def test_bleu_of_sentences_equals_sacrebleus_where_it_is_neither_0_nor_100():
    true = ["the cat sat on the mat .", "there are two dogs in the big garden", "I can't see it, can you?"]
    said = ["the cat sat on a mat .", "there are two cats in the big garden", "I can not see it, can you?"]
    store = Store(examples([(b"x", t.encode()) for t in true], true))
    prepare = PairsPrepare.fit(store, {"train": np.arange(3)}, PairsConfig(source="x.tsv", tokens="characters"))
    task, part = TranslateConfig().build(prepare, {}), Part("test", *prepare.view(store, np.arange(3)), prepare)
    sums = added([task.score([{"text": said[i]} for i in c.ids.tolist()], c, {}) for _i, c in part.once(2)])
    found = task.figures(sums | {"loss": torch.tensor(1.0), "n": torch.tensor(2.0)})["bleu"].value
    assert found == pytest.approx(sacrebleu.corpus_bleu(said, [true]).score, rel=1e-12) and 30 < found < 90


def test_an_answer_never_equals_a_target_with_a_token_that_the_training_part_lacks(made):
    task = made[0]
    store = Store(examples([(b"one", "a\u0436".encode())], ["new"]))
    part = Part("test", *task.prepare.view(store, np.arange(1)), task.prepare)
    chunk = part.take(np.arange(1))
    assert task.truth(chunk) == ["a\ufffd"]
    assert task.score([{"text": "a"}], chunk, {})["exact"].tolist() == [0, 1]


def test_the_baselines_copy_the_source_and_say_the_commonest_target(made):
    prepare = made[0].prepare
    pairs = [("a", "a"), ("one", "b"), ("two", "b"), ("b", "b"), ("one", "c")]
    store = Store(examples([(a.encode(), b.encode()) for a, b in pairs], [str(i) for i in range(5)]))
    train, test = (Part("x", *prepare.view(store, ids), prepare) for ids in (np.arange(5), np.array([0, 1, 4])))
    task = TranslateConfig().build(prepare, {})
    known = task.known(train)
    assert known == {"text": "b"}
    found = task.baselines(known, test, None)
    assert {name: (f.value, f.n) for name, f in found.items()} == {"copying the source": (1 / 3, 3), 'always answering "b"': (1 / 3, 3)}


@pytest.mark.parametrize("beam", [1, 3])
def test_eight_pairs_are_learned_by_heart_and_written_out(made, beam):
    prepare, part = made[0].prepare, made[1]
    task = TranslateConfig(beam=beam).build(prepare, {})
    torch.manual_seed(0)
    net = TransformerConfig(width=32, layers=1, heads=4, dropout=0.0).build(*task.ports["net"], task.face)
    optimizer, chunk = torch.optim.Adam(net.parameters(), 5e-3), part.take(np.arange(8))
    for _step in range(60):
        optimizer.zero_grad()
        (task.loss({"net": net}, chunk, None)[0] / task.count(chunk)).backward()
        optimizer.step()
    net.eval()
    assert [a["text"] for a in task.answer({"net": net}, chunk)] == TARGETS
    given = prepare.device(part.take(np.arange(1)))  # what predict has: no target
    alone = {k: v for k, v in given.data.items() if k.startswith("source")}
    assert task.answer({"net": net}, type(given)(alone, given.ids, given.at, given.weight, given.draw, False)) == [{"text": "a b"}]
