"""Bytes of a file that may be compressed: gzip, bzip2, xz and Zstandard, by their first bytes; joined frames too."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSIONS = ("gz", "bz2", "xz", "zst")
_MARKS = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}


def compression_of(path: Path) -> str | None:
    """How a file is compressed, by its first bytes; None: not at all."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)


def open_bytes(path: Path, compression: str | None) -> BinaryIO:
    """Open a file for reading its bytes, decompressed. Reading raises ValueError where the data are damaged or cut."""
    if compression is None:
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Decompressed(path, compression), 1 << 20))


class _Decompressed(io.RawIOBase):
    """The decompressed bytes, whose errors name the file."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path, self._compression = path, compression
        self._file = _opened(path, compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise ValueError(f"{self._path}: the {self._compression} data are damaged or cut: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: Path, compression: str) -> Any:
    if compression == "zst":  # Python has it from 3.14 on
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return {"gz": gzip, "bz2": bz2, "xz": lzma}[compression].open(path, "rb")
