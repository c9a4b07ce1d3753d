"""Data and runs that are not as they should be: each is named, with the way out and the right exit code; what can go on, does."""

import json
from pathlib import Path
import re
import shutil
import struct
import sys
import zlib

import numpy as np
from PIL import Image
import pytest

from cloche import cli
from cloche.errors import DONE, FAILED, WRONG_INPUT
from cloche.training.run import SEALED

posix = pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not have")
PLAIN = ["--set", "train.precision=fp32", "--set", "train.layout=plain", "--set", "train.matmul=default"]
TINY = [*PLAIN, "--set", "data.pixels=12", "--set", "data.channels=1", "--set", "net.stages=[[2]]", "--set", "net.hidden=4"]
TINY += ["--epochs", "2", "--batch", "8"]
POINTS = [*PLAIN, "--set", "data.rows=100", "--epochs", "2"]


pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.fixture
def cloche(capsys, tmp_path, monkeypatch):
    """A command in an empty folder: (exit code, stdout, stderr). It never ends in a trace."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "cloche itself failed" not in err, err
        return code, out, err

    return call


def pictures(root: Path, classes=("beans", "maize"), n: int = 8) -> Path:
    g = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray((100 * g.random((12, 12)) + 100 * (k % 2)).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def png(w: int, h: int) -> bytes:
    """A PNG whose header promises w × h grey pixels; 70 bytes."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Three finished runs and the pictures of one of them."""
    root = tmp_path_factory.mktemp("runs")
    pictures(root / "photos")
    assert cli.run(["train", str(root / "photos"), *TINY, "--out", str(root / "leaves")]) == DONE
    assert cli.run(["train", "spirals", *POINTS, "--out", str(root / "points")]) == DONE
    assert cli.run(["train", "curve", *POINTS, "--out", str(root / "curve")]) == DONE
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of a finished run, to do things to."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


# --- data that is not there, or is no data ----------------------------------------------------------------------------------------


def test_a_path_that_is_missing_names_its_nearest_neighbour(cloche, tmp_path):
    pictures(tmp_path / "photos")
    for told in (cloche("train", "./photo"), cloche("train", "digits", "--data", "photo")):
        assert told[0] == WRONG_INPUT
        assert (
            re.search(r"there is no data at (\./)?photo\n", told[2]) and 'the nearest name is "photos"' in told[2] and "--data" in told[2]
        )


def test_a_path_that_is_missing_near_nothing(cloche):
    code, _out, told = cloche("train", "nowhere/photos")
    assert code == WRONG_INPUT and "there is no data at nowhere/photos" in told and "digits, spirals, curve" in told


def test_an_empty_name_is_not_the_folder_here(cloche, tmp_path):
    pictures(tmp_path / "photos")
    code, _out, told = cloche("train", "digits", "--data", "")
    assert code == WRONG_INPUT and 'there is no data at ""' in told


@pytest.mark.parametrize("verb", ["train", "evaluate", "explain"])
def test_a_name_longer_than_a_name_can_be(verb, cloche):
    code, _out, told = cloche(verb, "a" * 300)
    assert code == WRONG_INPUT and "aaaa" in told and "look at that path" in told


def test_a_recipe_whose_data_a_person_has_to_bring(cloche):
    code, _out, told = cloche("train", "mnist")
    assert code == WRONG_INPUT and "there is no data at mnist" in told and "give the path of your data with --data PATH" in told


def test_a_path_that_is_a_file(cloche):
    Path("prices.xlsx").write_text("a,b\n1,2\n")
    code, _out, told = cloche("train", "./prices.xlsx")
    assert code == WRONG_INPUT and "./prices.xlsx is no file that cloche reads" in told
    assert "8 bytes" in told and "or a folder: of class folders with pictures" in told


@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt"])
def test_a_file_with_next_to_nothing_in_it(suffix, cloche):
    Path(f"prices.{suffix}").write_text("a,b\n1,2\n")
    code, _out, told = cloche("train", f"./prices.{suffix}")
    assert code == WRONG_INPUT and f"prices.{suffix}" in told


def test_an_empty_folder(cloche, tmp_path):
    (tmp_path / "photos").mkdir()
    code, _out, told = cloche("train", "photos")
    assert code == WRONG_INPUT and "photos has no class folders with pictures" in told and "there is nothing in it" in told
    assert "photos/maize, photos/beans" in told


def test_one_class(cloche, tmp_path):
    pictures(tmp_path / "photos", ["maize"])
    code, _out, told = cloche("train", "photos")
    assert code == WRONG_INPUT and "one class only: maize" in told and "needs at least two folders" in told


def test_loose_pictures(cloche, tmp_path):
    pictures(tmp_path, ["photos"], 3)
    code, _out, told = cloche("train", "photos")
    assert code == WRONG_INPUT and "photos has no class folders" in told
    assert "0.png (not in a class folder)" in told and "put the pictures of each class into a folder of its own" in told


def test_a_folder_of_something_else(cloche, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.bin").write_bytes(b"\0hello")
    code, _out, told = cloche("train", "notes")
    assert code == WRONG_INPUT and "notes has no class folders" in told and "a.bin" in told


def test_a_folder_with_one_word_of_text(cloche, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("hello")
    code, _out, told = cloche("train", "notes")
    assert code == WRONG_INPUT and "notes" in told


def test_a_run_in_place_of_data(cloche, run):
    run("leaves")
    code, _out, told = cloche("train", "./leaves")
    assert code == WRONG_INPUT and "./leaves is a run, not data" in told
    assert "cloche train leaves/recipe.toml" in told and "cloche predict ./leaves INPUT" in told


def idx(root: Path, **given: np.ndarray) -> Path:
    root.mkdir()
    for name, a in given.items():
        head = struct.pack(">I", 2048 + a.ndim) + struct.pack(f">{a.ndim}I", *a.shape)
        (root / f"{name.replace('_', '-')}-idx{a.ndim}-ubyte").write_bytes(head + a.tobytes())
    return root


X, Y = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8), (np.arange(40) % 2).astype(np.uint8)


def test_idx_files_whose_counts_differ(cloche, tmp_path):
    idx(tmp_path / "set", train_images=X, train_labels=Y[:30], t10k_images=X[:10], t10k_labels=Y[:10])
    code, _out, told = cloche("train", "set")
    assert code == WRONG_INPUT and "train-images-idx3-ubyte and its labels do not belong together" in told
    assert "40 pictures but 30 labels" in told and "download or copy them again" in told


def test_idx_files_that_are_cut(cloche, tmp_path):
    path = idx(tmp_path / "set", train_images=X, train_labels=Y, t10k_images=X[:10], t10k_labels=Y[:10]) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    code, _out, told = cloche("train", "set")
    assert code == WRONG_INPUT and "train-images-idx3-ubyte is damaged" in told and "download or copy it again" in told
    assert "it has 2 476 bytes, its header promises 2 576" in told.replace("\u00a0", " ")


# --- bad files among good ones --------------------------------------------------------------------------------------------------


def bad_files(folder: Path) -> dict[str, str]:
    """Files that give no picture; name → why."""
    whole = (folder / "0.png").read_bytes()
    content = {
        "zero.png": (b"", "empty file"),
        "cut.png": (whole[: len(whole) // 2], "ends at byte"),
        "broken.png": (whole[:60] + bytes(20) + whole[80:], "damaged: "),
        "page.jpg": (b"<html>not found</html>", "not a picture: none of JPEG"),
        "huge.png": (png(60_000, 60_000), "3 600 000 000 pixels|60 000 × 60 000 pixels"),
    }
    for name, (data, _why) in content.items():
        (folder / name).write_bytes(data)
    return {name: why for name, (_data, why) in content.items()}


def test_bad_pictures_are_left_out_counted_and_named_and_training_goes_on(cloche, tmp_path):
    bad = bad_files(pictures(tmp_path / "photos") / "maize")
    for junk in (".DS_Store", "Thumbs.db", "maize/.DS_Store", "maize/Thumbs.db"):
        (tmp_path / "photos" / junk).write_bytes(b"junk")
    (tmp_path / "photos/__MACOSX").mkdir()
    (tmp_path / "photos/__MACOSX/0.png").write_bytes(png(1, 1))
    code, out, told = cloche("train", "photos", *TINY, "--json")
    assert code == DONE and json.loads(out)["run"] == "runs/photos"
    assert "16 pictures in 2 classes" in told.replace("\u00a0", " ") and "beans 8 · maize 8" in told
    assert re.search(r"left out 5 unreadable: maize/broken\.png \(damaged: .*\) and 4 more", told)
    facts = json.loads(Path("runs/photos/facts.json").read_text())
    found = {name.removeprefix("maize/"): why for name, why in facts["left_out"]}
    assert found.keys() == bad.keys() and facts["n"] == 16 and facts["notes"]["ignored"] == 5
    for name, why in bad.items():
        assert re.search(why, found[name].replace("\u00a0", " ")), (name, found[name])


def test_only_bad_pictures(cloche, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, _out, told = cloche("train", "photos")
    assert code == WRONG_INPUT and re.search(r"no picture in photos can be read|photos has no class folders", told)
    assert "a/x.png (" in told and not Path("runs/photos/facts.json").exists()


@posix
@pytest.mark.parametrize(
    "classes, shown",
    [
        (("मक्का", "सेम"), "मक्का"),
        (("new\nline", "old"), "new\\nline"),
        (("-dash", "--json"), "-dash"),
        (("קמח", "תירס"), "קמח"),
        (("a\u202eb", "c"), "a\\u202eb"),
        (("🌽", "e" * 200), "🌽"),
    ],
    ids=["Hindi", "newline", "leading dash", "right to left", "turned round", "emoji and long"],
)
def test_any_class_name_trains_evaluates_and_predicts(classes, shown, cloche, tmp_path):
    pictures(tmp_path / "photos", classes)
    code, _out, told = cloche("train", "photos", *TINY)
    assert code == DONE and f"{shown} 8" in told and "\u202e" not in told
    for words in (["evaluate", "runs/photos"], ["evaluate", "runs/photos", "--data", "photos"]):
        code, out, _told = cloche(*words)
        assert code == DONE and shown in out and "\u202e" not in out
    picture = f"photos/{classes[0]}/0.png"
    code, out, _told = cloche("predict", "runs/photos", picture)
    assert code == DONE and len(out.splitlines()) == 1
    code, out, _told = cloche("predict", "runs/photos", picture, "--json")
    (answer,) = json.loads(out)["predictions"]
    assert answer["input"] == picture and set(answer["probabilities"]) == set(classes) and answer["label"] in classes
    assert json.loads(Path("runs/photos/facts.json").read_text())["labels"] == sorted(classes)


@posix
def test_names_that_are_not_utf8(cloche, tmp_path):
    """As data they cannot stand in a recipe; as a run folder or a picture they can."""
    if sys.platform == "darwin":
        pytest.skip("not run: needs a file system whose names are bytes")
    pictures(tmp_path / "ph\udcff")
    code, _out, told = cloche("train", "./ph\udcff")
    assert code == WRONG_INPUT and r"the name './ph\udcff' is not UTF-8" in told and "rename it" in told
    assert cloche("train", "spirals", *POINTS, "--out", "r\udcff")[0] == DONE
    assert cloche("evaluate", "r\udcff")[0] == DONE
    assert Path("r\udcff/report/index.html").exists()


# --- predict ----------------------------------------------------------------------------------------------------------------------


def save(path: str, mode: str, **how: object) -> None:
    g = np.random.default_rng(0)
    if mode.startswith("I"):
        Image.fromarray(g.integers(0, 65536, (9, 15), np.uint16)).save(path, **how)
    else:
        Image.fromarray(g.integers(0, 256, (9, 15, 3), np.uint8)).convert(mode).save(path, **how)


SOUND = {
    "cmyk.jpg": lambda p: save(p, "CMYK"),
    "palette.png": lambda p: save(p, "P", transparency=3),
    "alpha.png": lambda p: save(p, "RGBA"),
    "sixteen.png": lambda p: save(p, "I;16"),
    "bit.png": lambda p: save(p, "1"),
    "moving.gif": lambda p: save(p, "P", save_all=True, append_images=[Image.new("P", (15, 9))]),
    "turned.jpg": lambda p: save(p, "RGB", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "dot.png": lambda p: Image.new("L", (1, 1), 200).save(p),
    "strip.png": lambda p: Image.new("L", (2000, 1), 200).save(p),
    "a picture.png": lambda p: save(p, "L"),
    "चित्र.png": lambda p: save(p, "L"),
}


def test_predict_on_pictures_of_every_kind(cloche, made):
    for name, write in SOUND.items():
        write(name)
    code, out, _told = cloche("predict", made / "leaves", *SOUND, "--json")
    answers = json.loads(out)["predictions"]
    assert code == DONE and [a["input"] for a in answers] == list(SOUND)
    assert all(a["label"] in ("beans", "maize") and sum(a["probabilities"].values()) == pytest.approx(1) for a in answers)
    upright = Image.open("turned.jpg").transpose(Image.Transpose.ROTATE_270)
    upright.save("upright.png")
    code, out, _told = cloche("predict", made / "leaves", "turned.jpg", "upright.png", "--json")
    turned, upright = (a["probabilities"]["maize"] for a in json.loads(out)["predictions"])
    assert turned == pytest.approx(upright, abs=1e-6)


def test_predict_on_a_name_that_begins_with_a_dash(cloche, made):
    save("-dash.png", "L")
    code, out, _told = cloche("predict", made / "leaves", "--", "-dash.png")
    assert code == DONE and out.startswith("-dash.png   ")
    code, _out, told = cloche("predict", made / "leaves", "-dash.png")
    assert (
        code == WRONG_INPUT
        and "INPUT" in told
        and "see cloche predict --help; what begins with a dash and is no option stands after --" in told
    )


BAD = {
    "missing.png": (None, "No such file or directory"),
    "zero.png": (b"", "empty file"),
    "page.jpg": (b"<html>", "not a picture: none of JPEG, PNG"),
    "cut.png": (png(9, 9)[:40], "ends at byte 40"),
    "broken.png": (png(9, 9), "ends at byte|damaged"),
    "huge.png": (png(60_000, 60_000), "60 000 × 60 000 pixels, more than the 64 000 000"),
    "wide.png": (png(70_000, 1), "70 000 × 1 pixels, more than .* 65 535 a side"),
}


@pytest.mark.parametrize("name", BAD)
def test_predict_on_what_is_no_picture(name, cloche, made):
    content, why = BAD[name]
    if content is not None:
        Path(name).write_bytes(content)
    save("good.png", "L")
    code, out, told = cloche("predict", made / "leaves", "good.png", name)
    assert code == WRONG_INPUT and out == ""
    assert f"{name} cannot be read as a picture" in told and "give a PNG, JPEG, WebP" in told
    assert re.search(why, told.replace("\u00a0", " ")), told


def test_predict_on_a_folder(cloche, made):
    code, _out, told = cloche("predict", made / "leaves", made / "photos")
    assert code == WRONG_INPUT and "photos cannot be read as a picture\n  Is a directory" in told


@pytest.mark.parametrize("row", ["0.5 x", "0.5", "0.5 1 2", "0.5 nan", "inf 1", "1e400 1", "", "0,5;1"])
def test_a_row_with_words_or_the_wrong_count(row, cloche, made):
    code, out, told = cloche("predict", made / "points", "0.5 1", row)
    assert code == WRONG_INPUT and out == ""
    assert "a row of this run is 2 numbers" in told and (f"\n  {row}\n" in told or not row) and 'for example "0.5 0.5"' in told


@pytest.mark.parametrize("row", ["-0.5 1", "-0.5,1", "0.5, 1e-3"])
def test_a_row_of_numbers(row, cloche, made):
    code, out, _told = cloche("predict", made / "points", "--", row)
    assert code == DONE and re.match(rf"{re.escape(row)}   (anti)?clockwise   ", out)


# --- runs -------------------------------------------------------------------------------------------------------------------------

VERBS = {"evaluate": [], "predict": ["0.5 1"], "report": [], "explain": ["0.5 1"]}


@pytest.mark.parametrize("name", SEALED)
def test_a_flipped_bit_in_any_sealed_file(name, cloche, run):
    path = run("points") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for verb, more in VERBS.items():
        code, _out, told = cloche(verb, "points", *more)
        assert code == FAILED and f"damaged: points/{name}" in told, (verb, told)
        assert re.search(r"sha256: '\w{64}' expected, '\w{64}' found", told) and "Put a copy of it back" in told


@pytest.mark.parametrize("name", SEALED)
def test_any_sealed_file_missing(name, cloche, run):
    (run("points") / name).unlink()
    code, _out, told = cloche("evaluate", "points")
    assert code == FAILED and f"cannot read points/{name}\n  No such file or directory" in told and "put back from a copy" in told


@pytest.mark.parametrize("name", SEALED)
def test_a_sealed_file_of_another_run(name, cloche, run):
    shutil.copy(run("curve") / name, run("points") / name)
    code, _out, told = cloche("predict", "points", "0.5 1")
    assert code == FAILED and f"damaged: points/{name}" in told


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_weights_that_are_cut(cut, cloche, run):
    path = run("points") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    code, _out, told = cloche("predict", "points", "0.5 1")
    found = len(content[:cut])
    assert code == FAILED and "damaged: points/model.safetensors" in told and f"bytes: {len(content)} expected, {found} found" in told


MANIFESTS = {
    "another kind": (lambda m: m | {"kind": "a store"}, WRONG_INPUT, "of another kind: points\n  cloche run expected, 'a store'"),
    "a newer format": (
        lambda m: m | {"format": 99},
        WRONG_INPUT,
        "by a newer cloche: points\n  format 99 found, this cloche knows up to 1",
    ),
    "a file less": (lambda m: m | {"files": {}}, FAILED, "damaged: points/manifest.json\n  its own sha256 does not fit"),
    "no table": (lambda m: [], WRONG_INPUT, "a folder of another kind: points\n  cloche run expected"),
    "nested": (None, FAILED, "damaged: points/manifest.json\n  nested too deep"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_says_something_else(name, cloche, run):
    change, wanted, text = MANIFESTS[name]
    path = run("points") / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))) if change else "[" * 100_000)
    code, _out, told = cloche("predict", "points", "0.5 1")
    assert code == wanted and text in told
    assert re.search(r"Update cloche|Put a copy of it back|Give a folder that cloche train left", told)


def test_what_is_no_run(cloche, tmp_path, made):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for verb, more in VERBS.items():
        if verb != "explain":  # which takes recipes and data too
            assert "not a cloche run: no manifest.json in folder" in cloche(verb, "folder", *more)[2]
            assert "file is a file, not a run folder" in cloche(verb, "file", *more)[2]
            code, _out, told = cloche(verb, "nowhere", *more)
            assert code == WRONG_INPUT and "there is no run folder nowhere" in told and "cloche train RECIPE" in told
    assert 'the nearest name is "points"' in cloche("evaluate", made / "pionts")[2]


@pytest.mark.parametrize("verb", ["evaluate", "predict", "report"])
def test_a_run_that_is_not_finished(verb, cloche, run):
    (run("points") / "manifest.json").unlink()
    code, _out, told = cloche(verb, "points", *VERBS[verb])
    assert code == WRONG_INPUT and "the run points is not finished" in told and "type the command that began it" in told


@pytest.mark.parametrize("verb", ["evaluate", "predict", "report"])
def test_a_recipe_in_place_of_a_run(verb, cloche):
    code, _out, told = cloche(verb, "digits", *(["my.png"] if verb == "predict" else []))
    assert code == WRONG_INPUT and "there is no run folder digits" in told and "train it first: cloche train digits" in told


def test_evaluate_on_data_with_other_classes(cloche, made, tmp_path):
    pictures(tmp_path / "others", ["maize", "sorghum"])
    code, _out, told = cloche("evaluate", made / "leaves", "--data", "others")
    assert code == WRONG_INPUT and "classes that the run does not know: sorghum" in told and "it knows beans, maize" in told


def test_evaluate_on_fewer_of_its_classes_numbers_them_as_the_run_does(cloche, made, tmp_path):
    pictures(tmp_path / "more", ["weeds", "maize"])
    shutil.rmtree(tmp_path / "more/weeds")
    shutil.copytree(tmp_path / "more/maize", tmp_path / "more/beans")
    code, out, _told = cloche("evaluate", made / "leaves", "--data", "more", "--json")
    assert code == DONE and np.sum(json.loads(out)["confusion"], 1).tolist() == [8, 8]


@pytest.mark.parametrize(
    "name, data, wanted, found",
    [("leaves", "spirals", "pictures", "columns"), ("points", "digits", "columns", "pictures"), ("curve", "digits", "columns", "pictures")],
)
def test_evaluate_on_data_of_another_kind(name, data, wanted, found, cloche, made):
    code, _out, told = cloche("evaluate", made / name, "--data", data)
    assert code == WRONG_INPUT and f"{data} is of another kind than this run's data\n  {wanted} expected, {found} found" in told
    assert "give data of that kind" in told


def test_evaluate_on_data_that_is_missing(cloche, made):
    code, _out, told = cloche("evaluate", made / "points", "--data", "nowhere")
    assert code == WRONG_INPUT and "there is no data at nowhere" in told and "--data PATH" in told


def test_the_same_folder_with_another_recipe(cloche, run):
    """F28: each field by name, with both values and the three ways on."""
    run("points")
    code, _out, told = cloche("train", "spirals", *POINTS, "--epochs", "3", "--lr", "0.5", "--out", "points")
    assert code == WRONG_INPUT and "points was begun with another recipe, data or machine" in told
    assert "train.epochs   there 2   now 3" in told and "optim.lr   there 0.005   now 0.5" in told
    assert all(way in told for way in ("--out NAME", "--again", "--allow-change optim.lr --allow-change train.epochs"))


def test_the_same_folder_with_other_data(cloche, run):
    run("points")
    code, _out, told = cloche("train", "spirals", *POINTS, "--set", "data.rows=120", "--out", "points")
    assert code == WRONG_INPUT and "data.rows   there 100   now 120" in told
    assert re.search(r'facts\.fingerprint   there "\w+"   now "\w+"', told)


def test_the_same_command_prints_the_result_of_a_finished_run(cloche, run):
    before = {p: p.read_bytes() for p in run("points").rglob("*") if p.is_file() and p.name != ".lock"}
    code, _out, told = cloche("train", "spirals", *POINTS, "--out", "points")
    assert code == DONE and "points is finished; this is its result. To train anew: --again" in told and "epoch" not in told
    assert {p: p.read_bytes() for p in before} == before
