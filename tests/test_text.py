"""Text as tokens: lossless pieces, the bytes of each, windows in which every token of a part is foretold once; and text that is no good."""

import json

import numpy as np
import pytest
import torch

from cloche.data.chunk import Part
from cloche.data.read.examples import Examples
from cloche.data.store import Store
from cloche.data.text import TextConfig, TextPrepare, examples, open_tokenizer, read_pydocs, read_text, train_tokenizer
from cloche.errors import UserError

KINDS = ("bpe", "words", "characters")
MIXED = "The cat's 12 hats:\n\n   def über(x): # हिन्दी  \n\treturn “x”\n\n"
PARAGRAPHS = [f"Paragraph {n} of the text, in which the number {n * n} stands, über {n} हाथी.\n\n" for n in range(40)]


def store(texts: list[str]) -> Store:
    return Store(examples({"text": "".join(texts)}, "text"))


def prepared(kind: str, window: int = 16, vocabulary: int = 300) -> tuple[Store, dict, TextPrepare]:
    config, s = TextConfig(source="text", tokens=kind, vocabulary=vocabulary, window=window), store(PARAGRAPHS)
    rows = config.parts(s)
    return s, rows, TextPrepare.fit(s, rows, config)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_again_and_training_is_deterministic(kind):
    trained = train_tokenizer([MIXED] * 2, kind, 400, [])
    assert trained == train_tokenizer([MIXED] * 2, kind, 400, [])
    tokenizer = open_tokenizer(trained)
    assert tokenizer.decode(tokenizer.encode(MIXED).ids) == MIXED
    assert open_tokenizer(trained) is tokenizer


def test_words_are_whole_with_the_blank_before_them_and_the_rest_is_one_unknown_token():
    tokenizer = open_tokenizer(train_tokenizer([MIXED], "words", 400, []))
    wanted = [
        "The",
        " cat",
        "'",
        "s",
        " 12",
        " hats",
        ":",
        "\n\n",
        "  ",
        " def",
        " über",
        "(",
        "x",
        ")",
        ":",
        " #",
        " हिन्दी",
        "  ",
        "\n",
        "\t",
    ]
    assert tokenizer.encode(MIXED).tokens[: len(wanted)] == wanted
    assert tokenizer.encode("The dog's <unk>").tokens == ["The", "<unk>", "'", "s", "<unk>", "<unk>", "<unk>"]
    few = open_tokenizer(train_tokenizer(["b b b a a c"], "words", 3, []))
    assert few.get_vocab() == {"<unk>": 0, " a": 1, " b": 2}  # the commonest, then by their letters


def test_bpe_knows_every_byte_and_merges_what_is_frequent():
    tokenizer = open_tokenizer(train_tokenizer(["low lower lowest"] * 3, "bpe", 260, []))
    assert [tokenizer.id_to_token(n) for n in range(256, 260)] == ["lo", "low", "Ġlow", "Ġlowe"]
    assert tokenizer.decode(tokenizer.encode("日本 \0é").ids) == "日本 \0é"


@pytest.mark.parametrize("kind", KINDS)
def test_specials_come_first_and_no_text_gives_them(kind):
    tokenizer = open_tokenizer(train_tokenizer(["<pl> ab ab"], kind, 400, ["<pad>", "<unk>", "<pl>"]))
    assert [tokenizer.token_to_id(s) for s in ("<pad>", "<unk>", "<pl>")] == [0, 1, 2]
    ids = tokenizer.encode("<pl> ab").ids
    assert 2 not in ids and tokenizer.decode(ids) == "<pl> ab"  # what stands in a person's text is text
    assert tokenizer.decode([2, *tokenizer.encode(" ab").ids], skip_special_tokens=True) == " ab"


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_part_is_foretold_once_and_its_bytes_are_those_of_the_text(kind):
    s, rows, prepare = prepared(kind)
    for name, ids in rows.items():
        view, at = prepare.view(s, ids)
        raw = b"".join(s.fields["text"][int(i)].numpy().tobytes() for i in ids)
        assert view.raw == raw and view.running and len(at) == view.n
        data = Part(name, view, at, prepare).take(at).data
        assert data["tokens"].shape == data["bytes"].shape == (view.n, 17) and data["tokens"].dtype == torch.int64
        told = data["bytes"][:, 1:] > 0
        assert int(data["bytes"][:, 1:].sum()) == len(raw)
        joined = prepare.decode(data["tokens"][:, 1:][told].tolist())
        assert joined == raw or (kind != "bpe" and "\ufffd" in joined.decode())
        assert torch.equal(data["tokens"][1:, 0], data["tokens"][:-1, -1])  # each begins with the last token of the one before
        assert view.name(1) == f"{s.names[int(ids[0])]}, from token 17 after it"


def test_an_unknown_word_keeps_its_bytes():
    _s, _rows, prepare = prepared("words")
    found = prepare.encode("the हाथियों, the")
    assert found["tokens"].tolist()[2] == 0 and found["bytes"].tolist() == [0, 3, 22, 1, 4]
    assert prepare.decode(found["tokens"].tolist()[2:3]).decode() == "\ufffd"


def test_while_training_the_cuts_move_with_the_epoch_and_windows_still_run_on():
    s, rows, prepare = prepared("bpe")
    view, at = prepare.view(s, rows["train"])
    part, seen = Part("train", view, at, prepare), set()
    for epoch in range(20):
        (chunk,) = part.step(part.order(view.n, 0), epoch, 0, 1, view.n, torch.tensor(epoch * 7919))
        tokens = chunk.data["tokens"][chunk.at.argsort()][chunk.ids.argsort()]
        assert torch.equal(tokens[1:, 0], tokens[:-1, -1])
        seen.add(tuple(tokens[0].tolist()))
        assert int(chunk.data["bytes"][:, 1:].sum()) >= len(view.raw) - 8  # but for what the first window now begins with
    assert len(seen) > 10


def test_prompts_of_different_lengths_are_padded_and_begin_as_a_paragraph_does():
    _s, _rows, prepare = prepared("bpe")
    rows = prepare.gather([prepare.encode("Paragraph 3"), prepare.encode("")])
    assert rows["tokens_len"].tolist()[1] == 1 and rows["tokens"].shape == rows["bytes"].shape == (2, 8)
    assert prepare.decode([int(rows["tokens"][1, 0])]) == b"\n\n"
    n = int(rows["tokens_len"][0])
    assert prepare.decode(rows["tokens"][0, 1:n].tolist()) == b"Paragraph 3"
    assert not rows["bytes"][0, n:].any() and int(rows["bytes"][0].sum()) == 11


def test_the_preparation_is_json_and_reads_back():
    _s, _rows, prepare = prepared("words")
    again = TextPrepare.model_validate(json.loads(json.dumps(prepare.model_dump(mode="json"))))
    assert again == prepare and again.pieces == prepare.pieces
    assert (prepare.port.size, prepare.port.shape) == (len(prepare.pieces), (16,))


# --- reading --------------------------------------------------------------------------------------------------------------------


def told(found: Examples) -> list[str]:
    return [found.fields["text"][i].tobytes().decode() for i in range(len(found))]


def test_a_folder_is_read_in_order_and_repeated_paragraphs_are_dropped(tmp_path):
    for name, some in (("b.txt", PARAGRAPHS[20:] + PARAGRAPHS[:2]), ("a.txt", PARAGRAPHS[:20])):
        (tmp_path / name).write_bytes("".join(some).replace("\n", "\r\n").encode())
    found = read_text(tmp_path)
    assert told(found) == PARAGRAPHS and found.notes == {"repeated": 2}
    assert found.names[0] == "a.txt:1" and found.names[20] == "b.txt:1"
    assert len(np.unique(found.digest, axis=0)) == 40 and found.labels == []


def test_text_without_paragraphs_is_taken_line_by_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(
        "\ufeff" + "".join(f"a person with the name of number {n}, and nothing else to say of it\n" for n in range(50)), encoding="utf-8"
    )
    found = read_text(path)
    assert len(found) == 50 and told(found)[1] == "a person with the name of number 1, and nothing else to say of it\n"


def test_indentation_stays():
    found = store(["first\n  \n   indented\n\n\n\nlast\n\n", *PARAGRAPHS])
    assert [found.fields["text"][i].numpy().tobytes() for i in range(3)] == [b"first\n\n", b"   indented\n\n", b"last\n\n"]


def test_the_documentation_of_python_itself():
    found = read_pydocs()
    assert 250_000 < len(found.fields["text"].values) < 1_500_000 and found.notes["repeated"] > 100
    assert len(set(told(found))) == len(found)


@pytest.mark.parametrize(
    "content, what, wanted",
    [
        (b"", "the text in .*t.txt is empty", "0 bytes in 0"),
        (b" \n\n \n", "is empty", "at least 2\u00a0000 bytes in 20 paragraphs"),
        (b"Hello.\n\nWorld.\n", "the text in .*t.txt is too short", "14 bytes in 2 different"),
        (b"a line\n" * 1000, "is too short", "7 bytes in 1 different"),
    ],
)
def test_empty_or_too_short_text_is_refused(content, what, wanted, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=what) as fault:
        read_text(tmp_path / "t.txt")
    assert wanted in str(fault.value)


def test_bytes_that_are_not_utf8_are_named_with_file_and_place(tmp_path):
    (tmp_path / "good.txt").write_text("".join(PARAGRAPHS), encoding="utf-8")
    (tmp_path / "wrong.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match="wrong.txt is not UTF-8\n  byte 3: 0xe9"):
        read_text(tmp_path)
