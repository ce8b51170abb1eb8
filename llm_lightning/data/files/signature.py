"""What tells, without reading, whether files are as they were: path, size, time of change and inode."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SETTLED = 2.0
"""Seconds. A file may change again within the resolution of its time (2 s on FAT) and look as before."""


def signature_of(files: Sequence[Path]) -> list[list[Any]]:
    """[path, bytes, mtime_ns, inode] of each file; of a folder, of all its files. Plain values, as JSON keeps them.

    Take it before the files are read and compare it with another one after: what changed meanwhile is not what was
    read.
    """
    return [_of(file) for entry in files for file in _files_in(entry)]


def is_settled(signature: list[list[Any]], now: float | None = None) -> bool:
    """Whether all files changed so long ago that their times can be trusted; else a signature is not worth keeping.

    Args:
        now: seconds since the epoch, before the files are read; None: the present.
    """
    latest = 1e9 * ((time.time() if now is None else now) - SETTLED)
    return all(changed < latest for _, _, changed, _ in signature)


def _files_in(entry: Path) -> Iterator[Path]:
    return iter(sorted(file for file in entry.rglob("*") if file.is_file())) if entry.is_dir() else iter([entry])


def _of(file: Path) -> list[Any]:
    state = file.stat()
    return [str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]
