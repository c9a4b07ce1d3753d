"""The one durable writer of the package, the lock of a folder, and readers that check before they believe.

A write: room on the disk → a temporary sibling → every byte → fsync → read back → rename → fsync of the folder. Killed or
without power at any point, the name holds the old content or the new one, whole: kill -9 in `open(path, "wb")` tore 35 files
of 100, this recipe none. Faults are UserErrors: disk-full (75); read-only, in-use, not-a-run, wrong-kind, newer-format (2);
write-failed, unsafe-name, and damaged, which names the file, the tensor, what was expected and what was found (1).
"""

from collections.abc import Sequence
from contextlib import contextmanager, suppress
import errno
import hashlib
import json
import math
import os
from pathlib import Path
import re
import shutil
import sys
import time
import zlib

import torch

from cloche.errors import FAILED, STOPPED, UserError
from cloche.words import _, size

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

    os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _fd in tuple(_held)])  # else orphans would hold them on

Buffers = bytes | Sequence[bytes | memoryview]
MANIFEST = "manifest.json"
MOST_TEXT_BYTES, MOST_MANIFEST_BYTES = 16 << 20, 1 << 20
MOST_HEADER_BYTES, MOST_TENSORS = 4 << 20, 100_000  # safetensors spends 9 s and 1 GB on a legal 41 MB header of 700 000 tensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FRONT = b'{"__metadata__":{"header_crc32":"'
_REST = len(_FRONT) + 8  # 8 hex digits: the crc32 of the header behind them
_LITTER = re.compile(r"\.(.+)\.(tmp|old)-([1-9]\d{0,8}-[0-9a-f]{8})", re.DOTALL)
_busy: set[str] = set()  # the PID-HEX of temporary names in use in this process: `sweep` leaves them alone
_held: set[int] = set()  # descriptors of the locks held


def durable_write(path: Path, data: Buffers) -> str:
    """Puts data at path at once and for good, or keeps what was there; of a link, the target is written. Returns the sha256."""
    views = _views(data)
    with _saving(path, sum(map(len, views))) as (target, temp, _aside):
        sha = _put(temp, views, target.stat().st_mode & 0o777 if target.exists() else None)
        os.replace(temp, target)
    return sha


def write_folder(path: Path, files: dict[str, Buffers], kind: str, facts: dict) -> None:
    """A folder of files that appears at once, its manifest with it; only an empty one or one with a manifest is replaced."""
    parts = {name: _views(data) for name, data in files.items()}
    with _saving(path, sum(len(view) for views in parts.values() for view in views)) as (target, temp, aside):
        temp.mkdir()
        listed = {name: {"bytes": sum(map(len, views)), "sha256": _put(inside(temp, name), views)} for name, views in parts.items()}
        _put(temp / MANIFEST, [_manifest(kind, 1, listed, facts)])
        _sync_folder(temp)
        if (target / MANIFEST).exists():
            os.replace(target, aside)  # killed here, the old one gets its name back by `sweep`
        os.replace(temp, target)


def write_json(path: Path, obj: object) -> str:
    """obj as JSON, one value a line; a NaN is a ValueError. Returns the sha256."""
    text = json.dumps(obj, allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    return durable_write(path, text.encode(errors="backslashreplace"))  # lone surrogates, of a file name that is no UTF-8


def read_json(path: Path, limit_bytes: int = MOST_TEXT_BYTES) -> object:
    """Strict JSON: no key twice, no NaN or infinity, UTF-8, at most limit_bytes. Raises: UserError "damaged"."""
    return _parse(read_bytes(path, limit_bytes), path)


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """A plain file of at most limit_bytes. Raises: UserError "damaged"."""
    with _reading(path, limit_bytes) as (file, _length):
        return file.read(limit_bytes)


def tensor_file(tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> list[bytes | memoryview]:
    """A safetensors file (huggingface.co/docs/safetensors, "Format") with the crc32 of each tensor and of the header in it.

    Returns buffers, views of the tensors that lie contiguous in main memory: write them before the next update.
    """
    if {"crc32", "header_crc32"} & facts.keys() or not all(isinstance(value, str) for value in facts.values()):
        raise ValueError(f"facts are text under names other than crc32 and header_crc32, found {facts}")
    entries, payload, sums, at = {}, [], {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # widest first: all stay aligned
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _NAMES or name == "__metadata__":
            found = _("dtype {found}; possible are {known}").format(found=tensor.dtype, known=", ".join(DTYPES))
            raise UserError(_("cannot save the tensor {name}").format(name=name), found, code=FAILED, name="write-failed")
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at := at + len(view)]}
        sums[name] = zlib.crc32(view)
        payload.append(view)
    facts = {"header_crc32": "0" * 8, **facts, "crc32": json.dumps(sums, separators=(",", ":"))}
    text = json.dumps({"__metadata__": facts} | {name: entries[name] for name in tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER_BYTES or len(tensors) > MOST_TENSORS:
        raise ValueError(f"too many tensors for one file: {len(tensors)}, header of {len(text)} bytes")
    return [len(text).to_bytes(8, "little") + _FRONT + b"%08x" % zlib.crc32(text[_REST:]) + text[_REST:], *payload]


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and facts of a file made by `tensor_file`; all that its header claims is checked before memory is taken."""
    with _reading(path) as (file, length):
        n = int.from_bytes(file.read(8), "little")
        if not _REST <= n <= min(MOST_HEADER_BYTES, length - 8):
            raise damaged(path, _("bytes: a header of {wanted} declared, the file has {found}"), length, n)
        entries, sums, facts = _header(file.read(n), path)
        tensors: dict[str, torch.Tensor] = dict.fromkeys(entries)
        for name, dtype, shape, count in _places(entries, length - 8 - n, path):
            # memory of its own, aligned as torch does: a view of the file's bytes could round differently in a kernel
            tensor = torch.empty(count, dtype=torch.uint8)
            if file.readinto(view := memoryview(tensor.numpy())) != count or zlib.crc32(view) != sums[name]:
                raise damaged(path, _("tensor {tensor}: crc32 {wanted} expected, {found} found"), zlib.crc32(view), sums[name], name)
            # torch counts a bool byte of 7 as seven elements of a mask
            tensors[name] = (tensor.ne(0) if dtype == torch.bool else tensor.view(dtype)).reshape(shape)
        return tensors, facts


def _header(raw: bytes, path: Path) -> tuple[dict, dict, dict[str, str]]:
    """(entry, crc32, both by tensor; facts) of a header whose own crc32 is right."""
    wanted, found = raw[len(_FRONT) : _REST], b"%08x" % zlib.crc32(raw[_REST:])
    if not raw.startswith(_FRONT) or found != wanted:
        raise damaged(path, _("header: crc32 {wanted} expected, {found} found"), found, wanted)
    if raw.count(b"{") > MOST_TENSORS + 9 or raw.count(b"[") > 2 * MOST_TENSORS:  # bounds what the parser may build
        raise damaged(path, _("tensors: at most {wanted} allowed"), wanted=MOST_TENSORS)
    entries = _parse(raw, path)
    match entries.pop("__metadata__"):
        case {"header_crc32": str(), "crc32": str(text), **facts} if all(isinstance(value, str) for value in facts.values()):
            sums = _parse(text.encode(errors="replace"), path)
            if isinstance(sums, dict) and sums.keys() == entries.keys():
                return entries, sums, facts
    raise damaged(path, _("its checksums and facts are not those of its tensors"))


def _places(entries: dict, room: int, path: Path) -> list[tuple[str, torch.dtype, list[int], int]]:
    """(name, dtype, shape, bytes) in the order of the file, once they fill its room bytes without hole or overlap."""
    claims, places, at, name = [], [], 0, ""
    for name, entry in entries.items():
        match entry:  # at most 16 dims, and no product that leaves 64 bits, not even with a 0 in it
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
                kind in DTYPES and len(shape) <= 16 and all(type(n) is int and n >= 0 for n in shape)
                and math.prod(n or 1 for n in shape) < 1 << 48
            ):  # fmt: skip
                claims.append((start, end, name, DTYPES[kind], shape))
            case _other:
                raise damaged(path, _("tensor {tensor}: a dtype, a shape and two offsets expected, {found} found"), entry, tensor=name)
    for start, end, name, dtype, shape in sorted(claims, key=lambda claim: claim[:2]):
        count = math.prod(shape) * dtype.itemsize
        if (start, end) != (at, at + count):
            raise damaged(path, _("tensor {tensor}: bytes {wanted} expected, {found} declared"), (start, end), (at, at + count), name)
        places.append((name, dtype, shape, count))
        at = end
    if at != room:
        raise damaged(path, _("bytes of tensors: {wanted} expected up to {tensor}, {found} found"), room, at, name)
    return places


def write_manifest(folder: Path, kind: str, names: list[str], format: int = 1, facts: dict | None = None) -> None:
    """Lists the named files of folder, which are on the disk already, with size and sha256 in its manifest.json."""
    listed = {name: _measured(inside(folder, name)) for name in names}
    durable_write(folder / MANIFEST, _manifest(kind, format, listed, facts or {}))


def check_manifest(folder: Path, kind: str, newest_format: int = 1, thorough: bool = True, names: Sequence[str] = ()) -> dict:
    """The manifest of folder, once all that it lists is there as listed; thorough compares hashes too (1.8 GB/s), not sizes only.

    names: what it has to list, and nothing else: who made the folder must not choose how much is read."""
    path = folder / MANIFEST
    if not path.is_file():
        what = _("not a cloche run: no {name} in {folder}").format(name=MANIFEST, folder=folder)
        raise UserError(what, "", _("Give a folder that cloche train left."), name="not-a-run")
    manifest = read_json(path, MOST_MANIFEST_BYTES)
    found, version, files, facts = (isinstance(manifest, dict) and manifest.get(key) for key in ("kind", "format", "files", "facts"))
    if found != kind:
        found = _("{wanted} expected, {found} found").format(wanted=kind, found=f"{found!r:.80}")
        raise UserError(_("a folder of another kind: {folder}").format(folder=folder), found, name="wrong-kind")
    if type(version) is int and version > newest_format:
        found = _("format {found} found, this cloche knows up to {known}").format(found=f"{version!r:.80}", known=newest_format)
        raise UserError(_("made by a newer cloche: {folder}").format(folder=folder), found, _("Update cloche."), name="newer-format")
    sound = isinstance(files, dict) and type(version) is int and version > 0
    if not sound or manifest != json.loads(_manifest(kind, version, files, facts)):
        raise damaged(path, _("its own sha256 does not fit: a person or the disk has changed it"))
    if names and files.keys() != set(names):
        raise damaged(path, _("{wanted} expected, {found} found"), sorted(files), sorted(names))
    for name, entry in files.items():
        for key, found in _measured(inside(folder, name), thorough).items():
            if (wanted := entry.get(key) if isinstance(entry, dict) else entry) != found:
                raise damaged(folder / name, key + _(": {wanted} expected, {found} found"), found, wanted)
    return manifest


def _manifest(kind: str, format: int, listed: dict, facts: dict) -> bytes:
    text = json.dumps({"kind": kind, "format": format, "facts": facts, "files": listed}, allow_nan=False)
    return json.dumps(json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode() + b"\n"


def _measured(path: Path, thorough: bool = True) -> dict[str, object]:
    with _reading(path, MOST_TEXT_BYTES if path.suffix in (".json", ".toml") else 1 << 62) as (file, length):
        return {"bytes": length} | ({"sha256": hashlib.file_digest(file, "sha256").hexdigest()} if thorough else {})


def inside(folder: Path, name: str, manifest: bool = False) -> Path:
    """The file of this name, if the name is plain on every system and no link leads out of folder."""
    path, strange = folder / name, {"", ".", ".."} & set(name.split("/")) or re.search(r"[\x00-\x1f\\:]", name)
    if (name == MANIFEST and not manifest) or strange or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        what, do = _("unsafe file name in {folder}").format(folder=folder), _("Do not use what you do not know the origin of.")
        raise UserError(what, f"{name!r:.80}", do, code=FAILED, name="unsafe-name")
    return path


class Lock:
    """One process at a time in a folder, else UserError "in-use". The kernel frees it when the process dies; the file stays."""

    def __init__(self, folder: Path) -> None:
        self.path, self.fd = Path(folder) / ".lock", -1

    def __enter__(self) -> "Lock":
        with _saving(self.path, 0):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            _held.add(self.fd)
            try:
                if sys.platform == "win32":  # nobody can read a locked byte there: lock one beyond the text
                    os.lseek(self.fd, 1 << 20, os.SEEK_SET)
                    msvcrt.locking(self.fd, msvcrt.LK_NBLCK, 1)
                    os.lseek(self.fd, 0, os.SEEK_SET)
                else:
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self.fd, 0)
                os.write(self.fd, f"{os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
            except (BlockingIOError, PermissionError):
                self.__exit__()
                pid, _space, since = self.path.read_text("ascii", "replace")[:64].partition(" ")
                found, do = _("by process {pid} since {since}"), _("Wait until it ends, or choose another folder with --out.")
                found = found.format(pid=pid, since=since)
                raise UserError(_("in use: {folder}").format(folder=self.path.parent), found, do, name="in-use") from None
        return self

    def __exit__(self, *exc: object) -> None:
        if self.fd in _held:
            _held.discard(self.fd)
            os.close(self.fd)


def sweep(folder: Path) -> int:
    """Clears what killed writers of ours left in folder, returns how many. Under its Lock: other machines' pids are not seen."""
    count = 0
    for path in list(Path(folder).iterdir()):
        found = _LITTER.fullmatch(path.name)
        if found and found[3] not in _busy and (found[3].startswith(f"{os.getpid()}-") or not _alive(int(found[3].split("-")[0]))):
            _clear(path)
            count += not os.path.lexists(path)
    return count


def _clear(litter: Path) -> None:
    """Deletes a temporary name; an old folder gets its name back if nothing else has it."""
    name, kind, _mark = _LITTER.fullmatch(litter.name).groups()
    with suppress(OSError):
        if kind == "old" and not os.path.lexists(litter.with_name(name)):
            os.replace(litter, litter.with_name(name))
        elif litter.is_dir() and not litter.is_symlink():
            shutil.rmtree(litter)
        else:
            litter.unlink()


def _alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill(pid, 0) would send Ctrl-C there; an open file cannot be deleted there anyway
        return False
    try:
        return os.kill(pid, 0) is None
    except OSError as error:
        return error.errno != errno.ESRCH


@contextmanager
def _saving(path: Path, count: int):
    """Yields (target, temp, aside) once there is room for count bytes; temp never stays, and an OSError becomes a UserError."""
    target, mark, placed = Path(os.path.realpath(path)), f"{os.getpid()}-{os.urandom(4).hex()}", False
    temp, aside = target.with_name(f".{target.name[:40]}.tmp-{mark}"), target.with_name(f".{target.name}.old-{mark}")
    needed = int(1.2 * count) + (64 << 10)
    _busy.add(mark)
    try:
        usage = shutil.disk_usage(target.parent)
        if usage.free < needed and usage.total:  # some network file systems say 0 of 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield target, temp, aside
        placed = True
        _sync_folder(target.parent)
    except OSError as error:
        raise _fault(error, path, needed, placed) from error
    finally:
        _clear(temp)
        _clear(aside)
        _busy.discard(mark)


def _fault(error: OSError, path: Path, needed: int, placed: bool) -> UserError:
    reason, do = error.strerror or str(error), _("Look at the disk, then type the same command again.")
    if placed:
        what = _("in place, but may not survive a power loss: {path}").format(path=path)
        return UserError(what, reason, do, code=FAILED, name="write-failed")
    kept = _("what was there before is kept") if os.path.lexists(path) else _("nothing was written")
    full = {errno.ENOSPC: _("cannot save {path}: the disk is full"), errno.EDQUOT: _("cannot save {path}: your quota is used up"),
            errno.EFBIG: _("cannot save {path}: no file may be that large here (ulimit -f)")}  # fmt: skip
    if error.errno in full:
        free, do = size(shutil.disk_usage(Path(os.path.realpath(path)).parent).free), _("Free space, then type the same command again.")
        found = _("{needed} needed, {free} free; {kept}").format(needed=size(needed), free=free, kept=kept)
        return UserError(full[error.errno].format(path=path), found, do, code=STOPPED, name="disk-full")
    what = _("cannot write {path}: {reason}").format(path=path, reason=reason)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(what, kept, _("Make its folder writable, or choose another with --out."), name="read-only")
    return UserError(what, kept, do, code=FAILED, name="write-failed")


def _put(path: Path, views: Sequence[memoryview | bytes], mode: int | None = None) -> str:
    """A new file with this content, on the disk and read back; returns the sha256."""
    sha = hashlib.sha256()
    with open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else mode)) as file:
        if mode is not None:
            os.chmod(path, mode)  # the umask may have taken bits of it
        for view in map(memoryview, views):
            sha.update(view)
            while view:
                view = view[os.write(file.fileno(), view) :]
        os.fsync(file.fileno())  # never twice on one descriptor: after a failure the kernel calls the lost pages clean
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha.hexdigest():
            raise OSError(errno.EIO, _("what was read back differs from what was written"))
    return sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # no folder can be opened there
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            raise
    finally:
        os.close(fd)


def _views(data: Buffers) -> list[memoryview]:
    return [view.cast("B") for view in map(memoryview, [data] if isinstance(data, bytes) else data) if view.nbytes]


@contextmanager
def _reading(path: Path, limit_bytes: int = 1 << 62):
    """A plain file, opened, and its length; an OSError becomes a UserError that names the file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would wait for a writer
            raise OSError(errno.EINVAL, _("not a plain file"))
        with open(path, "rb") as file:
            if (length := os.fstat(file.fileno()).st_size) > limit_bytes:
                raise damaged(path, _("bytes: at most {wanted} allowed, {found} found"), length, limit_bytes)
            yield file, length
    except OSError as error:
        raise UserError(_("cannot read {path}").format(path=path), error.strerror or str(error), code=FAILED, name="damaged") from error


def damaged(path: Path, text: str, found: object = "", wanted: object = "", tensor: object = "") -> UserError:
    found = text.format(found=f"{found!r:.80}", wanted=f"{wanted!r:.80}", tensor=f"{tensor!r:.80}")  # no control characters
    do = _("Put a copy of it back, or delete it and type the command that made it again.")
    return UserError(_("damaged: {path}").format(path=path), found, do, code=FAILED, name="damaged")


def _parse(raw: bytes, path: Path) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict:
        found, seen = dict(pairs), set()
        if len(found) < len(pairs):
            raise ValueError(_("twice the key {key}").format(key=next(key for key, _value in pairs if key in seen or seen.add(key))))
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(_("no finite number: {text}").format(text=text))
        return value

    try:
        return json.loads(raw.decode(), object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise damaged(path, _("nested too deep")) from None
    except ValueError as error:  # what is no UTF-8 is one too; both name the place
        raise damaged(path, _("no JSON: {found}"), str(error)) from None
