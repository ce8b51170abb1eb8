"""Bytes of a file that may be compressed: gzip, bzip2, xz and Zstandard, by their first bytes; joined frames too."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSIONS = ("gz", "bz2", "xz", "zst")
PIECE = 1 << 16
"""Compressed bytes that are read at once."""

_MARKS = {
    re.compile(rb"\x1f\x8b"): "gz",
    re.compile(rb"BZh[1-9]"): "bz2",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
    re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"): "zst",  # or a frame that is skipped
}


def compression_of(path: Path) -> str | None:
    """How a file is compressed, by its first bytes; None: not at all."""
    with path.open("rb") as file:
        return marked_compression(file.read(6))


def marked_compression(head: bytes) -> str | None:
    """How data that begin so are compressed; None: not at all."""
    return next((name for mark, name in _MARKS.items() if mark.match(head)), None)


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
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
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
    if compression == "gz":
        return gzip.open(path, "rb")
    return _Members(path, bz2.BZ2Decompressor if compression == "bz2" else lzma.LZMADecompressor)


class _Members:
    """Joined members of bzip2 or xz. What follows the last one is an error; Python's readers pass over it."""

    def __init__(self, path: Path, decompressor: Callable[[], Any]) -> None:
        self._file, self._make = path.open("rb"), decompressor
        self._member = decompressor()
        self.close = self._file.close

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        data = b""
        while not data:
            if self._member.eof:
                if not (piece := self._after_member()):
                    return b""
                self._member = self._make()
            else:
                piece = self._file.read(PIECE) if self._member.needs_input else b""
                if not piece and self._member.needs_input:
                    raise EOFError("they end within a member")
            data = self._member.decompress(piece, size)
        return data

    def _after_member(self) -> bytes:
        """The first bytes of the next member; none at the end of the file. Zeros may stand between two."""
        rest: bytes = self._member.unused_data.lstrip(b"\0")
        while not rest and (piece := self._file.read(PIECE)):
            rest = piece.lstrip(b"\0")
        return rest
