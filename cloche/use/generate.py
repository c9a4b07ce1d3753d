"""`cloche generate`: text that goes on where a prompt ends, or pictures for a prompt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
import re
from typing import Any

import numpy as np
from pydantic import Field, ValidationError
import torch

from cloche.build import precision_of
from cloche.config import Frozen, faults_of
from cloche.decode.text import continue_text, stream
from cloche.errors import UserError
from cloche.files import durable_write
from cloche.use.draw import tiles
from cloche.use.model import Model, load
from cloche.words import _


class How(Frozen):
    """How to sample: each is an option of the command, which says what it means. None: as the recipe says."""

    n: int = Field(1, ge=1, le=1024)
    seed: int = Field(0, ge=0, lt=2**31)
    length: int = Field(200, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    steps: int | None = Field(None, ge=1, le=10_000)
    guidance: float | None = Field(None, ge=0)
    out: str | None = None


def how_of(given: dict[str, str]) -> How:
    """What a person typed, as text. Raises: UserError with the option and what it may be."""
    try:
        return How.model_validate(given, strict=False)
    except ValidationError as fault:
        wrong = faults_of(fault, "--", How, {})[0]
        key = wrong.key.replace("--.", "--").replace("_", "-")
        raise UserError(f"{key}: {wrong.wrong}", "", wrong.do, name="usage") from None


def generate(run: str | Path, prompt: str, how: How, write: Callable[[str], None]) -> dict[str, Any]:
    """{"outputs": [{"prompt", "text" or "path"}]}; `write` is given the text piece by piece while it is made."""
    model = load(run)
    precision = precision_of(model.recipe)
    with torch.inference_mode(), precision.autocast(model.device):
        if model.task.face == "continues":
            precision.pack(model.net, model.device)
            return {"outputs": [{"prompt": prompt, "text": _text(model, prompt, how, how.seed + i, write)} for i in range(how.n)]}
        if model.task.face == "denoises":
            return {"outputs": [{"prompt": prompt, "path": _pictures(model, prompt, how)}]}
    do = _("it answers an input: cloche predict {run} INPUT").format(run=model.path)
    raise UserError(_("{run} generates nothing: its task is {task}").format(run=model.path, task=model.recipe.task.kind), "", do)


def _text(model: Model, prompt: str, how: How, seed: int, write: Callable[[str], None]) -> str:
    said, tokens = "", torch.from_numpy(model.prepare.encode(prompt)["tokens"])[None].to(model.device)  # (1, T)
    sampling = (how.temperature, how.top_k, how.top_p, torch.Generator().manual_seed(seed), model.task.unknown)
    for piece in stream(continue_text(model.net, tokens, how.length, *sampling), model.prepare.decode):
        write(piece)
        said += piece
    write("\n")
    return said


def _pictures(model: Model, prompt: str, how: How) -> str:
    asked = {k: v for k in ("steps", "guidance") if (v := getattr(how, k)) is not None}
    task = model.recipe.task.model_copy(update=asked).build(model.prepare, model.facts)
    chunk = model.chunk(model.prepare.gather([model.prepare.encode(prompt)] * how.n))
    chunk = replace(chunk, ids=chunk.ids + how.seed)  # each picture has a seed of its own
    path = Path(how.out or (re.sub(r"[^\w-]+", "-", prompt).strip("-") or "generated") + ".png")
    durable_write(path, tiles(np.stack([answer["image"] for answer in task.answer(model.nets, chunk)])))
    return str(path)
