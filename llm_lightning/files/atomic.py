"""Write files completely or not at all; lock and hash them. Imports nothing heavy: entry points import it first."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add `path` to an OSError of the block: a failed write does not name its file.

    An error without an errno comes from our code and is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file at `path`: whenever the process dies, the file has its old content or the new one, complete.

    The temporary file is beside the target, so the rename never crosses file systems. Its name is `.NAME.PID.tmp`, so
    the next owner of the folder can recognise and remove a stray one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        with naming(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def cache_dir() -> Path:
    """Return the folder for everything that can be downloaded or computed again."""
    return Path(os.environ.get("LLM_LIGHTNING_CACHE") or Path.home() / ".cache" / "llm_lightning").expanduser()


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file; reads it in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` (`<target>.lock`); a process that dies releases it."""
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that is making %s", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def commit(finished: Path, target: Path) -> None:
    """Rename a flushed file or folder into place, and flush the parent folder: the rename then survives a power cut."""
    finished.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_figure(path: str | Path, figure: Figure) -> bytes:
    """Write a figure in the format of the file's suffix; PNG if there is none. Return the content."""
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png", dpi=120)
    content = image.getvalue()
    write_atomically(path, content)
    return content
