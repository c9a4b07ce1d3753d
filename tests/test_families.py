"""Every family through the same command, small: killed and started again it ends with the bits of an unbroken run; its later verbs work."""

import json
import os
from pathlib import Path
import signal

from PIL import Image
import pytest
from test_resume import bits, started

from cloche import cli

pytestmark = pytest.mark.usefixtures("quiet_machine")

SMALL = {
    "digits-rows": ["train.epochs=2"],
    "airline": ["train.steps=40"],
    "pydocs": ["net.width=32", "net.layers=1", "net.heads=2", "data.vocabulary=300", "data.window=64", "train.steps=30"],
    "pydocs-lstm": ["net.width=24", "data.vocabulary=300", "train.steps=30"],
    "dates": ["data.rows=600", "net.width=32", "net.layers=1", "train.steps=30", "train.test_batch=64"],
    "digits-diffusion": ["net.width=16", "train.steps=30", 'task.judge=""', "task.samples=6", "task.steps=2"],
    "dialtones": ["data.rows=60", "net.width=16", "train.steps=30"],
}
LATER = {
    "digits-rows": [["explain"]],
    "airline": [["predict", "mine.csv"], ["explain", "mine.csv"]],
    "pydocs": [["generate", "The value of", "--length", "8"], ["explain", "The value of the"]],
    "pydocs-lstm": [["predict", "the value of the"], ["explain", "the value of the"], ["generate", "the", "--length", "4"]],
    "dates": [["predict", "<iso>15 March 2024"], ["explain", "<iso>15 March 2024"]],
    "digits-diffusion": [["generate", "tatu", "--n", "2", "--steps", "2"], ["explain", "tatu"]],
    "dialtones": [["explain"]],
}


class Family:
    """A shipped recipe made small, in a folder, with its command."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.name = folder, name
        self.sets = [
            w
            for s in ("train.precision=fp32", "train.layout=plain", "train.matmul=default", "train.device=cpu", *SMALL[name])
            for w in ("--set", s)
        ]

    def command(self, out: Path) -> list[str]:
        return ["train", f"recipe:{self.name}", "--out", str(out), *self.sets]


@pytest.mark.parametrize("name", SMALL)
def test_killed_it_ends_with_the_bits_of_an_unbroken_run_and_its_verbs_work(name, tmp_path, capsys, monkeypatch):
    family, whole, broken = Family(name, tmp_path), tmp_path / "whole", tmp_path / "broken"
    assert cli.run(family.command(whole)) == 0
    if os.name == "posix":
        with started(family, broken) as running:
            running.wait_for_progress()
            assert running.send(signal.SIGKILL) == -signal.SIGKILL
    assert cli.run(family.command(broken)) == 0
    assert bits(broken) == bits(whole)
    results = json.loads((whole / "results.json").read_text())
    assert results["headline"] in results["metrics"] and results["layers"]
    assert sum(row["params"] for row in results["layers"]) == json.loads((whole / "facts.json").read_text())["parameters"]
    assert "<html" in (whole / "report" / "index.html").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = (f"{1990 + i // 12}-{1 + i % 12:02},{100 + i + i % 12}" for i in range(60))
    Path("mine.csv").write_text("\n".join(["month,passengers", *rows]))
    for verb, *given in LATER[name]:
        capsys.readouterr()
        assert cli.run([verb, str(whole), *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.get("predictions") or found.get("outputs") or all(Path(p).stat().st_size > 1000 for p in found["pictures"])


def text(folder: Path) -> str:
    words = "one two three four five six seven eight nine ten".split()
    (folder / "book.txt").write_text("\n\n".join(" ".join(words[(i * k) % 10] for k in range(1, 25)) + f" {i}." for i in range(60)))
    return "book.txt"


def pairs(folder: Path) -> str:
    (folder / "mine.tsv").write_text("".join(f"{i} and {i + 1}\t{i + 1}, {i}\n" for i in range(120)) + "\n")
    return "mine.tsv"


def series(folder: Path) -> str:
    rows = (f"{i},{i * i % 11 - 5},{(i % 7) ** 2 + i * i % 5}" for i in range(160))  # with zeros and negative numbers
    (folder / "two.csv").write_text("\n".join(["day,a,b", *rows]))
    return "two.csv"


def captions(folder: Path) -> str:
    (folder / "mine").mkdir()
    for i in range(30):
        Image.new("RGB", (20, 16), (8 * i, 40, 90)).save(folder / "mine" / f"{i}.png")
    (folder / "mine" / "captions.tsv").write_text("".join(f"{i}.png\t{'dark' if i < 15 else 'light'} {i}\n" for i in range(30)))
    return "mine"


OWN = {text: "pydocs", pairs: "dates", series: "airline", captions: "digits-diffusion"}


@pytest.mark.parametrize("made", OWN, ids=lambda made: made.__name__)
def test_own_data_of_every_kind_trains_from_its_path(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = [w for s in SMALL[OWN[made]] if not s.startswith(("data.rows", "train.steps", "task.judge")) for w in ("--set", s)]
    path = made(tmp_path)
    more = {series: ["--set", "data.season=7"]}.get(made, [])
    assert cli.run(["train", f"./{path}", *sets, *more, "--set", "train.steps=3", "--out", "run"]) == 0
    assert cli.run(["evaluate", "run", "--data", f"./{path}"]) == 0
    assert cli.run(["predict", "run", {series: path, pairs: "3 and 4"}.get(made, "one two")]) == (2 if made is captions else 0)
    assert "cloche itself failed" not in capsys.readouterr().err
