"""What a power loss may leave on a disk, worked out from the system calls of the real writer.

A killed process loses nothing that it wrote, so no kill finds a missing fsync. This does. `trace` runs a command under
strace and reads what it did to the files below a folder; `explore` walks these operations, takes the power away after
each, and hands every disk that could be left then to a check.

The model. A file keeps what it held at its last fsync and, of what was written since, nothing, half or all. A folder keeps
what was in it at its last fsync and ANY PREFIX of the creations, renames and removals since, in their order. Files and
folders are independent of one another: of all these choices every combination is a disk (those alike count once). Two
operations in the same folder are never swapped, and blocks of a file are never written in another order than the calls.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
import os
from pathlib import Path
import re
import shutil
import subprocess

from cloche import files

CALLS = "openat,write,writev,truncate,ftruncate,fsync,fdatasync,mkdir,mkdirat,rmdir,rename,renameat,renameat2,unlink,unlinkat,pwrite64"
HEX = r"(?:\\x[0-9a-f]{2})*"
TOKEN = re.compile(rf'<({HEX})>|"({HEX})"')
LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (\d+)(.*)", re.DOTALL)
MOST = 20_000  # disks after one operation; more would mean that something is never synced

Operation = tuple[str, ...]  # ("write", path, bytes), ("rename", path, path), ("sync", path), ("ack", text), …
Tree = dict[str, "bytes | Tree"]


def trace(command: list[str], root: Path, log: Path, code: int = 0, **environment: str) -> list[Operation]:
    """The operations of a command below root. What it writes into root/acks is no file: each line says what it has acknowledged."""
    strace = ["strace", "-f", "-y", "-xx", "-s", str(1 << 26), "--seccomp-bpf", "-e", f"trace={CALLS}", "-o", str(log)]
    done = subprocess.run(strace + command, env=os.environ | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    return list(read(log, str(root)))


def read(log: Path, root: str) -> Iterator[Operation]:
    """What strace wrote down, as operations below root."""
    below, begun = "".join(f"\\x{byte:02x}" for byte in os.fsencode(root)), {}
    with open(log, encoding="ascii") as lines:
        for line in lines:
            pid = line.split(" ", 1)[0]
            if line.endswith("<unfinished ...>\n"):
                begun[pid] = line.removesuffix("<unfinished ...>\n")
                continue
            if resumed := re.match(r"\d+ +<\.\.\. \w+ resumed>", line):
                line = begun.pop(pid) + line[resumed.end() :]
            if below in line and (parts := LINE.match(line)):  # a call that failed, with = -1, did nothing
                yield from _operation(parts[2], parts[3], int(parts[4]), root)


def _operation(call: str, text: str, result: int, root: str) -> Iterator[Operation]:
    tokens = [(where is not None and bool(where), bytes.fromhex((where or word).replace("\\x", ""))) for where, word in TOKEN.findall(text)]
    if call in ("write", "writev", "fsync", "fdatasync", "ftruncate"):  # of a descriptor, whose path strace tells
        path = os.fsdecode(tokens[0][1])
        data = b"".join(word for _is_place, word in tokens[1:])[:result]
        if path == f"{root}/acks":
            yield from (("ack", line) for line in data.decode().splitlines())
        elif path == root or path.startswith(f"{root}/"):
            if call == "ftruncate":
                yield ("truncate", path, int(text.rpartition(",")[2]))
            else:
                yield ("write", path, data) if call[0] == "w" else ("sync", path)
        return
    paths, base = [], ""
    for is_place, word in tokens:
        if is_place:
            base = os.fsdecode(word)
        else:
            paths.append(os.path.join(base, os.fsdecode(word)))
    if not paths[-1].startswith(f"{root}/") or paths[-1] == f"{root}/acks":
        return
    kind = call.rstrip("2").removesuffix("at")
    if kind == "open":
        if "O_CREAT" in text:
            yield ("create", paths[0])
        if "O_TRUNC" in text:
            yield ("truncate", paths[0], 0)
    elif kind == "truncate":
        yield ("truncate", paths[0], int(text.rpartition(",")[2]))
    else:
        yield ({"unlink": "remove", "rmdir": "remove", "rename": "rename", "mkdir": "mkdir"}[kind], *paths)


# The disk.


@dataclass
class File:
    durable: bytes = b""
    pending: list[bytes | int] = field(default_factory=list)  # bytes written at the end, or the length it was cut to

    def upto(self, count: float) -> bytes:
        """With `count` of the pending operations done; of the one after them that part that the fraction says."""
        data = self.durable
        for i, change in enumerate(self.pending[: int(count + 0.5)]):
            part = change[: len(change) // 2] if isinstance(change, bytes) and i + 1 > count else change
            data = data + part if isinstance(part, bytes) else data[:part].ljust(part, b"\0")
        return data

    def now(self) -> bytes:
        return self.upto(len(self.pending))

    def disks(self) -> list[bytes]:
        n = len(self.pending)
        return list(dict.fromkeys(self.upto(count) for count in (0, n // 2 + 0.5 if n % 2 else n / 2, n)))


@dataclass
class Folder:
    durable: dict = field(default_factory=dict)  # name → File or Folder
    pending: list[dict] = field(default_factory=list)  # all names after each operation since

    def names(self) -> dict:
        return self.pending[-1] if self.pending else self.durable

    def now(self) -> Tree:
        return {name: node.now() for name, node in self.names().items()}

    def disks(self) -> list[tuple]:
        """Every content that a crash may leave, as sorted (name, content) pairs."""
        found = {}
        for names in [self.durable, *self.pending]:
            kept = sorted(names)
            found |= {tuple(zip(kept, contents, strict=True)): None for contents in product(*(names[name].disks() for name in kept))}
            assert len(found) <= MOST, f"more than {MOST} disks: {kept}"
        return list(found)


class Disk:
    def __init__(self, root: str) -> None:
        self.root, self.top = root, Folder()
        self.versions: dict[str, list[bytes | Tree]] = {}  # what was renamed to a name, each time whole
        self.acked: dict[str, int] = {}  # name → how many of its versions were acknowledged

    def _at(self, path: str) -> tuple[Folder, str]:
        *folders, name = os.path.relpath(path, self.root).split("/")
        folder = self.top
        for part in folders:
            folder = folder.names()[part]
        return folder, name

    def do(self, kind: str, *given) -> None:
        if kind == "ack":
            what, _space, path = given[0].partition(" ")
            if what == "wrote":
                self.acked[path] = len(self.versions[path])
            return
        folder, name = self._at(given[0])
        names = dict(folder.names())
        node = self.top if name == "." else names.get(name)
        if kind == "sync":
            node.durable, node.pending = (node.now() if isinstance(node, File) else node.names()), []
            return
        if kind in ("write", "truncate"):
            node.pending.append(given[1])
            return
        if kind == "rename":
            into, new = self._at(given[1])
            assert into is folder, "the explorer knows renames within a folder only"
            names[new] = names.pop(name)
            self.versions.setdefault(os.path.relpath(given[1], self.root), []).append(names[new].now())
        elif kind == "remove":
            del names[name]
        elif name not in names:
            names[name] = Folder() if kind == "mkdir" else File()
        else:
            return  # opened to be created, and was there
        folder.pending.append(names)


@dataclass
class Found:
    operations: int = 0
    states: int = 0
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def explore(
    operations: list[Operation],
    root: Path,
    place: Path,
    more: Callable = lambda disk, acks: ([], []),
    passing: str = "",
    enough: int = 10**9,
) -> Found:
    """Every disk that a crash may leave, built at place, swept as at a start, and looked at.

    Torn: what stands under a name to which something whole was renamed is none of these; lost: it is older than what was
    acknowledged, or gone (names that match `passing` may go: `more` knows why). more(place, acknowledged so far) finds the rest.
    Ends early once `enough` was found.
    """
    disk, found, acks, seen = Disk(str(root)), Found(operations=len(operations)), [], set()
    for i, operation in enumerate([("ack", "begun"), *operations]):
        disk.do(*operation)
        if operation[0] == "ack":
            acks.append(operation[1])
        for state in disk.top.disks() if len(found.torn) + len(found.lost) < enough else ():
            if (key := (hash(state), len(acks))) in seen:
                continue
            seen.add(key)
            found.states += 1
            _build(place, state)
            for folder in [place, *(p for p in place.rglob("*") if p.is_dir() and not files._LITTER.search(str(p)))]:
                files.sweep(folder)
            when = f"after {i} of {len(operations)} ({' '.join(map(str, operation[:2]))[:200]}): "
            for path, versions in disk.versions.items():
                if files._LITTER.search(path):
                    continue
                here, wanted = _content(place / path), versions[disk.acked.get(path, 0) - 1 :] if path in disk.acked else versions
                if here is not None and here not in versions:
                    found.torn.append(when + path)
                elif path in disk.acked and here not in wanted and not (passing and re.search(passing, path)):
                    found.lost.append(when + path)
            for all_, mine in zip((found.torn, found.lost), more(place, acks), strict=True):
                all_ += [when + fault for fault in mine]
    return found


def _build(place: Path, state: tuple) -> None:
    place.mkdir(exist_ok=True)
    wanted = dict(state)
    for path in place.iterdir():
        if path.name not in wanted or path.is_dir() != isinstance(wanted[path.name], tuple):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in state:
        if isinstance(content, tuple):
            _build(place / name, content)
        elif not (place / name).exists() or (place / name).read_bytes() != content:  # most are as they were
            (place / name).write_bytes(content)


def _content(path: Path) -> bytes | Tree | None:
    if path.is_dir():
        return {p.name: _content(p) for p in path.iterdir()}
    return path.read_bytes() if path.exists() else None
