"""Strict reading of text and JSON lines: every error names its file and line.

What `json` would pass over in silence is an error: a field that occurs twice, NaN, half a surrogate pair.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

JSONL_SUFFIXES = {".jsonl", ".ndjson"}

CHUNK = 1 << 20  # bytes of a text file that are decoded at once

LISTED = 10  # bad records that an error lists; it counts all of them

CONVERT = "convert the file, for example with iconv -f latin1 -t utf-8"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""In a file that is UTF-8, half a pair can only be written as an escape."""


@dataclass(frozen=True)
class TextFile:
    """The text of a file in chunks: strict UTF-8; a byte-order mark is dropped, line ends and NULs are kept."""

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
    byte = error.object[error.start]
    return f"{path}, line {line}: byte {offset} (0x{byte:02x}) is not valid UTF-8 ({error.reason}); {CONVERT}"


class JsonLine(NamedTuple):
    """One line of a JSONL file."""

    number: int
    """From 1."""
    value: Any
    """The object; anything if something is wrong."""
    wrong: str | None
    """The reason why this is no record."""


def json_lines(path: Path, fields: Sequence[str] | None = None) -> Iterator[JsonLine]:
    """Read a JSONL file in constant memory; blank lines are skipped.

    Args:
        fields: the fields that matter; None: all. Others may hold NaN, which Python writes, or half a surrogate pair.
    """
    decoder = STRICT if fields is None else LENIENT
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            line = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
            if not line.strip():
                continue
            value = None
            try:
                text = line.decode().rstrip()
                value = decode(decoder, text)
                wrong = problem(value, text, fields)
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} of the line (0x{line[error.start]:02x})"
                wrong = f"{byte} is not valid UTF-8 ({error.reason}); {CONVERT}"
            except json.JSONDecodeError as error:
                wrong = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            except ValueError as error:
                wrong = str(error)
            yield JsonLine(number, value, wrong)


def decode(decoder: json.JSONDecoder, text: str) -> Any:
    """The value of a text that is JSON.

    Raises:
        JSONDecodeError: if it is not JSON.
        ValueError: if it is JSON that is refused.
    """
    try:
        return decoder.decode(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error


def problem(value: Any, text: str, fields: Sequence[str] | None = None) -> str | None:
    """Why `value`, written as `text`, is no record; None if it is one. For `fields` see `json_lines`."""
    if not isinstance(value, Mapping):
        return f"a JSON {type(value).__name__}, not an object"
    if _SURROGATE.search(text):
        for field, content in value.items():
            if fields is not None and field not in fields:
                continue
            position = half_pair(content)
            if position is not None or half_pair(field) is not None:
                return f"field {field!r} holds half a surrogate pair at character {position or 0}"
    return None


def half_pair(content: Any) -> int | None:
    """Where half a surrogate pair is in a string, which UTF-8 cannot express; for other values, in their JSON."""
    written = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def checked_text(record: Mapping[str, Any], text_field: str) -> str:
    """The text of a record.

    Raises:
        ValueError: with the reason, if there is none.
    """
    if text_field not in record:
        raise ValueError(f"no field '{text_field}'; its fields: {', '.join(map(repr, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field '{text_field}' holds {type(text).__name__}, not a string")
    return text


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, for `object_pairs_hook`.

    Raises:
        ValueError: if a field occurs twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):  # json would silently keep the last one
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"field {next(name for name, count in counts.items() if count > 1)!r} occurs twice")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null or a number")


LENIENT = json.JSONDecoder(object_pairs_hook=unique_fields)
STRICT = json.JSONDecoder(object_pairs_hook=unique_fields, parse_constant=_no_constant)


class BadRecords:
    """What is wrong with the records of a source: all are counted, the first ten are kept."""

    def __init__(self) -> None:
        self.n, self.first = 0, list[str]()

    def add(self, place: str, reason: object) -> None:
        self.n += 1
        if len(self.first) < LISTED:
            self.first.append(f"{place}: {reason}")

    def refuse(self, source: str | Path, remedy: str = "") -> None:
        """Raise ValueError if there are any, with their number and the first ten."""
        if self.n:
            more = f" (the first {LISTED} of {self.n})" if self.n > LISTED else ""
            tail = f"; {remedy}" if remedy else ""
            raise ValueError(f"{source}: {self.n} bad record{'s'[: self.n > 1]}{more}: {'; '.join(self.first)}{tail}")
