"""The one preparation of all verbs: what was fitted on the training part, as JSON, and how a row becomes a net's input."""

from collections.abc import Iterator
from dataclasses import replace
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
import torch
from torch import Tensor

from cloche import rng
from cloche.config import Frozen, Port
from cloche.data import augment
from cloche.data.chunk import Chunk
from cloche.data.pictures import Unreadable, decode, framed
from cloche.data.split import check_classes, split
from cloche.data.table import Ragged, Table
from cloche.errors import UserError
from cloche.words import _

Share = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Frozen):
    """Keys of every `[data]` table."""

    source: str = Field(description=_("a set that needs no download, or a path"))
    validation: Share = Field(0.1, description=_("share kept for choosing; 0 for none"))
    test: Share = Field(0.2, description=_("share kept for the last figure, where the data has no test part of its own"))
    fold: int = Field(0, ge=0, description=_("which test cut of the ranking"))

    in_order: ClassVar[bool] = False  # cut as the rows stand: running text, time

    def parts(self, store: Any) -> dict[str, np.ndarray]:
        """The rows of train, validation and test."""
        rows = split(store.group, store.label, store.part, self.validation, self.test, self.fold, self.in_order)
        check_classes(store.label, store.labels, rows)
        return rows


class Augment(Frozen):
    rotate: float = Field(0.0, ge=0, le=180, description=_("at most so many degrees either way"))
    brightness: float = Field(0.0, ge=0, lt=1, description=_("factor 1 ± share"))
    contrast: float = Field(0.0, ge=0, lt=1, description=_("factor 1 ± share"))
    mirror: bool = Field(False, description=_("half of the pictures left to right"))
    shift: int = Field(0, ge=0, le=4096, description=_("at most so many whole pixels either way, black beyond the border"))
    small: Share = Field(0.0, description=_("share of the training, from its beginning, whose pictures have half the side"))


class PicturesConfig(DataConfig):
    kind: Literal["pictures"] = "pictures"
    pixels: int = Field(48, ge=1, le=4096, description=_("the side of a picture as the net sees it"))
    channels: Literal[1, 3] = Field(3, description=_("1 for grey, 3 for colour"))
    normalize: bool = Field(True, description=_("subtract the mean, divide by the standard deviation of the training part"))
    augment: Augment = Field(Augment(), description=_("random changes while training"))


class ColumnsConfig(DataConfig):
    kind: Literal["columns"] = "columns"
    rows: int = Field(1000, ge=20, le=10_000_000, description=_("how many points are made"))
    noise: float = Field(0.1, ge=0, description=_("standard deviation of the noise added"))
    normalize: bool = Field(True, description=_("subtract the mean, divide by the standard deviation of the training part"))


class Prepared(Frozen):
    """What preparations share. ragged: whether the fields of an input differ in length, and are padded as a table pads."""

    ragged: ClassVar[bool] = False

    def view(self, store: Any, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """The rows of a part as the loop reads them, and their numbers there."""
        return store, ids

    def gather(self, encoded: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """Inputs → the fields of a chunk, as the rows of a part give them."""
        rows = {name: [e[name] for e in encoded] for name in encoded[0]}
        fields = {name: Ragged.of(r, r[0].dtype) if self.ragged else np.stack(r) for name, r in rows.items()}
        return Table(fields).rows(np.arange(len(encoded)))


class Scaled(Prepared):
    """A preparation with mean and std: of each of `columns` one, or none at all."""

    @model_validator(mode="after")
    def _one_each(self) -> "Scaled":
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.columns) or not all(s > 0 for s in self.std):
            raise ValueError("mean and std do not fit")
        return self

    @property
    def columns(self) -> int:
        return len(self.mean)


class PicturesPrepare(Scaled):
    """Pictures: decode, resize, scale to 0..1, augment while training, grey or colour, normalise. Gives (B, C, pixels, pixels)."""

    kind: Literal["pictures"] = "pictures"
    pixels: int = Field(ge=1, le=4096)
    channels: Literal[1, 3]
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[float, ...] = Field(strict=False)
    labels: tuple[str, ...] = Field(strict=False)
    augment: Augment = Augment()

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: PicturesConfig) -> "PicturesPrepare":
        given = {"pixels": config.pixels, "channels": config.channels, "labels": tuple(store.labels), "augment": config.augment}
        plain = cls(**given, mean=(0.0,) * config.channels, std=(1.0,) * config.channels)
        if not config.normalize:
            return plain
        mean, std = moments(plain.inputs(store.rows(i)).transpose(0, 1).flatten(1).T for i in batches(rows["train"]))
        return plain.model_copy(update={"mean": mean, "std": std})

    @property
    def columns(self) -> int:
        return self.channels

    @property
    def port(self) -> Port:
        return Port("image", (self.channels, self.pixels, self.pixels))

    def encode(self, given: str | Path | bytes | np.ndarray) -> dict[str, np.ndarray]:
        """One picture (a path, a file's bytes, or an (h, w) or (h, w, c) uint8 array) → its fields, as the store holds them."""
        if isinstance(given, np.ndarray):
            array = given[..., None] if given.ndim == 2 else given
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or max(array.shape[:2]) > self.pixels:
                what = _("an array for a picture is uint8, (h, w) or (h, w, 1 or 3), at most {pixels} pixels a side")
                do = _("give the file instead: it is reduced as the training pictures were")
                raise UserError(what.format(pixels=self.pixels), f"{given.dtype} {given.shape}", do)
        else:
            try:
                array = decode(given if isinstance(given, bytes) else Path(given), self.pixels).array
            except Unreadable as fault:
                what = _("{path} cannot be read as a picture").format(path=_("the bytes") if isinstance(given, bytes) else given)
                raise UserError(what, str(fault), _("give a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM file")) from None
        return {"image": array}

    def gather(self, encoded: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(a) for name, a in framed([e["image"] for e in encoded]).items()}

    def inputs(self, data: dict[str, Tensor], u: Tensor | None = None) -> Tensor:
        """`image` and `size` → (B, channels, pixels, pixels); u: (B, 6) draws where the pictures are to be changed."""
        x = data["image"].to(torch.float32) / 255  # (B, H, W, C)
        x = augment.resize(x, data["size"], self.pixels).permute(0, 3, 1, 2)  # (B, C, pixels, pixels)
        if u is not None:
            how = self.augment
            x = augment.jitter(x, u, how.rotate, how.brightness, how.contrast, how.mirror, how.shift)
        x = augment.grey(x) if self.channels == 1 else x
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        if x.shape[1] == 1 and len(set(self.mean)) == len(set(self.std)) == 1:  # grey: do the work once, then repeat
            return ((x - mean[:, :1]) / std[:, :1]).expand(-1, self.channels, -1, -1)
        return (x - mean) / std

    def device(self, chunk: Chunk) -> Chunk:
        changing = chunk.train and any(self.augment.model_dump().values())
        u = rng.uniform(chunk.draw, rng.AUGMENT, chunk.at, 6) if changing else None
        rest = {k: v for k, v in chunk.data.items() if k not in ("image", "size")}
        x = self.inputs(chunk.data, u)
        x = augment.half(x) if chunk.train and chunk.progress < self.augment.small else x
        return replace(chunk, data={"image": x, **rest})

    def pixels_of(self, x: Tensor) -> np.ndarray:
        """A prepared picture (C, h, w) → (h, w, C) in 0..1, for looking at it."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


class ColumnsPrepare(Scaled):
    """Columns of numbers, each scaled by the training part's mean and standard deviation. Gives (B, F)."""

    kind: Literal["columns"] = "columns"
    shape: tuple[Annotated[int, Field(ge=1, lt=2**31)], ...] = Field(strict=False, max_length=8)
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[float, ...] = Field(strict=False)
    labels: tuple[str, ...] = Field(strict=False)

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: ColumnsConfig) -> "ColumnsPrepare":
        ids, mean, std = rows["train"], (), ()
        if config.normalize:
            mean, std = moments(store.rows(i)["columns"].flatten(1) for i in batches(ids))
        shape = tuple(next(iter(store.rows(ids[:1]).values())).shape[1:])
        return cls(shape=shape, mean=mean, std=std, labels=tuple(store.labels))

    @property
    def columns(self) -> int:
        return math.prod(self.shape)

    @property
    def port(self) -> Port:
        return Port("vector", self.shape)

    def encode(self, given: Any) -> dict[str, np.ndarray]:
        """One row: numbers, or text such as "0.5 -1" or "0.5,-1"."""
        try:
            row = np.array([float(v) for v in given.replace(",", " ").split()] if isinstance(given, str) else given, np.float32).reshape(-1)
        except (ValueError, TypeError):
            row = np.empty(0, np.float32)
        wanted = int(np.prod(self.shape))
        if row.size != wanted or not np.isfinite(row).all():
            do = _('for example "{example}"').format(example=" ".join(["0.5"] * wanted))
            raise UserError(_("a row of this run is {n} numbers").format(n=wanted), str(given), do)
        return {"columns": row.reshape(self.shape)}

    def device(self, chunk: Chunk) -> Chunk:
        if not self.mean:
            return chunk
        x = chunk.data["columns"]
        mean, std = (torch.tensor(v, device=x.device).view(self.shape) for v in (self.mean, self.std))
        return replace(chunk, data={**chunk.data, "columns": (x - mean) / std})


def batches(ids: np.ndarray, size: int = 2048) -> Iterator[np.ndarray]:
    return (ids[a : a + size] for a in range(0, len(ids), size))


def moments(batches: Iterator[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column of (n, F) batches, from sums in float64; a constant column keeps 1."""
    n, total, squares = 0, 0.0, 0.0
    for x in batches:
        x = x.double()
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist())
