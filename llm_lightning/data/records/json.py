"""JSON objects with the place of each: a `.json` file with an array of them, or `.jsonl` with one per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.reading import JSONL_SUFFIXES, STRICT, BadRecords, JsonLine, TextFile, json_lines, problem
from llm_lightning.data.records.messages import ROLES, messages_of

_ROLE_OF = {role: role for role in ROLES} | {"instruction": "user", "output": "assistant"}

_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRecord(NamedTuple):
    """One record."""

    record: dict[str, Any]
    place: str
    """file:line of its start; `file, record 12` (from 1) where several records of an array share a line"""


def read_json_records(path: str | Path) -> list[JsonRecord]:
    """Read all records of a file.

    Args:
        path: `.jsonl` or `.ndjson` with one object per line, blank lines skipped; anything else is one JSON array.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file; give a .json or .jsonl file")
    if path.suffix.lower() in JSONL_SUFFIXES:
        _refuse_array(path)
        return _collected(path, json_lines(path))
    text = "".join(TextFile(path))
    try:
        return _collected(path, _elements(path, text))
    except JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg.removesuffix(' at')}"
        ) from error


def has_text(record: JsonRecord, key: str) -> bool:
    """Whether `text_of` has a field or messages to read."""
    return key in record.record or (key in _ROLE_OF and "messages" in record.record)


def text_of(record: JsonRecord, key: str) -> str:
    """Return the text of a field; "" where it is missing or null.

    In a record with `messages` (a list of `{"role": ..., "content": ...}`), `system`, `user` and `assistant` are all
    messages of that role, one per line; `instruction` is the user's, `output` the assistant's.

    Raises:
        ValueError: naming file and line, if the field or the messages hold something else.
    """
    if key in record.record or key not in _ROLE_OF or "messages" not in record.record:
        value = record.record.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{record.place}: field {key!r} holds {type(value).__name__}, not text")
        return value or ""
    try:
        messages = messages_of(record.record["messages"], "messages", is_strict=False)
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from error
    return "\n".join(message.content for message in messages if message.role == _ROLE_OF[key])


def _refuse_array(path: Path) -> None:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    if first.lstrip().startswith(b"["):
        raise ValueError(f"{path} starts with '[', as a JSON array does; name it .json, or write one object per line")


def _collected(path: Path, elements: Iterable[JsonLine]) -> list[JsonRecord]:
    rows = list(elements)
    has_own_lines = len({row.number for row in rows}) == len(rows)
    bad, records = BadRecords(), []
    for index, (line, value, wrong) in enumerate(rows, start=1):
        place = f"line {line}" if has_own_lines else f"record {index}"
        if wrong is not None:
            bad.add(place, wrong)
        records.append(JsonRecord(value, f"{path}:{line}" if has_own_lines else f"{path}, {place}"))
    bad.refuse(path)
    if not records:
        raise ValueError(f"{path} holds no records; give a JSON array of objects, or .jsonl with one object per line")
    return records


def _elements(path: Path, text: str) -> Iterator[JsonLine]:
    """Elements of a JSON array, one by one: `json.loads` would not say where each starts.

    Raises:
        JSONDecodeError: where the array itself is broken; nothing can be read after that.
    """
    start = _after_space(text, 0)
    _refuse_other_than_array(path, text, start)
    start = _after_space(text, start + 1)
    line, counted = 1, 0
    is_last = text.startswith("]", start)
    while not is_last:
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, end = _decode(text, start)
        except JSONDecodeError:
            raise
        except ValueError as error:
            yield JsonLine(line, None, str(error))
            _, end = json.JSONDecoder(parse_int=len).raw_decode(text, start)  # refuses nothing: to go on behind it
        else:
            yield JsonLine(line, value, problem(value, text[start:end]))
        start = _after_space(text, end)
        is_last = text.startswith("]", start)
        if not is_last:
            start = _after_comma(text, start)
    end = _after_space(text, start + 1)
    if end < len(text):
        raise JSONDecodeError("more after the end of the array", text, end)


def _refuse_other_than_array(path: Path, text: str, start: int) -> None:
    if start == len(text):
        raise ValueError(f"{path} is empty; give a JSON array of objects, or .jsonl with one object per line")
    if text[start] == "{":
        raise ValueError(
            f"{path} starts with an object, not with an array of them; put [ ] around the objects and commas between "
            "them, or name the file .jsonl if it has one object per line"
        )
    if text[start] != "[":
        raise JSONDecodeError("a file of records starts with '['", text, start)


def _after_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]


def _after_comma(text: str, start: int) -> int:
    """Where the next element starts."""
    if start == len(text):
        raise JSONDecodeError("the file ends before the ']' of the array", text, start)
    if not text.startswith(",", start):
        raise JSONDecodeError("expecting ',' or ']' after a record", text, start)
    following = _after_space(text, start + 1)
    if text.startswith("]", following):
        raise JSONDecodeError("a comma after the last record", text, start)
    return following


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The value that starts there, and where it ends.

    Raises:
        JSONDecodeError: if it is not JSON.
        ValueError: if it is JSON that is refused.
    """
    try:
        return STRICT.raw_decode(text, start)
    except RecursionError as error:
        raise JSONDecodeError("nested too deeply", text, start) from error
