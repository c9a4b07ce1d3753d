"""Pictures with captions: the built-in set in six languages, a folder with its captions.tsv, and prompts as people type them."""

import unicodedata

import numpy as np
from PIL import Image
import pytest
import torch

from cloche import rng
from cloche.data.captions import NUMBERS, CaptionsConfig, CaptionsPrepare, read_captions, spoken
from cloche.data.chunk import Part
from cloche.data.read.builtin import read_digits
from cloche.data.store import Store, kind_of, open_store
from cloche.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return read_digits()


@pytest.fixture(scope="module")
def store(digits):
    return Store(spoken(digits))


@pytest.fixture(scope="module")
def config():
    return CaptionsConfig(source="digits-captions", pixels=8, channels=1)


@pytest.fixture(scope="module")
def prepare(store, config):
    return CaptionsPrepare.fit(store, config.parts(store), config)


def part(store, config, prepare, name):
    return Part(name, *prepare.view(store, config.parts(store)[name]), prepare)


# ---- the words


def test_every_word_means_one_digit_and_is_in_its_script():
    words = {k: v.split() for k, v in NUMBERS.items()}
    assert list(words) == ["en", "hi", "sw", "af", "uk", "pl"] and {len(v) for v in words.values()} == {10}
    means = {}
    for language, names in words.items():
        for digit, word in enumerate(names):
            assert means.setdefault(word, digit) == digit, f"{word} of {language} means two digits"
            scripts = {unicodedata.name(c).split()[0] for c in word if c.isalpha()}
            assert scripts == {{"hi": "DEVANAGARI", "uk": "CYRILLIC"}.get(language, "LATIN")}
            assert word == unicodedata.normalize("NFC", word)
    assert len(means) == 59  # zero is zero in English and in Polish
    assert {v[3] for v in words.values()} == {"three", "तीन", "tatu", "drie", "три", "trzy"}


# ---- the built-in set


def test_each_picture_stands_six_times_and_in_one_part(digits, store, config):
    assert store.n == 6 * len(digits) and store.name(13) == "digit 2 · एक".replace("एक", "दो")
    texts = [bytes(store.fields["caption"][i].numpy()).decode() for i in range(60)]
    assert texts[6:12] == [names.split()[1] for names in NUMBERS.values()]
    assert torch.equal(store.fields["image"][60:66], torch.from_numpy(digits.fields["image"][10]).expand(6, 8, 8, 1))
    parts = config.parts(store)
    assert all(len(rows) % 6 == 0 for rows in parts.values())
    groups = [{g.tobytes() for g in store.group[rows]} for rows in parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert len({d.tobytes() for d in store.digest}) > len({g.tobytes() for g in store.group}) * 5


def test_a_prepared_chunk(store, config, prepare):
    test = part(store, config, prepare, "test")
    chunk = next(test.once(60))[1]
    image = chunk.data["image"]
    assert image.shape == (60, 1, 8, 8) and image.dtype == torch.float32
    assert float(image.min()) == -1 and float(image.max()) == 1
    raw = store.rows(config.parts(store)["test"][:60])["image"]
    torch.testing.assert_close(image, raw.permute(0, 3, 1, 2) / 127.5 - 1)
    words = [names.split() for names in NUMBERS.values()]
    assert prepare.text(chunk) == [words[i % 6][k] for i, k in enumerate(chunk.data["label"].tolist())]
    assert chunk.data["caption"].dtype == torch.int64 and chunk.data["caption"].shape == (60, 8)
    assert prepare.words.size > int(chunk.data["caption"].max()) and prepare.labels == tuple("0123456789")
    again = CaptionsPrepare.model_validate_json(prepare.model_dump_json())
    assert again == prepare and again.text(chunk) == prepare.text(chunk)


def test_it_trains_on_what_it_shows_without_augmentation(store, config, prepare):
    train = part(store, config, prepare, "train")
    order = train.order(32, 0)
    learned = train.step(order, 0, 0, 1, 32, rng.draw(0, 0))[0]
    seen = train.take(learned.ids.numpy())
    assert torch.equal(learned.data["image"], seen.data["image"]) and learned.train


# ---- prompts


def test_a_prompt_is_read_as_its_caption(prepare):
    same = lambda a, b: prepare.encode(a)["caption"].tolist() == prepare.encode(b)["caption"].tolist()  # noqa: E731
    assert (
        same("  Tatu ", "tatu") and same("П’ять", "п'ять") and same("пʼять", "п'ять") and same(unicodedata.normalize("NFD", "pięć"), "pięć")
    )
    assert not same("tatu", "tano")
    data = prepare.gather([prepare.encode(p) for p in ("tatu", "", "dziewięć")])
    assert data["caption_len"].tolist() == [4, 0, 8] and data["caption"].shape == (3, 8)


def test_letters_that_no_caption_has_are_named(prepare):
    with pytest.raises(UserError, match="@, β"):
        prepare.encode("tatu@β")


# ---- a folder


@pytest.fixture
def folder(tmp_path):
    for n, mode in enumerate(("L", "RGB", "L")):
        Image.fromarray(np.full((10 + n, 12), 40 * n, np.uint8)).convert(mode).save(tmp_path / f"{n}.png")
    (tmp_path / "captions.tsv").write_text("0.png\tblack\n1.png\tgrey\n2.png\tlight\n1.png\tdark\n", encoding="utf-8")
    return tmp_path


def test_a_folder_with_captions_is_read(folder):
    assert kind_of(str(folder)) == "captions"
    found = read_captions(folder, 8)
    assert found.fields["image"].shape == (4, 8, 8, 3) and found.names[3] == "1.png · dark"
    assert [bytes(found.fields["caption"][i]).decode() for i in range(4)] == ["black", "grey", "light", "dark"]
    assert np.array_equal(found.group[1], found.group[3]) and not np.array_equal(found.digest[1], found.digest[3])
    assert (found.fields["image"][1] == 40).all()
    store = open_store(CaptionsConfig(source=str(folder), pixels=8, channels=3))
    assert store.n == 4 and torch.equal(store.fields["image"], torch.from_numpy(found.fields["image"]))


@pytest.mark.parametrize(
    "content, told",
    [
        ("0.png\tblack\n1.png\tgrey\n", "without a caption.*\n  2.png"),
        ("0.png\tblack\n1.png\tgrey\n2.png\tlight\n7.png\tred\nx/8.png\tred\n", "not there\n  7.png, x/8.png"),
        ("0.png\tblack\n1.png grey\n2.png\tlight\n", "line 2 of .*\n  1.png grey"),
        ("0.png\tblack\n1.png\t \n2.png\tlight\n", "line 2 of"),
        ("0.png\tblack\n1.png\tgrey\tdark\n2.png\tlight\n", "line 2 of"),
        (b"0.png\tblack\n1.png\tgr\xffy\n", "captions.tsv is not UTF-8\n.*byte 20: 0xff"),
        (None, "captions.tsv cannot be read"),
    ],
)
def test_captions_that_are_wrong_are_told(folder, content, told):
    (folder / "captions.tsv").unlink()
    if content is not None:
        (folder / "captions.tsv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=told):
        read_captions(folder, 8)


def test_a_damaged_picture_is_left_out_and_none_is_an_error(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    found = read_captions(folder, 8)
    assert len(found) == 2 and found.left_out[0][0] == "1.png"
    for name in ("0.png", "2.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="no picture in .* can be read\n  0.png .empty file"):
        read_captions(folder, 8)
