"""The one durable writer of the package, the lock of a folder, and readers that check before they believe.

A write: room on the disk → a temporary sibling → every byte → fsync → read back → rename → fsync of the folder. Killed or
without power at any point, the name holds the old content or the new one, whole. kill -9 in `open(path, "wb")` tore 35 files
of 100, this recipe none; `safetensors.save_file` calls no fsync and leaves files with mode 0600.
"""

from collections.abc import Sequence
from contextlib import contextmanager, suppress
import ctypes
import errno
import hashlib
import json
import math
import os
from pathlib import Path
import re
import secrets
import shutil
import stat
import sys
import time
import zlib

import torch
from torch import Tensor

from cloche.errors import FAILED, STOPPED, UserError
from cloche.words import _, size

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Buffers = bytes | Sequence[bytes | memoryview]
MANIFEST = "manifest.json"
MOST_HEADER_BYTES, MOST_TENSORS = 4 << 20, 100_000  # safetensors spends 9 s and 1 GB on a legal 41 MB header of 700 000 tensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FRONT = b'{"__metadata__":{"header_crc32":"'  # then 8 hex digits: the crc32 of the rest of the header
_LITTER = re.compile(r"\.(.+)\.(tmp|old)-([1-9]\d{0,8})-([0-9a-f]{8})", re.DOTALL)
_busy: set[str] = set()  # the HEX of temporary names in use in this process: `sweep` leaves them alone
_held: set[int] = set()  # descriptors of the locks held


def durable_write(path: Path, data: Buffers) -> str:
    """Puts data at path at once and for good; a link is kept and its target written. Returns the sha256.

    Raises: UserError "disk-full" (75), "read-only" (2) or "write-failed" (1); what was at path before stays.
    """
    target, views = Path(os.path.realpath(path)), _views(data)
    temp = _siblings(target)[0]
    with _saving(path, temp, sum(map(len, views))):
        sha = _put(temp, views, target.stat().st_mode & 0o777 if target.exists() else None)
        os.replace(temp, target)
        _sync_folder(target.parent, path)
    return sha


def write_folder(path: Path, files: dict[str, Buffers], kind: str, facts: dict) -> None:
    """A folder of files that appears at once, its manifest with it; an older one of cloche's by that name is replaced.

    Between the two renames of a replacement the old folder is called .NAME.old-PID-HEX; `sweep` gives it its name back.
    Raises: as `durable_write`; UserError "exists" where a folder that cloche did not make is in the way.
    """
    target = Path(os.path.realpath(path))
    temp, aside = _siblings(target)
    parts = {_inside(temp, name): _views(data) for name, data in files.items()}
    if target.is_dir() and not (target / MANIFEST).exists():
        found = _("it has no {name}, so cloche did not make it").format(name=MANIFEST)
        what = _("cannot save {path}: another folder is in the way").format(path=path)
        raise UserError(what, found, _("Choose another name, or move that folder."), name="exists")
    with _saving(path, temp, sum(len(view) for views in parts.values() for view in views)):
        temp.mkdir()
        listed = {file.name: {"bytes": sum(map(len, views)), "sha256": _put(file, views)} for file, views in parts.items()}
        _put(temp / MANIFEST, [_manifest(kind, 1, listed, facts)])
        _sync_folder(temp)
        if target.is_dir():
            os.replace(target, aside)
        try:
            os.replace(temp, target)
        except BaseException:
            if aside.exists():
                os.replace(aside, target)
            raise
        _sync_folder(target.parent, path)
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, obj: object) -> str:
    """obj as JSON, one value a line; a NaN is a ValueError. Returns the sha256."""
    text = json.dumps(obj, allow_nan=False, indent=1, ensure_ascii=False)
    with suppress(UnicodeEncodeError):  # a file name that is no UTF-8 arrives as lone surrogates; \udcff comes back equal
        return durable_write(path, text.encode() + b"\n")
    return durable_write(path, json.dumps(obj, allow_nan=False, indent=1).encode() + b"\n")


def read_json(path: Path, limit_bytes: int = 16 << 20) -> object:
    """Strict JSON: no key twice, no NaN or infinity, UTF-8, at most limit_bytes. Raises: UserError "damaged"."""
    with _reading(path) as (file, length):
        if length > limit_bytes:
            raise _damaged(path, _("bytes: at most {most} allowed, {found} found"), most=limit_bytes, found=length)
        return _parse(file.read(limit_bytes), path)


def tensor_file(tensors: dict[str, Tensor], facts: dict[str, str]) -> list[bytes | memoryview]:
    """A safetensors file as buffers for `durable_write`, with the crc32 of each tensor and of the header in it.

    Buffers are views of the tensors that lie contiguous in main memory: write them before the next update.
    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    if {"crc32", "header_crc32"} & facts.keys() or not all(isinstance(value, str) for value in facts.values()):
        raise ValueError(f"facts are text under names other than crc32 and header_crc32, found {facts}")
    entries, payload, sums, at = {}, [], {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # widest first: all stay aligned
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _NAMES or name == "__metadata__":
            found = _("dtype {found}; possible are {known}").format(found=tensor.dtype, known=", ".join(DTYPES))
            raise UserError(_("cannot save the tensor {name}").format(name=name), found, code=FAILED, name="write-failed")
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at := at + view.nbytes]}
        sums[name] = zlib.crc32(view)
        payload.append(view)
    facts = {"header_crc32": "0" * 8, **facts, "crc32": json.dumps(sums, separators=(",", ":"))}
    text = json.dumps({"__metadata__": facts} | {name: entries[name] for name in tensors}, separators=(",", ":")).encode()
    if len(text) > MOST_HEADER_BYTES - 8 or len(tensors) > MOST_TENSORS:
        found = _("header: {found}, at most {most}").format(found=size(len(text)), most=size(MOST_HEADER_BYTES))
        what = _("cannot save so many tensors in one file: {n}").format(n=len(tensors))
        raise UserError(what, found, code=FAILED, name="write-failed")
    rest = text[len(_FRONT) + 8 :] + b" " * (-len(text) % 8)
    return [(len(_FRONT) + 8 + len(rest)).to_bytes(8, "little") + _FRONT + b"%08x" % zlib.crc32(rest) + rest, *payload]


def read_tensors(path: Path, foreign: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and facts of a safetensors file; all that its header claims is checked before memory is taken.

    Args:
        foreign: accept a file without checksums too, one that another program wrote.
    Raises: UserError "damaged", naming the file, the tensor, what was expected and what was found.
    """
    with _reading(path) as (file, length):
        head = file.read(8)
        n = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= n <= min(MOST_HEADER_BYTES, length - 8):
            raise _damaged(path, _("bytes: a header of {wanted} declared, the file has {found}"), wanted=n, found=length)
        header, facts, sums = _header(file.read(n), foreign, path)
        tensors: dict[str, Tensor] = dict.fromkeys(header)
        for name, dtype, shape, count in _places(header, length - 8 - n, path):
            # memory of its own, aligned as torch does: a view of the file's bytes could round differently in a kernel
            tensor = torch.empty(count, dtype=torch.uint8)
            view = memoryview(tensor.numpy())
            if file.readinto(view) != count:
                raise _damaged(path, _("tensor {tensor}: the file became shorter while it was read"), tensor=name)
            if sums is not None and (found := zlib.crc32(view)) != sums[name]:
                text = _("tensor {tensor} of {n} bytes: crc32 {wanted} expected, {found} found")
                raise _damaged(path, text, tensor=name, n=count, wanted=sums[name], found=found)
            # torch counts a bool byte of 7 as seven elements of a mask
            tensors[name] = (tensor.ne(0) if dtype == torch.bool else tensor.view(dtype)).reshape(shape)
        return tensors, facts


def _header(raw: bytes, foreign: bool, path: Path) -> tuple[dict, dict[str, str], dict | None]:
    """(entries by name, facts, crc32 by name or None) of a header whose own crc32 is right."""
    at = len(_FRONT) + 8
    if raw.startswith(_FRONT) and (found := b"%08x" % zlib.crc32(raw[at:])) != raw[at - 8 : at]:
        raise _damaged(path, _("header: crc32 {wanted} expected, {found} found"), wanted=raw[at - 8 : at], found=found)
    if not raw.startswith(b"{" if foreign else _FRONT):
        raise _damaged(path, _("no checksums: its header was changed, or another program wrote it"))
    if raw.count(b"[") + raw.count(b"{") > 4 * MOST_TENSORS:  # bounds what the parser may build
        raise _damaged(path, _("tensors: at most {most} allowed"), most=MOST_TENSORS)
    header = _parse(raw, path)
    facts = header.pop("__metadata__", {})
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise _damaged(path, _("the facts in its header are no text"))
    sums = _parse(facts.pop("crc32", "").encode("utf-8", "replace"), path) if facts.pop("header_crc32", None) else None
    if sums is not None and (not isinstance(sums, dict) or sums.keys() != header.keys()):
        raise _damaged(path, _("its checksums belong to other tensors"))
    return header, facts, sums


def _places(header: dict, room: int, path: Path) -> list[tuple[str, torch.dtype, list[int], int]]:
    """(name, dtype, shape, bytes) in the order of the file, once they fill its room bytes without hole or overlap."""
    if len(header) > MOST_TENSORS:
        raise _damaged(path, _("tensors: at most {most} allowed"), most=MOST_TENSORS)
    claims, places, at, name = [], [], 0, ""
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(end)]} if kind in DTYPES and _sane(shape):
                claims.append((start, end, name, DTYPES[kind], shape))
            case _other:
                text = _("tensor {tensor}: a known dtype, a shape and two offsets expected, {found} found")
                raise _damaged(path, text, tensor=name, found=entry)
    for start, end, name, dtype, shape in sorted(claims, key=lambda claim: claim[:2]):
        count = math.prod(shape) * dtype.itemsize
        if (start, end) != (at, at + count):
            text = _("tensor {tensor}: bytes {wanted} expected, {found} declared")
            raise _damaged(path, text, tensor=name, wanted=(at, at + count), found=(start, end))
        places.append((name, dtype, shape, count))
        at = end
    if at != room:
        text = _("bytes after the header: {wanted} expected, {found} found; tensor {tensor} should end there")
        raise _damaged(path, text, wanted=at, found=room, tensor=name)
    return places


def _sane(shape: list) -> bool:
    """At most 16 dims, and no product that leaves 64 bits, not even with a 0 in it."""
    return len(shape) <= 16 and all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and math.prod(n or 1 for n in shape) < 1 << 48


def write_manifest(folder: Path, kind: str, names: list[str], format: int = 1, facts: dict | None = None) -> None:
    """Lists the named files of folder, which are on the disk already, with size and sha256 in its manifest.json."""
    listed = {name: _measured(_inside(folder, name)) for name in names}
    durable_write(folder / MANIFEST, _manifest(kind, format, listed, facts or {}))


def check_manifest(folder: Path, kind: str, newest_format: int = 1, thorough: bool = True) -> dict:
    """The manifest of folder, once all that it lists is there as listed.

    Args:
        thorough: compare the sha256 of each file too, at about 1.8 GB/s; sizes are always compared.
    Raises: UserError "not-a-run", "wrong-kind", "newer-format" (2); "damaged" or "unsafe-name" (1), naming the file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = _("not a cloche run: no {name} in {folder}").format(name=MANIFEST, folder=folder)
        raise UserError(what, "", _("Give a folder that cloche train left."), name="not-a-run")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise _damaged(path, _("it names no format"))
    if manifest.get("kind") != kind:
        found = _("{wanted} expected, {found} found").format(wanted=kind, found=_short(manifest.get("kind")))
        raise UserError(_("a folder of another kind: {folder}").format(folder=folder), found, name="wrong-kind")
    if manifest["format"] > newest_format:
        found = _("format {found} found, this cloche knows up to {known}").format(found=_short(manifest["format"]), known=newest_format)
        raise UserError(_("made by a newer cloche: {folder}").format(folder=folder), found, _("Update cloche."), name="newer-format")
    if manifest.get("sha256") != _digest(manifest) or not isinstance(manifest.get("files"), dict):
        raise _damaged(path, _("its own sha256 does not fit: a person or the disk has changed it"))
    for name, entry in manifest["files"].items():
        for key, found in _measured(_inside(folder, name), thorough).items():
            wanted = entry.get(key) if isinstance(entry, dict) else entry
            if found != wanted:
                raise _damaged(folder / name, _("{key}: {wanted} expected, {found} found"), key=key, wanted=wanted, found=found)
    return manifest


def _measured(path: Path, thorough: bool = True) -> dict[str, object]:
    with _reading(path) as (file, length):
        return {"bytes": length} | ({"sha256": hashlib.file_digest(file, "sha256").hexdigest()} if thorough else {})


def _manifest(kind: str, format: int, listed: dict, facts: dict) -> bytes:
    manifest = {"kind": kind, "format": format, "facts": facts, "files": listed}
    return json.dumps(manifest | {"sha256": _digest(manifest)}, allow_nan=False, indent=1).encode() + b"\n"


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps({**manifest, "sha256": ""}).encode()).hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """The file of this name, if the name is plain on every system and no link leads out of folder."""
    path, strange = folder / name, {"", ".", ".."} & set(name.split("/")) or re.search(r"[\x00-\x1f\\:]", name)
    if name == MANIFEST or strange or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        what = _("a file name that leads out of {folder}").format(folder=folder)
        raise UserError(what, _short(name), _("Do not use what you do not know the origin of."), code=FAILED, name="unsafe-name")
    return path


class Lock:
    """One process at a time in a folder: `with Lock(folder): …`. The kernel frees it when the process dies; the file stays.

    Raises: UserError "in-use" (2), naming the process that came first.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.fd = Path(folder) / ".lock", -1

    def __enter__(self) -> "Lock":
        with _saving(self.path, _siblings(self.path)[0], 0):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            _held.add(self.fd)
            try:
                if sys.platform == "win32":
                    os.lseek(self.fd, 1 << 20, os.SEEK_SET)  # nobody can read a locked byte there: lock one beyond the text
                    msvcrt.locking(self.fd, msvcrt.LK_NBLCK, 1)
                    os.lseek(self.fd, 0, os.SEEK_SET)
                else:
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.__exit__()
                pid, _space, since = self.path.read_text("ascii", "replace")[:64].partition(" ")
                found, do = _("by process {pid} since {since}"), _("Wait until it ends, or choose another folder with --out.")
                what = _("in use: {folder}").format(folder=self.path.parent)
                raise UserError(what, found.format(pid=pid, since=since), do, name="in-use") from None
            os.ftruncate(self.fd, 0)
            os.write(self.fd, f"{os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        return self

    def __exit__(self, *exc: object) -> None:
        if self.fd in _held:
            _held.discard(self.fd)
            os.close(self.fd)


if hasattr(os, "register_at_fork"):  # orphaned data workers of a killed run would go on holding its lock
    os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _fd in tuple(_held)])


def sweep(folder: Path) -> int:
    """Deletes what writers of ours that were killed left in folder, and undoes half a replacement; returns how many.

    Call it under the folder's Lock: it cannot see whether a process of another machine lives.
    """
    count = 0
    for path in list(Path(folder).iterdir()):
        found = _LITTER.fullmatch(path.name)
        if found and found[4] not in _busy and (int(found[3]) == os.getpid() or not _alive(int(found[3]))):
            with suppress(OSError):
                if found[2] == "old" and not os.path.lexists(path.with_name(found[1])):
                    os.replace(path, path.with_name(found[1]))
                else:
                    _remove(path)
                count += 1
    return count


def cache_folder() -> Path:
    """Where this person's stores lie; CLOCHE_CACHE names another place. Not created here."""
    if own := os.environ.get("CLOCHE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cloche"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cloche" / "cache"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "cloche"  # the XDG rules: ignore a relative one


@contextmanager
def _saving(path: Path, temp: Path, count: int):
    """Room for count bytes first; whatever happens then, no temp stays and an OSError becomes a UserError."""
    needed = int(1.2 * count) + (1 << 16)
    _busy.add(temp.name[-8:])
    try:
        usage = shutil.disk_usage(temp.parent)
        if usage.free < needed and usage.total:  # some network file systems say 0 of 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        raise _fault(error, path, temp.parent, needed) from error
    finally:
        with suppress(OSError):
            _remove(temp)
        _busy.discard(temp.name[-8:])


def _fault(error: OSError, path: Path, folder: Path, needed: int) -> UserError:
    found = _("what was there before is kept") if os.path.lexists(path) else _("nothing was written")
    full = {errno.ENOSPC: _("cannot save {path}: the disk is full"), errno.EDQUOT: _("cannot save {path}: your quota is used up"),
            errno.EFBIG: _("cannot save {path}: no file may be that large here (ulimit -f)")}  # fmt: skip
    if error.errno in full:
        free = size(shutil.disk_usage(folder).free)
        found = _("{needed} needed, {free} free; {kept}").format(needed=size(needed), free=free, kept=found)
        do = _("Free space, then type the same command again.")
        return UserError(full[error.errno].format(path=path), found, do, code=STOPPED, name="disk-full")
    what = _("cannot write {path}: {reason}").format(path=path, reason=error.strerror or error)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(what, found, _("Make its folder writable, or choose another with --out."), name="read-only")
    return UserError(what, found, _("Look at the disk, then type the same command again."), code=FAILED, name="write-failed")


def _put(path: Path, views: Sequence[memoryview | bytes], mode: int | None = None) -> str:
    """A new file with this content, on the disk and read back; returns the sha256."""
    sha = hashlib.sha256()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666 if mode is None else mode)
    try:
        if mode is not None:
            os.chmod(path, mode)  # the umask may have taken bits of it
        for view in map(memoryview, views):
            sha.update(view)
            while view:
                view = view[os.write(fd, view[: 1 << 30]) :]
        os.fsync(fd)  # never twice on one descriptor: after a failure the kernel calls the lost pages clean
    finally:
        os.close(fd)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha.hexdigest():
            raise OSError(errno.EIO, _("what was read back differs from what was written"))
    return sha.hexdigest()


def _sync_folder(folder: Path, placed: Path | None = None) -> None:
    """Makes the names in folder last; an error says that placed has its name already."""
    if os.name == "nt":  # no folder can be opened there
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            return
        if placed is None:
            raise
        what = _("{path} is in place, but may not survive a power loss").format(path=placed)
        found = _("fsync of {folder}: {reason}").format(folder=folder, reason=error.strerror)
        raise UserError(what, found, _("Look at the disk, then type the same command again."), code=FAILED, name="write-failed") from error
    finally:
        os.close(fd)


def _siblings(target: Path) -> tuple[Path, Path]:
    """Names beside target for what is new and for what it replaces; the first is cut, as names end at 255 bytes."""
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name[:40]}.tmp-{mark}"), target.with_name(f".{target.name}.old-{mark}")


def _views(data: Buffers) -> list[memoryview]:
    views = map(memoryview, [data] if isinstance(data, bytes) else data)
    return [view.cast("B") for view in views if view.nbytes]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill(pid, 0) would send Ctrl-C there; 0x1000 asks for no more than to look
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        return bool(handle and ctypes.windll.kernel32.CloseHandle(handle))
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


@contextmanager
def _reading(path: Path):
    """A plain file, opened, and its length; an OSError becomes a UserError that names the file."""
    patient = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for a writer
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | patient)) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise OSError(errno.EINVAL, _("not a plain file"))
            yield file, state.st_size
    except OSError as error:
        raise UserError(_("cannot read {path}").format(path=path), error.strerror or str(error), code=FAILED, name="damaged") from error


def _damaged(path: Path, found: str, **values: object) -> UserError:
    found = found.format(**{key: _short(value) for key, value in values.items()})
    do = _("Put a copy of it back, or delete it and type the command that made it again.")
    return UserError(_("damaged: {path}").format(path=path), found, do, code=FAILED, name="damaged")


def _short(value: object) -> str:
    """Something from a file, safe to show: control characters escaped, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _parse(raw: bytes, path: Path) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict:
        found, seen = dict(pairs), set()
        if len(found) < len(pairs):
            twice = next(key for key, _value in pairs if key in seen or seen.add(key))
            raise ValueError(_("the key {key} is there twice").format(key=_short(twice)))
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(_("no finite number: {text}").format(text=_short(text)))
        return value

    try:
        return json.loads(raw.decode(), object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except UnicodeDecodeError as error:
        raise _damaged(path, _("no UTF-8 at byte {offset}"), offset=error.start) from None
    except RecursionError:
        raise _damaged(path, _("nested too deep")) from None
    except ValueError as error:
        raise _damaged(path, str(error).replace("{", "{{").replace("}", "}}")) from None
