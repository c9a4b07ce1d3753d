"""The store: data decoded once into arrays, kept in the person's cache folder under what it was made of.

A source of files is recognised by its files' names, sizes and times (so that a second start decodes nothing); what is
in it is known by `fingerprint`, a hash of every example's content, label and part, which a run remembers.
"""

from collections.abc import Callable
import hashlib
import io
import json
import os
from pathlib import Path
import sys
from typing import Any

import numpy as np

from cloche import files
from cloche.config import nearest
from cloche.data.prepare import DataConfig
from cloche.data.read.audio import read_audio
from cloche.data.read.builtin import BUILTIN
from cloche.data.read.captions import read_captions
from cloche.data.read.examples import Examples
from cloche.data.read.folder import read_folder
from cloche.data.read.idx import looks_like_idx, read_idx
from cloche.data.read.pairs import read_pairs
from cloche.data.read.series import read_series
from cloche.data.read.text import read_text
from cloche.data.table import Ragged, Table
from cloche.errors import UserError
from cloche.words import _

SUFFIXES = {".txt": "text", ".tsv": "pairs", ".csv": "series"}  # of a file → the kind of its data
INDEXES = {"captions.tsv": "captions", "transcripts.tsv": "audio"}  # in a folder → the kind of its data
ARRAYS = "arrays"  # the source of what cloche.fit was given
VALUES, OFFSETS = "--values", "--offsets"  # of a ragged field, as files
FORMAT = 1  # raise it when a reader gives other arrays for the same files


class Store(Table):
    """Every row of a source, as it is (uint8, not floats).

    label: (n,) int64 or (n, K) float32. digest, group, part, names, labels, left_out, notes: as in Examples.
    """

    def __init__(self, examples: Examples) -> None:
        super().__init__({**examples.fields, "label": examples.label}, examples.names)
        self.kind, self.labels = examples.kind, examples.labels
        self.left_out, self.notes = examples.left_out, examples.notes
        self.digest, self.part, self.label = examples.digest, examples.part, examples.label
        self.group = examples.digest if examples.group is None else examples.group
        self.fingerprint = fingerprint(examples)
        self.from_files = False  # else built in, or a person's arrays


def fingerprint(examples: Examples) -> str:
    """What the data is, wherever it lies: a hash over content, label and part of every row."""
    h = hashlib.blake2b(digest_size=16)
    for a in (examples.digest, examples.label, examples.part):
        h.update(np.ascontiguousarray(a))
    shapes = {k: [str(a.dtype), a.shape] for k, a in flat(examples.fields).items()}
    h.update(json.dumps([examples.labels, shapes], sort_keys=True).encode())
    return h.hexdigest()


def kind_of(source: str) -> str:
    """The data kind of a source.

    Raises: UserError when there is no such set or path, or nothing in it is understood.
    """
    if source in BUILTIN:
        return BUILTIN[source][0]
    path = Path(source)
    if not source or not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(source, BUILTIN) or nearest(path.name, beside)
        raise UserError(
            _("there is no data at {path}").format(path=source or '""'),
            _('the nearest name is "{near}"').format(near=near)
            if near
            else _("neither a path nor one of the sets that need no download: {names}").format(names=", ".join(BUILTIN)),
            _("give the path of your data with --data PATH"),
        )
    if path.is_dir() and any("\ud800" <= c <= "\udfff" for c in source):  # a recipe is TOML, and TOML is UTF-8
        raise UserError(_("the name {path} is not UTF-8").format(path=ascii(source)), "", _("rename it"))
    if path.is_dir():
        return _kind_of_folder(path)
    if path.is_file() and path.suffix.lower() in SUFFIXES:  # no FIFO, which would wait for a writer
        return SUFFIXES[path.suffix.lower()]
    raise UserError(
        _("{path} is no file that cloche reads").format(path=source),
        _("{size} bytes").format(size=path.stat().st_size),
        _(
            "give text (.txt), pairs (.tsv), a series (.csv), or a folder: of class folders with pictures, of IDX files, of pictures with "
            "captions.tsv, of sounds with transcripts.tsv, of text files"
        ),
    )


def _kind_of_folder(path: Path) -> str:
    for index, kind in INDEXES.items():
        if (path / index).exists():
            return kind
    here = [p for p in path.iterdir() if not p.name.startswith(".")]
    if not here or not all(map(_is_text, here)):
        return "pictures"  # its reader says what lacks
    return "pairs" if len(here) == 2 and {p.suffix for p in here} != {".txt"} else "text"


def _is_text(path: Path) -> bool:
    if not path.is_file() or path.suffix.lower() in (".gz", ".zip"):
        return False
    with path.open("rb") as f:
        return b"\0" not in f.read(1024)


def cache_folder() -> Path:
    """Where this person's stores lie; CLOCHE_CACHE names another place. Not created here."""
    if own := os.environ.get("CLOCHE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cloche" / "cache"
    linux = Path.home() / ".cache" / os.environ.get("XDG_CACHE_HOME", "")  # an absolute one replaces what stands before it
    return (Path.home() / "Library" / "Caches" if sys.platform == "darwin" else linux) / "cloche"


def open_store(config: DataConfig, say: Callable[[str], None] = lambda text: None) -> Store:
    """The store of a source, from the cache folder where it is there already, else read and kept.

    Args:
        say: told when the cache folder cannot be written (the data is then held in memory this time).
    """
    if config.source == ARRAYS:
        raise UserError(_("this run was trained on arrays, which are not in its folder"), "", _("in Python: pass the arrays again"))
    options = {"kind": config.kind, "format": FORMAT, **_options(config)}
    key = hashlib.blake2b(json.dumps([_source_key(config.source), options], sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "stores" / key
    if (folder / "manifest.json").exists():
        try:
            return _from(_load(folder), config)
        except (UserError, ValueError, OSError) as fault:  # it is only a cache: say so and read the source again
            say(_("the store is read anew: {why}").format(why=getattr(fault, "what", fault)))
    examples = _read(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _keep(folder, examples)
    except (UserError, OSError) as fault:
        say(_("the store is held in memory this time: {why}").format(why=fault.what if isinstance(fault, UserError) else fault))
    return _from(examples, config)


def _from(examples: Examples, config: DataConfig) -> Store:
    store = Store(examples)
    store.from_files = config.source not in BUILTIN
    return store


def _options(config: DataConfig) -> dict[str, Any]:
    """The keys of [data] that change what is decoded."""
    keys = BUILTIN[config.source][2] if config.source in BUILTIN else ("pixels",)
    return {k: getattr(config, k) for k in keys if hasattr(config, k)}


def _source_key(source: str) -> Any:
    """Names, sizes and times of a folder's files; the name of a built-in set."""
    if source in BUILTIN:
        return source
    root = Path(source).resolve()
    found = []
    if root.is_file():
        return [str(root), root.stat().st_size, root.stat().st_mtime_ns]
    for folder, _folders, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                s = os.stat(path)
            except OSError:  # a dangling link: the reader reports it
                continue
            found.append((os.path.relpath(path, root).encode("utf-8", "surrogateescape").hex(), s.st_size, s.st_mtime_ns))
    return [str(root), sorted(found)]


def _read(config: DataConfig) -> Examples:
    if config.source in BUILTIN:
        return BUILTIN[config.source][1](**_options(config))
    return READERS[config.kind](Path(config.source), config)


def _read_pictures(root: Path, config: Any) -> Examples:
    reader = read_idx if looks_like_idx(root) else read_folder
    return reader(root, config.pixels, lambda _name, shape, dtype: np.zeros(shape, dtype))


READERS: dict[str, Callable[[Path, Any], Examples]] = {
    "pictures": _read_pictures,
    "series": lambda path, config: read_series(path),
    "audio": lambda path, _config: read_audio(path),
    "text": lambda path, _config: read_text(path),
    "pairs": lambda path, _config: read_pairs(path),
    "captions": lambda path, config: read_captions(path, config.pixels),
}


def _keep(folder: Path, examples: Examples) -> None:
    arrays = {f"field-{k}": a for k, a in flat(examples.fields).items()} | {k: getattr(examples, k) for k in ("label", "digest", "part")}
    arrays |= {} if examples.group is None else {"group": examples.group}
    meta = {k: getattr(examples, k) for k in ("kind", "labels", "names", "left_out", "notes")}
    parts: dict[str, Any] = {f"{k}.npy": _npy(a) for k, a in arrays.items()}
    parts["meta.json"] = [json.dumps(meta, ensure_ascii=True).encode()]
    files.write_folder(folder, parts, "cloche store", {})


def _npy(a: np.ndarray) -> list[bytes | memoryview]:
    """numpy's file format, the payload uncopied."""
    a = np.ascontiguousarray(a)
    header = np.lib.format.header_data_from_array_1_0(a)
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, header)
    return [out.getvalue(), memoryview(a).cast("B") if a.size else b""]


def _load(folder: Path) -> Examples:
    listed = files.check_manifest(folder, "cloche store", thorough=False)
    meta = files.read_json(folder / "meta.json", limit_bytes=1 << 30)
    # copy-on-write: torch wants arrays that it may write to; nothing reaches the file
    arrays = {n[:-4]: np.load(folder / n, mmap_mode="c", allow_pickle=False) for n in listed["files"] if n.endswith(".npy")}
    found = {k.removeprefix("field-"): a for k, a in arrays.items() if k.startswith("field-")}
    fields: dict[str, Any] = {k: a for k, a in found.items() if not k.endswith((VALUES, OFFSETS))}
    fields |= {k.removesuffix(VALUES): Ragged(a, found[k.removesuffix(VALUES) + OFFSETS]) for k, a in found.items() if k.endswith(VALUES)}
    meta["left_out"] = [tuple(pair) for pair in meta["left_out"]]
    given = {k: arrays.get(k) for k in ("label", "digest", "part", "group")}
    return Examples(fields=fields, **given, **meta)


def flat(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ragged fields as two arrays each."""
    out: dict[str, np.ndarray] = {}
    for k, f in fields.items():
        out |= {k + VALUES: f.values, k + OFFSETS: f.offsets} if isinstance(f, Ragged) else {k: f}
    return out
