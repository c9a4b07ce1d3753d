"""The store: data decoded once into arrays, kept in the person's cache folder under what it was made of.

A source of files is recognised by its files' names, sizes and times (so that a second start decodes nothing); what is
in it is known by `fingerprint`, a hash of every example's content, label and part, which a run remembers.
"""

from collections.abc import Callable
from functools import partial
import hashlib
import io
import json
import os
from pathlib import Path
import sys
from typing import Any

import numpy as np

from cloche import files, folders
from cloche.config import nearest
from cloche.data.kinds import KINDS
from cloche.data.prepare import DataConfig
from cloche.data.read.builtin import BUILTIN
from cloche.data.read.examples import Examples, digest
from cloche.data.table import Ragged, Table
from cloche.errors import UserError
from cloche.words import _

SUFFIXES = {".txt": "text", ".tsv": "pairs", ".csv": "series"}  # of a file → the kind of its data
INDEXES = {"captions.tsv": "captions", "transcripts.tsv": "audio"}  # in a folder → the kind of its data
ARRAYS = "arrays"  # the source of what cloche.fit was given
VALUES, OFFSETS = "--values", "--offsets"  # of a ragged field, as files
FORMAT = 1  # raise it when a reader gives other arrays for the same files


class Store(Table):
    """Every row of a source, as it is (uint8, not floats); label, digest, group, part, names, labels, left_out, notes as in Examples."""

    def __init__(self, examples: Examples) -> None:
        super().__init__({**examples.fields, "label": examples.label}, examples.names)
        self.kind, self.labels = examples.kind, examples.labels
        self.left_out, self.notes = examples.left_out, examples.notes
        self.digest, self.part, self.label = examples.digest, examples.part, examples.label
        self.group = examples.digest if examples.group is None else examples.group
        shapes = {k: [str(a.dtype), a.shape] for k, a in flat(examples.fields).items()}
        told = json.dumps([self.labels, shapes], sort_keys=True).encode()
        self.fingerprint = digest(self.digest, self.label, self.part, told).tobytes().hex()


def kind_of(source: str) -> str:
    """The data kind of a source. Raises: UserError when there is no such set or path, or nothing in it is understood."""
    if source in BUILTIN:
        return BUILTIN[source][0]
    path = Path(source)
    if not source or not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(source, BUILTIN) or nearest(path.name, beside)
        found = _("neither a path nor one of the sets that need no download: {names}").format(names=", ".join(BUILTIN))
        found = _('the nearest name is "{near}"').format(near=near) if near else found
        do = _("give the path of your data with --data PATH")
        raise UserError(_("there is no data at {path}").format(path=source or '""'), found, do)
    if path.is_dir():
        if any("\ud800" <= c <= "\udfff" for c in source):  # a recipe is TOML, and TOML is UTF-8
            raise UserError(_("the name {path} is not UTF-8").format(path=ascii(source)), "", _("rename it"))
        return _kind_of_folder(path)
    if path.is_file() and path.suffix.lower() in SUFFIXES:  # no FIFO, which would wait for a writer
        return SUFFIXES[path.suffix.lower()]
    do = _(
        "give text (.txt), pairs (.tsv), a series (.csv), or a folder: of class folders with pictures, of IDX files, of pictures with "
        "captions.tsv, of sounds with transcripts.tsv, of text files"
    )
    raise UserError(_("{path} is no file that cloche reads").format(path=source), _("{size} bytes").format(size=path.stat().st_size), do)


def _kind_of_folder(path: Path) -> str:
    if kind := next((kind for index, kind in INDEXES.items() if (path / index).exists()), ""):
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
    """The store of a source, from the cache folder where it is there already, else read and kept; `say` is told when that fails."""
    if config.source == ARRAYS:
        raise UserError(_("this run was trained on arrays, which are not in its folder"), "", _("in Python: pass the arrays again"))
    read, options = _reader(config)
    made_of = [_source_key(config.source), {"kind": config.kind, "format": FORMAT, **options}]
    key = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "stores" / key
    if (folder / "manifest.json").exists():
        try:
            return Store(_load(folder))
        except (UserError, ValueError, OSError) as fault:  # it is only a cache: say so and read the source again
            say(_("the store is read anew: {why}").format(why=getattr(fault, "what", fault)))
    examples = read(**options)
    try:
        folders.make_folder(folder.parent)
        files.sweep(folder.parent)  # no lock: at worst another machine holds its store in memory this time
        _keep(folder, examples)
    except (UserError, OSError) as fault:
        say(_("the store is held in memory this time: {why}").format(why=fault.what if isinstance(fault, UserError) else fault))
    return Store(examples)


def _reader(config: DataConfig) -> tuple[Callable[..., Examples], dict[str, Any]]:
    """Who reads the source, and the keys of [data] that change what is read."""
    _kind, read, keys = BUILTIN.get(config.source) or (config.kind, partial(KINDS[config.kind].read, Path(config.source)), ("pixels",))
    return read, {k: getattr(config, k) for k in keys if hasattr(config, k)}


def _source_key(source: str) -> Any:
    """Names, sizes and times of a folder's files; the name of a built-in set."""
    if source in BUILTIN:
        return source
    root = Path(source).resolve()
    if root.is_file():
        return [str(root), root.stat().st_size, root.stat().st_mtime_ns]
    paths = [os.path.join(folder, name) for folder, _folders, names in os.walk(root) for name in names]
    found = [(os.path.relpath(p, root), os.stat(p)) for p in paths if os.path.exists(p)]  # a dangling link: the reader reports it
    return [str(root), sorted((name.encode("utf-8", "surrogateescape").hex(), s.st_size, s.st_mtime_ns) for name, s in found)]


def _keep(folder: Path, examples: Examples) -> None:
    arrays = {f"field-{k}": a for k, a in flat(examples.fields).items()} | {k: getattr(examples, k) for k in ("label", "digest", "part")}
    arrays |= {} if examples.group is None else {"group": examples.group}
    meta = {k: getattr(examples, k) for k in ("kind", "labels", "names", "left_out", "notes")}
    parts: dict[str, Any] = {"meta.json": json.dumps(meta, ensure_ascii=True).encode()}
    for name, a in ((k, np.ascontiguousarray(a)) for k, a in arrays.items()):  # numpy's file format, the payload uncopied
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(a))
        parts[f"{name}.npy"] = [header.getvalue(), memoryview(a).cast("B") if a.size else b""]
    files.write_folder(folder, parts, "cloche store", {})


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
