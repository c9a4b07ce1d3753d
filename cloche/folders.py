"""Folders made and removed, and files appended to, as durably as `files` writes: the same crash, nothing lost, nothing half."""

import os
from pathlib import Path

from cloche import files


def make_folder(path: Path) -> None:
    """path and the folders above it, each with its name on the disk: a file in a folder that a power loss takes is lost with it."""
    if not path.exists():
        make_folder(path.parent)
        with files._saving(path, 0) as (target, _temp, _aside):
            target.mkdir(exist_ok=True)


def remove_folder(path: Path) -> None:
    """path goes at once: half deleted, it has a temporary name. Raises OSError where it may not go."""
    temp = path.with_name(f".{path.name[:40]}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    os.replace(path, temp)
    files._sync_folder(path.parent)
    files._clear(temp)


def sync(path: Path) -> None:
    """What was appended to path, created where it is not there, and its name are on the disk."""
    with files._saving(path, 0) as (target, _temp, _aside), open(target, "ab") as file:
        os.fsync(file.fileno())
