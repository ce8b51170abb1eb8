"""Folders of flat columns: made once, by one process, complete or not at all; read in place, however long.

A folder has one file per column and a manifest, which is written last: facts, and of each column its type, size and
digest. A folder that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llm_lightning.files.atomic import commit, locked, naming, sha256_of, write_atomically

MANIFEST = "manifest.json"
HELD = 1 << 20
"""Bytes of a column that are written at once."""
OLDER = 4_000_000_000
"""Nanoseconds that a new column looks older than it is: a change from now on shows in its time."""

log = logging.getLogger(__name__)


def key_of(spec: Any) -> str:
    """A name for plain values: equal for equal ones."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:32]


def sealed(content: Any) -> str:
    """Plain values as text that knows its own digest."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(body.encode()).hexdigest()})


def unsealed(path: Path, *, say: bool = True) -> Any:
    """The values of a sealed file; None if it is missing or damaged, which is said unless `say` is false."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        body = json.dumps(found["content"], sort_keys=True)
        if hashlib.sha256(body.encode()).hexdigest() == found["sha256"]:
            return found["content"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    if say:
        log.warning("%s is damaged: making it again", path)
    return None


class Column:
    """One file being written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any], width: int) -> None:
        self._file, self._dtype, self._width = file, dtype, width
        self._held = bytearray()
        self._numbers = array(dtype.char) if dtype.kind in "iu" else None
        self._digest, self.n_bytes = hashlib.sha256(), 0

    def add(self, value: int) -> None:
        """Append one number."""
        assert self._numbers is not None
        self._numbers.append(value)
        if len(self._numbers) * self._dtype.itemsize >= HELD:
            self._write_numbers()

    def extend(self, data: bytes) -> None:
        """Append the bytes of any number of values."""
        self._write_numbers()
        self._hold(data)

    def summary(self) -> dict[str, Any]:
        """Flush the file to disk, and describe it for the manifest."""
        self._write_numbers()
        self._write_held()
        with naming(self._file.name):
            self._file.flush()
            os.fsync(self._file.fileno())
            os.utime(self._file.name, ns=(then := time.time_ns() - OLDER, then))
        state = os.fstat(self._file.fileno())
        return {
            "dtype": self._dtype.str,
            "width": self._width,
            "n_bytes": self.n_bytes,
            "sha256": self._digest.hexdigest(),
            "mtime_ns": state.st_mtime_ns,
        }

    def _write_numbers(self) -> None:
        if self._numbers:
            numbers, self._numbers = self._numbers, array(self._dtype.char)
            self._hold(np.frombuffer(numbers, self._dtype).tobytes())

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= HELD:
            self._write_held()

    def _write_held(self) -> None:
        held, self._held = bytes(self._held), bytearray()
        with naming(self._file.name):
            self._file.write(held)
        self._digest.update(held)
        self.n_bytes += len(held)


class Writer:
    """The columns of a folder being written."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._columns: dict[str, Column] = {}

    def column(self, name: str, dtype: Any, width: int = 1) -> Column:
        """Begin a column of numbers, or of `width` numbers a row."""
        file = self._stack.enter_context((self._folder / name).open("wb"))
        self._columns[name] = Column(file, np.dtype(dtype), width)
        return self._columns[name]

    def summaries(self) -> dict[str, Any]:
        """What the manifest says about each column."""
        return {name: column.summary() for name, column in self._columns.items()}


class Columns:
    """A finished folder. Can be pickled: it holds a path, and opens files when it needs them.

    Attributes:
        facts: the plain values that were written with it.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.facts, self._about = folder, manifest["facts"], manifest["columns"]
        self._open: dict[str, int] = {}

    def mapped(self, name: str) -> np.ndarray:
        """A column as an array that is read page by page when it is touched: (n,), or (n, width)."""
        about = self._about[name]
        dtype, width = np.dtype(about["dtype"]), about["width"]
        shape = (
            (about["n_bytes"] // dtype.itemsize,)
            if width == 1
            else (about["n_bytes"] // dtype.itemsize // width, width)
        )
        if not about["n_bytes"]:
            return np.zeros(shape, dtype)
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a column. Unlike a mapped page, they do not stay in memory.

        Raises:
            OSError: if the file was removed or cut since it was opened.
        """
        if name not in self._open:
            self._open[name] = self._opened(name)
        if hasattr(os, "pread"):
            data = os.pread(self._open[name], stop - start, start)
        else:
            os.lseek(self._open[name], start, os.SEEK_SET)
            data = os.read(self._open[name], stop - start)
        if len(data) != stop - start:
            raise OSError(f"{self.folder / name} was cut while it was in use; run again, which makes it again")
        return data

    def _opened(self, name: str) -> int:
        try:
            return os.open(self.folder / name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            message = f"{self.folder / name} was removed while it was in use; run again, which makes it again"
            raise OSError(message) from None

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of a column."""
        return np.dtype(self._about[name]["dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class Reference(NamedTuple):
    """A mapped file by its path."""

    path: str
    dtype: str
    shape: tuple[int, ...]


def as_reference(value: Any) -> Any:
    """A mapped array as a reference to its file; anything else as it is."""
    is_whole = (
        isinstance(value, np.memmap) and value.filename is not None and value.size * value.itemsize == _size(value)
    )
    return Reference(str(value.filename), value.dtype.str, value.shape) if is_whole else value


def from_reference(value: Any) -> Any:
    """What `as_reference` was given."""
    if not isinstance(value, Reference):
        return value
    return np.memmap(value.path, dtype=value.dtype, mode="r", shape=value.shape)


def _size(array: np.memmap) -> int:
    return Path(array.filename).stat().st_size  # type: ignore[arg-type]


def made_once(folder: Path, write: Callable[[Writer], dict[str, Any]], *, verify: bool = False) -> Columns:
    """The columns in a folder of the cache; made by one process while others wait.

    Args:
        folder: its name says everything that the columns depend on.
        write: fills a new folder, and returns the facts for its manifest.
        verify: compute all digests again.

    Raises:
        OSError: if they cannot be written.
    """
    if (found := _opened(folder, verify, say=False)) is not None:
        return found
    with locked(folder):
        if (found := _opened(folder, verify)) is None:
            _make(folder, write)
            found = _opened(folder, verify)
    if found is None:
        raise OSError(f"{folder} reads back differently from what was written; check the disk and run again")
    return found


def _opened(folder: Path, verify: bool, *, say: bool = True) -> Columns | None:
    manifest = unsealed(folder / MANIFEST, say=say)
    if manifest is None:
        return None
    for name, about in manifest["columns"].items():
        if not _is_as_written(folder / name, about, verify):
            if say:
                log.warning("%s is not as it was written: making it again", folder / name)
            return None
    return Columns(folder, manifest)


def _is_as_written(file: Path, about: Mapping[str, Any], verify: bool) -> bool:
    try:
        state = file.stat()
    except FileNotFoundError:
        return False
    if state.st_size != about["n_bytes"]:
        return False
    is_touched = state.st_mtime_ns != about["mtime_ns"]
    if (is_touched or verify) and sha256_of(file) != about["sha256"]:
        return False
    if is_touched:  # a copy of the cache: hashed once
        with suppress(OSError):
            os.utime(file, ns=(about["mtime_ns"], about["mtime_ns"]))
    return True


def _make(folder: Path, write: Callable[[Writer], dict[str, Any]]) -> None:
    """Fill a folder under a temporary name and rename it when all is written. The caller holds the lock."""
    making = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)  # left by a killed process: we hold the lock
    try:
        making.mkdir(parents=True)
        with ExitStack() as stack:
            writer = Writer(making, stack)
            facts = write(writer)
            manifest = {"facts": facts, "columns": writer.summaries()}
        write_atomically(making / MANIFEST, sealed(manifest))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        commit(making, folder)
    except OSError as error:
        if error.errno is None or not _is_of_writing(error, making):
            raise
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise OSError(
            f"cannot write {folder}: {error.strerror} ({free:,.0f} MiB are free there); "
            "make room, or set LLM_LIGHTNING_CACHE to a folder with more"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _is_of_writing(error: OSError, making: Path) -> bool:
    """Whether an error is not of a source that is read meanwhile."""
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(making)
