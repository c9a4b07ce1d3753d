"""Families of nets beside what people train them with elsewhere: an LSTM, a GPT, its sampling, a diffusion net.

    python benchmarks/families.py --data ../shared/data --examples PATH --nanogpt PATH [--only lstm gpt sample unet] [--rounds 5]

DATA holds english_novels/, tinyshakespeare.txt and openmoji/; PATHs are checkouts of github.com/pytorch/examples and
github.com/karpathy/nanoGPT. Each comparison is with the peer as shipped and with the peer tuned by hand, in the same alternated rounds;
what a comparison needs and lacks is told, and the rest goes on. What is equal and what is not: README.md.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
import gzip
import io
import json
from pathlib import Path
import re
import shutil
import sys
import tomllib
import zipfile

from ab import Failed, Side
from compare import RESULTS, add, against, begun, cloche_side, holding, last_object, peer_side
from peers import JOBS, ROOT, NotRun, checked, environment
from PIL import Image

WORK = ROOT / ".bench" / "families"  # what is made of the data, once
NOVELS_CHARS, SIDE, PICTURES = 7_500_000, 32, 2000
PROMPT, NEW = 448, 64
DIFFUSION = ("denoising-diffusion-pytorch", "accelerate", "ema-pytorch", "pydantic")


@dataclass(frozen=True)
class Comparison:
    """figures: {name: its unit in words}, the rate first. hide: this machine's paths."""

    peers: list[Side]
    own: Side
    versions: dict[str, str]
    figures: dict[str, str]
    hide: tuple[Path, ...] = ()


# Data


def made(name: str, make: Callable[[Path], None]) -> Path:
    """A folder below WORK, whole or absent; its name holds what it hangs on."""
    folder, draft = WORK / name, WORK / f"{name}.draft"
    if not folder.exists():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        make(draft)
        draft.rename(folder)
    return folder


def novels(data: Path, recipe: dict, folder: Path) -> None:
    """The same lines for both: novels.txt, whose rare words cloche makes one unknown one, and train, valid and test.txt, where they are.

    " It was , she said\\n": a blank before every word, so that each side takes the same tokens, the end of the line being one.
    """
    with gzip.open(data / "english_novels" / "train.txt.gz", "rt", encoding="utf-8") as f:
        text = f.read(NOVELS_CHARS)
    rows = ["".join(f" {word}" for word in re.findall(r"[A-Za-z]+|[^\w\s]", line)) for line in text.split("\n")]
    lines = list(dict.fromkeys(row for row in rows if row))  # each once, as cloche reads them
    held = round(recipe["data"]["test"] * len(lines))
    counts = Counter(word for line in lines[:-held] for word in line.split())
    most = recipe["data"]["vocabulary"] - 2  # beside them the unknown word and the end of a line
    if len(counts) <= most:
        raise NotRun(f"a text with more than {most} different words, and {data / 'english_novels'} has {len(counts)}")
    known = set(sorted(counts, key=lambda word: (-counts[word], word))[:most])
    (folder / "novels.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    marked = [" ".join(word if word in known else "<unk>" for word in line.split()) + "\n" for line in lines]
    for name, part in (("train", marked[:-held]), ("valid", marked[-held:]), ("test", marked[-held:])):
        (folder / f"{name}.txt").write_text("".join(part), encoding="utf-8")


def pictures(data: Path, folder: Path) -> None:
    """Emoji on white, with the shortest caption there is."""
    with zipfile.ZipFile(data / "openmoji" / "openmoji_color_72x72.zip") as z:
        names = sorted(name for name in z.namelist() if name.endswith(".png"))[:PICTURES]
        for name in names:
            drawn = Image.open(io.BytesIO(z.read(name))).convert("RGBA")
            white = Image.new("RGBA", drawn.size, "white")
            Image.alpha_composite(white, drawn).convert("RGB").resize((SIDE, SIDE)).save(folder / Path(name).name)
    (folder / "captions.tsv").write_text("".join(f"{Path(name).name}\tx\n" for name in names), encoding="utf-8")


# The comparisons


def checkout(path: Path | None, option: str, repository: str, file: str) -> tuple[Path, str]:
    """A peer's checkout and its commit. Raises: NotRun."""
    if path is None or not (path / file).is_file():
        raise NotRun(f"{option} PATH (github.com/{repository})")
    try:
        return path.resolve(), checked("git", "-C", path, "rev-parse", "HEAD").strip()
    except Failed:
        return path.resolve(), "unknown"


def recipe_of(name: str) -> dict:
    return tomllib.loads((JOBS / f"{name}.toml").read_text(encoding="utf-8"))


def both(title: str, python: Path, job: str, *words: str | Path, env: dict[str, str] | None = None) -> list[Side]:
    """As shipped and tuned by hand; threads that wait give their core away in the latter, as in cloche."""
    tuned = peer_side(f"{title}, tuned by hand", python, job, *words, "--tuned", env={**(env or {}), "GOMP_SPINCOUNT": "10000"})
    return [peer_side(f"{title}, as shipped", python, job, *words, env=env), tuned]


def trained(name: str, unit: str, of_row: int, data: Path) -> Side:
    """cloche on benchmarks/jobs/NAME.toml. of_row: how many units an example is."""
    rate, recipe = f"{unit}_per_s", recipe_of(name)
    side = cloche_side(str(JOBS / f"{name}.toml"), recipe["train"]["steps"], {rate: "speed.examples_per_s"}, data)

    def read(printed: str, folder: Path) -> dict:
        found = side.read(printed, folder)
        facts = json.loads((folder / "run" / "facts.json").read_text(encoding="utf-8"))
        events = map(json.loads, (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines())
        more = {"flops": facts["flops"] / of_row, "losses": [e["loss"] for e in events if e["kind"] == "step"], "tried": facts["tried"]}
        return {rate: found.pop(rate) * of_row, **found, **more}

    return replace(side, read=read)


def lstm(o: argparse.Namespace) -> Comparison:
    examples, commit = checkout(o.examples, "--examples", "pytorch/examples", "word_language_model/main.py")
    data, recipe = holding(o.data, ("english_novels/train.txt.gz",), "english_novels/"), recipe_of("lstm")
    python, versions = environment(job="lstm_peer")
    corpus = made(f"novels-{NOVELS_CHARS}-{recipe['data']['vocabulary']}", partial(novels, data, recipe))
    peers = both("pytorch/examples word_language_model", python, "lstm_peer", examples, corpus, recipe["train"]["steps"])
    own = trained("lstm", "words", recipe["data"]["window"], corpus / "novels.txt")
    return Comparison(peers, own, versions | {"pytorch/examples": commit}, {"words_per_s": "words/s"}, hide=(examples, WORK))


def gpt(o: argparse.Namespace) -> Comparison:
    nanogpt, commit = checkout(o.nanogpt, "--nanogpt", "karpathy/nanoGPT", "train.py")
    text, recipe = holding(o.data, ("tinyshakespeare.txt",), "tinyshakespeare.txt") / "tinyshakespeare.txt", recipe_of("gpt")
    python, versions = environment(job="gpt_peer")
    peers = both("nanoGPT", python, "gpt_peer", nanogpt, text, recipe["train"]["steps"], recipe["train"]["batch"])
    own = trained("gpt", "tokens", recipe["data"]["window"], text)
    return Comparison(peers, own, versions | {"nanoGPT": commit}, {"tokens_per_s": "tokens/s"}, hide=(nanogpt, text))


def sample(o: argparse.Namespace) -> Comparison:
    nanogpt, commit = checkout(o.nanogpt, "--nanogpt", "karpathy/nanoGPT", "model.py")
    python, versions = environment(job="sample_peer")
    peers = both("nanoGPT's generate", python, "sample_peer", nanogpt, PROMPT, NEW)
    command = (sys.executable, str(JOBS / "sample_cloche.py"), str(PROMPT), str(NEW))
    own = Side("cloche", command, lambda printed, folder: last_object(printed), {"PYTHONPATH": str(ROOT)}, ROOT)
    figures = {"total_s": f"s for {NEW} tokens", "first_ms": "ms to the first token", "next_ms": "ms a token after it"}
    return Comparison(peers, own, versions | {"nanoGPT": commit}, figures, hide=(nanogpt,))


def unet(o: argparse.Namespace) -> Comparison:
    data, recipe = holding(o.data, ("openmoji/openmoji_color_72x72.zip",), "openmoji/"), recipe_of("unet")
    python, versions = environment(*DIFFUSION, job="unet_peer")
    folder, widths = made(f"pictures-{PICTURES}-{SIDE}", partial(pictures, data)), [recipe["net"]["width"], *recipe["net"]["mults"]]
    words = (folder, recipe["train"]["steps"], recipe["train"]["batch"], ",".join(map(str, widths)))
    peers = both("denoising-diffusion-pytorch", python, "unet_peer", *words, env={"PYTHONPATH": str(ROOT)})
    return Comparison(peers, trained("unet", "pictures", 1, folder), versions, {"pictures_per_s": "pictures/s"}, hide=(WORK,))


ALL = {f.__name__: f for f in (lstm, gpt, sample, unet)}


# What was measured


def measured(name: str, c: Comparison, rounds: int) -> list[dict]:
    """`against`, with the operations of each side, which differ, and the losses."""
    out = against(c.peers, c.own, c.figures, rounds, hide=c.hide)
    for each in out:
        each["family"], sides = name, each["rounds"][0]
        if "flops" not in sides["a"]:
            continue
        rate = next(iter(c.figures))
        top = max(v for found in each["limits"] for v in found["matmul_gflop_per_s"].values())
        gflop = {key: sides[key]["flops"] / 1e9 for key in "ab"}
        rates = {key: each["figures"][rate][f"{key}_median"] * gflop[key] for key in "ab"}
        each |= {"gflop": gflop, "gflop_per_s": rates, "share_of_top_matmul": {key: r / top for key, r in rates.items()}}
        each["remarks"] += [f"side {key}: {r:.0f} GFLOP/s is above the measured limit of {top:.0f}" for key, r in rates.items() if r > top]
        ends = {key: sides[key]["losses"] for key in "ab"}
        told = (f"{gflop[key]:.4g} GFLOP, loss {ends[key][0]:.3g} at first and {ends[key][-1]:.3g} at last" for key in "ab")
        each["remarks"].append(f"one of {c.figures[rate].removesuffix('/s')}, of the peer and of cloche: " + "; ".join(told))
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder with english_novels/, tinyshakespeare.txt and openmoji/")
    p.add_argument("--examples", type=Path, help="a checkout of github.com/pytorch/examples")
    p.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    p.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=RESULTS / "families.json", help="comparisons of other families in it are kept")
    o = p.parse_args()
    if o.rounds < 1:
        p.error(f"--rounds is {o.rounds}; give 1 or more")
    result, failed = begun("families of nets beside their peers; ratios above 1: cloche is better"), 0
    if o.out.exists():
        result["comparisons"] = [c for c in json.loads(o.out.read_text())["comparisons"] if c["family"] not in o.only]
    for name in o.only:
        try:
            comparison = ALL[name](o)
            found = measured(name, comparison, o.rounds)
            about = {"started": result["started"], "commit": result["commit"], "peer_versions": comparison.versions}
            add(result, comparison.versions, [each | about for each in found], o.out)
        except NotRun as lack:
            print(f"{name}: not run: needs {lack}")
        except Failed as fault:
            print(f"{name}: {fault}", file=sys.stderr)
            failed = 1
    sys.exit(failed)


if __name__ == "__main__":
    main()
