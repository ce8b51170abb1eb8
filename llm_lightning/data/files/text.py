"""Text of a file in chunks or lines: strictly decoded; what is not valid is named with line, byte and remedy."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_lightning.data.files.compression import open_bytes
from llm_lightning.data.files.form import FileForm
from llm_lightning.data.files.line_ends import say_changed

CHUNK = 1 << 20
"""Bytes that are decoded at once."""

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
"""A line with its end; U+2028 and the like are characters of a text."""
_CP1252 = frozenset(range(0x80, 0xA0)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D}
"""Bytes that are quotes, dashes and the euro sign in cp1252, and unused control characters in latin1."""


OTHER_REMEDY = "is the file cut, or is data.encoding not what it was written in?"
"""What to do about bytes that another encoding than UTF-8 does not have."""


@dataclass(frozen=True)
class TextFile:
    """The text of a file in chunks; a byte-order mark is dropped, NULs are kept.

    Args:
        keeps_ends: leave CRLF and CR as they are; else every line ends with LF.
    """

    path: Path
    form: FileForm
    keeps_ends: bool = False

    def __iter__(self) -> Iterator[str]:
        decoder = decoder_of(self.form.encoding.removesuffix("-sig"))
        ends = io.IncrementalNewlineDecoder(None, translate=not self.keeps_ends)  # never parts CR from LF
        with open_bytes(self.path, self.form.compression) as file:
            position = len(file.read(len(codecs.BOM_UTF8))) if self.form.encoding == "utf-8-sig" else 0
            while True:
                data = file.read(CHUNK)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise ValueError(self._undecodable(position - held, error)) from error
                position += len(data)
                if text := ends.decode(text, final=not data):
                    yield text
                if not data:
                    if not self.keeps_ends and ends.newlines not in (None, "\n"):
                        say_changed(self.path)
                    return

    def lines(self) -> Iterator[str]:
        """The lines with their ends."""
        pieces: list[str] = []  # of one line, which may be longer than a chunk
        for chunk in self:
            *whole, last = _LINE.findall(chunk)
            if whole and pieces:
                whole[0] = "".join([*pieces, whole[0]])
                pieces = []
            yield from whole
            pieces.append(last)
            if last.endswith(("\n", "\r")):
                yield "".join(pieces)
                pieces = []
        if pieces:
            yield "".join(pieces)

    def _undecodable(self, start: int, error: UnicodeDecodeError) -> str:
        """Args: start: where the bytes that were being decoded begin in the (decompressed) file."""
        offset, line = start + error.start, 1
        with open_bytes(self.path, self.form.compression) as file:
            rest = offset
            while rest and (data := file.read(min(CHUNK, rest))):
                line += data.count(b"\n")
                rest -= len(data)
        byte, name = error.object[error.start], self.form.encoding.removesuffix("-sig").upper()
        remedy = encoding_remedy(bytes(error.object[error.start :])) if name == "UTF-8" else OTHER_REMEDY
        return f"{self.path}, line {line}: byte {offset} (0x{byte:02x}) is not valid {name} ({error.reason}); {remedy}"


def decoder_of(encoding: str) -> codecs.IncrementalDecoder:
    """A strict decoder."""
    return codecs.getincrementaldecoder(encoding)()


def encoding_remedy(data: bytes) -> str:
    """What to do about bytes that are not UTF-8."""
    high = {byte for byte in data if byte >= 0x80}
    if high & _CP1252 and high & set(range(0x80, 0xA0)) <= _CP1252:
        return "its quotes and dashes are those of cp1252 (Windows): set data.encoding=cp1252"
    return "say what the file was written in, such as data.encoding=cp1252 (Windows, Western Europe), or convert it"
