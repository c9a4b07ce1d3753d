"""What the pictures of a digits-diffusion run are worth: read by a judge, learned from, and beside the training pictures nearest to them.

    python benchmarks/diffusion.py runs/digits-diffusion --out FOLDER [--folds 5]

Agreement alone rewards a net that draws one perfect three, again and again; so a classifier that has seen nothing but drawn digits
is tried on the real test part. The test part is that of the recipe `digits`, which the judge never saw either. Prints one JSON object;
samples.png in FOLDER shows samples, each beside the training picture nearest to it.
"""

import argparse
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
from PIL import Image
from sklearn.svm import SVC
import torch
from torch import Tensor

from cloche.build import precision_of
from cloche.data.captions import NUMBERS
from cloche.use.draw import tiles
from cloche.use.model import Model, load
from cloche.use.train import Options, judges, many, train

SAMPLES, DRAWN, BATCH = 600, 1800, 300


def real(model: Model, part: str) -> tuple[Tensor, np.ndarray]:
    """The pictures of a part, each once, (n, 1, 8, 8) in 0..1, and their labels."""
    rows, store = model.data().rows[part][:: len(NUMBERS)], model.data().store
    return store.fields["image"][torch.from_numpy(rows)].permute(0, 3, 1, 2) / 255, store.label[rows]


@torch.inference_mode()
def drawn(model: Model, n: int, seed: int) -> tuple[Tensor, np.ndarray, list[str]]:
    """n pictures as a person gets them, as many of each language and digit; their labels and languages."""
    words = [(language, k, word) for language, names in NUMBERS.items() for k, word in enumerate(names.split())]
    asked, out = [words[i % len(words)] for i in range(n)], []
    for a in range(0, n, BATCH):
        chunk = model.chunk(model.prepare.gather([model.prepare.encode(word) for _language, _k, word in asked[a : a + BATCH]]))
        chunk.ids.add_(seed + a)
        with precision_of(model.recipe).autocast(model.device):
            out += [torch.tensor(answer["image"]).permute(2, 0, 1) for answer in model.task.answer(model.nets, chunk)]
    return torch.stack(out), np.array([k for _language, k, _word in asked]), [language for language, _k, _word in asked]


@torch.inference_mode()
def read(judge: torch.nn.Module, pictures: Tensor) -> np.ndarray:
    return torch.cat([judge(part).argmax(1) for part in pictures.split(BATCH)]).numpy()


def learned(pictures: Tensor, label: np.ndarray, test: Tensor, true: np.ndarray, folder: Path) -> dict[str, float]:
    """Test accuracy on real digits of classifiers that saw drawn ones alone: the recipe digits, on PNG files of them, and an SVC."""
    for i, (x, k) in enumerate(zip(pictures, label, strict=True)):
        path = folder / "drawn" / str(k) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(255 * x[0].numpy()).astype(np.uint8)).save(path)
    net = train("digits", str(folder / "drawn"), {"data.test": 0.0}, Options(out=str(folder / "learned"), again=True, quiet=True))
    svc = SVC(C=10).fit(pictures.flatten(1).numpy(), label)
    said = net.predict([np.round(255 * x.permute(1, 2, 0).numpy()).astype(np.uint8) for x in test])
    found = np.array([int(answer["label"]) for answer in said])
    return {"recipe digits": float((found == true).mean()), "svc": float(svc.score(test.flatten(1).numpy(), true))}


def nearest(pictures: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each (root of the sum of squares, pixels 0..1) to the training picture nearest to it, and which that is."""
    return torch.cdist(pictures.flatten(1), train.flatten(1)).min(1)


def quantiles(distance: Tensor) -> dict[str, float]:
    return {name: round(float(distance.quantile(q)), 3) for name, q in (("least", 0.0), ("5 %", 0.05), ("median", 0.5))}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--folds", type=int, default=0, help="train the judge's recipe so often, for its own accuracy")
    o = p.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    model = load(o.run)
    recipe = model.recipe.but(task={"judge": model.recipe.task.judge or "recipe:digits"})
    judge = judges(recipe, model.facts["labels"], torch.device("cpu"), lambda text: print(text, file=sys.stderr))["judge"]
    (test, true), (known, _label) = real(model, "test"), real(model, "train")
    x, label, languages = drawn(model, SAMPLES, 0)
    agreed, (distance, which) = read(judge, x) == label, nearest(x, known)
    noise = read(judge, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).div(2).add(0.5).clamp(0, 1))
    out: dict[str, Any] = {
        "run": str(o.run),
        "training_s": model.results["speed"].get("training_s"),
        "task": model.recipe.task.model_dump(),
        "agreement": float(agreed.mean()),
        "n": SAMPLES,
        "by_language": {k: float(agreed[[i for i, name in enumerate(languages) if name == k]].mean()) for k in NUMBERS},
        "judge": {"test_accuracy": float((read(judge, test) == true).mean()), "agrees_with_noise": float((noise == label).mean())},
        "learned_from_drawn": {"n": DRAWN, **learned(*drawn(model, DRAWN, 10_000)[:2], test, true, o.out)},
        "distance_to_nearest_training": {"samples": quantiles(distance), "test pictures": quantiles(nearest(test, known)[0])},
    }
    if o.folds:
        out["judge"]["folds"] = many("digits", None, {}, Options(out=str(o.out / "folds"), again=True, quiet=True), o.folds)
    pairs = torch.stack([x, known[which]], 1)[:96].flatten(0, 1).permute(0, 2, 3, 1)
    (o.out / "samples.png").write_bytes(tiles(pairs.numpy(), 16, 48))
    print(json.dumps(out, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
