"""Extract the messages of cloche, update every catalogue in this folder and compile it into the package.

python lang/words.py            # write lang/*.po and cloche/lang/*/LC_MESSAGES/cloche.mo
python lang/words.py --check    # say what is missing or stale; exit code 1 when something is
"""

import io
from pathlib import Path
import re
import sys

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import read_mo, write_mo
from babel.messages.pofile import read_po, write_po

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "cloche"
KEYWORDS = {"_": None, "_n": (1, 2)}


def template() -> Catalog:
    """Every message of the package's Python and of its pages, where they are written _("…")."""
    found = Catalog(project="cloche", charset="utf-8")
    for name, line, message, comments, _context in extract_from_dir(
        PACKAGE, [("**.py", "python")], keywords=KEYWORDS, comment_tags=("Translators:",)
    ):
        found.add(message, locations=[(f"cloche/{name}", line)], auto_comments=comments)
    for page in sorted(PACKAGE.rglob("*.html")):
        for message in re.findall(r'_\("((?:[^"\\]|\\.)*)"\)', page.read_text(encoding="utf-8")):
            found.add(message.replace('\\"', '"'))
    for message in argparse_words():
        found.add(message)
    return found


def argparse_words() -> list[str]:
    """What argparse itself says; it looks its words up in our catalogue."""
    return [
        "usage: ",
        "options",
        "positional arguments",
        "show this help message and exit",
        "show program's version number and exit",
        "the following arguments are required: %s",
        "unrecognized arguments: %s",
        "expected one argument",
        "argument %(argument_name)s: %(message)s",
        "invalid choice: %(value)r (choose from %(choices)s)",
        "invalid %(type)s value: %(value)r",
        "expected at least one argument",
        "ignored explicit argument %r",
    ]


def updated(path: Path, fresh: Catalog) -> Catalog:
    with path.open("rb") as f:
        mine = read_po(f, locale=path.stem)
    mine.update(fresh, no_fuzzy_matching=True)
    mine.obsolete.clear()
    return mine


def compiled(catalogue: Catalog) -> bytes:
    out = io.BytesIO()
    write_mo(out, catalogue)
    return out.getvalue()


def written(catalogue: Catalog) -> bytes:
    out = io.BytesIO()
    write_po(out, catalogue, width=120, no_location=True, sort_output=True, ignore_obsolete=True)
    return re.sub(rb'"POT-Creation-Date:.*\n|"Generated-By:.*\n', b"", out.getvalue())


def messages(catalogue: Catalog) -> list[tuple[list[str], list[str]]]:
    """What a catalogue says, without its header (which holds the minute it was made in)."""
    both = ((m.id, m.string) for m in catalogue if m.id)
    return sorted(tuple([t] if isinstance(t, str) else [*(t or [])] for t in pair) for pair in both)


def faults(path: Path, catalogue: Catalog) -> list[str]:
    """Messages without words, and those whose {placeholders} differ."""
    out = []
    for m in catalogue:
        if not m.id:
            continue
        forms = m.string if isinstance(m.string, (tuple, list)) else [m.string]
        asked = set(re.findall(r"\{\w+\}|%\(\w+\)[rs]|%[rs]", m.id[-1] if isinstance(m.id, (tuple, list)) else m.id))
        if not all(forms):
            out.append(f"{path.name}: no words for {m.id!r}")
        elif any(set(re.findall(r"\{\w+\}|%\(\w+\)[rs]|%[rs]", f)) - asked for f in forms) or asked - set(
            re.findall(r"\{\w+\}|%\(\w+\)[rs]|%[rs]", forms[-1])
        ):
            out.append(f"{path.name}: other placeholders in {m.id!r}")
    mo = PACKAGE / "lang" / path.stem / "LC_MESSAGES" / "cloche.mo"
    if not mo.exists() or messages(read_mo(io.BytesIO(mo.read_bytes()))) != messages(catalogue):
        out.append(f"{mo.relative_to(HERE.parent)} is stale: make words")
    return out


def main(check: bool) -> int:
    fresh, bad = template(), []
    for path in sorted(HERE.glob("*.po")):
        catalogue = updated(path, fresh)
        if not check:
            path.write_bytes(written(catalogue))
            mo = PACKAGE / "lang" / path.stem / "LC_MESSAGES" / "cloche.mo"
            mo.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as f:
                mo.write_bytes(compiled(read_po(f, locale=path.stem)))
        bad += faults(path, catalogue if check else updated(path, fresh))
    print("\n".join(bad) or f"{len(fresh)} messages, every catalogue complete")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
