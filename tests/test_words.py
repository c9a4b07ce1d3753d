"""Every word that a person reads has a translation, and reaches them: catalogues, the command line, a run and its page in Polish."""

import ast
import gettext
import os
from pathlib import Path
import re
import subprocess
import sys

from babel.messages.pofile import read_po
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cloche"
CATALOGUES = sorted(ROOT.glob("lang/*.po"))
PLURALS = {1: "1 epoka", 2: "2 epoki", 4: "4 epoki", 5: "5 epok", 12: "12 epok", 22: "22 epoki", 100: "100 epok"}


def cloche(language, cwd, *words):
    env = os.environ | {"LANGUAGE": language, "PYTHONUTF8": "1", "COLUMNS": "80"}
    return subprocess.run([sys.executable, "-m", "cloche", *words], cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=60)


def flat(text):
    return re.sub(r"\s+", " ", text)  # also the no-break spaces of numbers


def calls():
    """(place, argument) of every _(…) and _n(…) in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("_", "_n"):
                for argument in node.args[: 1 if node.func.id == "_" else 2]:
                    yield f"{path.relative_to(PACKAGE).as_posix()}: {ast.unparse(argument)}", argument


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of two epochs in it, and what was said."""
    folder = tmp_path_factory.mktemp("polish")
    done = cloche("pl", folder, "train", "spirals", "--epochs", "2", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder, flat(done.stdout + done.stderr)


def test_catalogues_complete():
    """Every message has words, with the same placeholders; what is compiled is what is written."""
    done = subprocess.run([sys.executable, ROOT / "lang" / "words.py", "--check"], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_messages_are_plain_literals():
    """A message is one literal, never an f-string or a sum: else no catalogue can hold it. The page's own are read from report.html."""
    assert [place for place, a in calls() if not (isinstance(a, ast.Constant) and isinstance(a.value, str))] == ["use/report.py: m[1]"]


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_extraction_sees_every_message(path):
    """babel does not look into f-strings before Python 3.12: _() within one would be in no catalogue."""
    with path.open("rb") as f:
        known = {text for m in read_po(f) for text in (m.id if isinstance(m.id, tuple) else [m.id])}
    assert [place for place, a in calls() if isinstance(a, ast.Constant) and a.value not in known] == []


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_labels_keep_their_column(path):
    """The lines before and after training start with a label in ten columns, two of them empty before training."""
    words = gettext.translation("cloche", PACKAGE / "lang", [path.stem]).gettext
    assert [w for w in map(words, ("classes", "left out", "turned", "split", "net", "machine")) if len(w) > 8] == []
    assert [w for w in map(words, ("train", "validation", "test", "speed")) if len(w) > 10] == []


@pytest.mark.parametrize(("n", "said"), PLURALS.items())
def test_polish_plurals(n, said):
    words = gettext.translation("cloche", PACKAGE / "lang", ["pl"])
    assert words.ngettext("{n} epoch", "{n} epochs", n).format(n=n) == said


def test_help_in_polish(tmp_path):
    done = cloche("pl", tmp_path, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("użycie: cloche [-h]")
    for phrase in (
        "Od własnych danych do nauczonej, zmierzonej i objaśnionej sieci.",
        "pokaż tę pomoc i zakończ",
        "Na początek: cloche train digits",
    ):
        assert phrase in flat(done.stdout)


def test_faults_in_polish(tmp_path):
    done = cloche("pl", tmp_path, "train", "spirals", "--set", "optim.lr=-1", "--set", "net.kind=mpl")
    said = flat(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    for phrase in ("Przepis ma 2 błędy; niczego nie uruchomiono.", "optim.lr = -1 musi być większe niż 0", 'nieznana nazwa (sieć) → "mlp"'):
        assert phrase in said
    assert "nieznane argumenty: --nic" in cloche("pl", tmp_path, "train", "spirals", "--nic").stderr


def test_run_in_polish(run):
    """The lines of a run, with the decimal comma and the plural forms."""
    _folder, said = run
    for phrase in (
        "1 000 wierszy w 2 klasach",
        "uczenie 700 · walidacja 100 · test 200",
        "lr 0.005 · 2 epoki",
        "epoka 2/2",
        "przedział ufności 95 %",
    ):
        assert phrase in said
    assert re.search(r"strata \d,\d{3} dokładność \d\d,\d % walidacja \d\d,\d %", said)
    assert not re.search(r"\b(loss|accuracy|epochs?|test part|look|speed)\b", said.replace("report/index.html", ""))


def test_page_in_polish(run):
    folder, _said = run
    page = (folder / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert '<html lang="pl">' in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    for heading in ("Na czym się uczyła", "Jak się uczyła", "Klasa po klasie", "Warstwy", "Przepis", "Komputer", "To samo jeszcze raz"):
        assert heading in headings
    assert re.search(r"<strong>\d\d,\d\s%</strong>", page)


def test_unknown_language_is_english(tmp_path):
    done = cloche("xx", tmp_path, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: cloche [-h]")
    assert "Start with: cloche train digits" in done.stdout
