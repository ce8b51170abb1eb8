"""Strict reading of text and JSON: whatever is wrong is named by file and line."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JSONL_SUFFIXES = {".jsonl", ".ndjson"}


CHUNK = 1 << 20  # bytes of a text file that are decoded at once


LISTED = 10  # bad lines that an error lists; it counts all of them


@dataclass(frozen=True)
class TextFile:
    """A file that is one document: strict UTF-8, a byte-order mark dropped, line ends and NULs kept as they are."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self.path.open("rb") as file:
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            while True:
                position = file.tell() - len(decoder.getstate()[0])
                data = file.read(CHUNK)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise ValueError(_not_utf8(self.path, position + error.start, error)) from error
                if text:
                    yield text
                if not data:
                    return


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> str:
    line, rest = 1, offset
    with path.open("rb") as file:
        while rest and (data := file.read(min(CHUNK, rest))):
            line += data.count(b"\n")
            rest -= len(data)
    return (
        f"{path}, line {line}: byte {offset} (0x{error.object[error.start]:02x}) is not valid UTF-8 "
        f"({error.reason}); convert the file, for example with iconv -f latin1 -t utf-8"
    )


def checked_text(record: Any, text_field: str) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        raise ValueError(f"no field '{text_field}'; its fields: {', '.join(map(repr, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field '{text_field}' holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field '{text_field}' holds half a surrogate pair at character {error.start}") from error
    return text


def refuse_bad(source: str | Path, bad: Sequence[str]) -> None:
    """Raise ValueError if there are bad records, with how many there are and the first of them.

    Args:
        bad: place and reason of each.
    """
    if bad:
        more = f" (the first {LISTED} of {len(bad)})" if len(bad) > LISTED else ""
        raise ValueError(f"{source}: {len(bad)} bad record{'s'[: len(bad) > 1]}{more}: {'; '.join(bad[:LISTED])}")


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, for `object_pairs_hook`.

    Raises:
        ValueError: if a field stands twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):  # json would silently keep the last one
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"field '{next(name for name, count in counts.items() if count > 1)}' stands twice")
    return record
