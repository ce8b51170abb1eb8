"""JSON objects with the place each comes from: a `.json` file with an array of them, or `.jsonl` with one a line.

Read strictly: what json would pass over in silence (a field that stands twice, NaN, half a surrogate pair) is an
error, and what is wrong with the records is collected over the whole file and told at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.reading import JSONL_SUFFIXES, TextFile, refuse_bad, unique_fields

ROLES = ("system", "user", "assistant")
_ROLE_OF = {role: role for role in ROLES} | {"instruction": "user", "output": "assistant"}

_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""In a file that is UTF-8, half a pair can only be written as an escape."""


class JsonRecord(NamedTuple):
    """One record."""

    record: dict[str, Any]
    place: str
    """file:line of its start; `file, record 12` (from 1) where several records of an array share a line"""


class _Element(NamedTuple):
    line: int
    value: Any
    wrong: str | None


def read_json_records(path: str | Path) -> list[JsonRecord]:
    """Read all records of a file.

    Args:
        path: `.jsonl` or `.ndjson` has one object a line, blank lines aside; anything else is one JSON array.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; give a .json or .jsonl file")
    text = "".join(TextFile(path))  # strict UTF-8
    if path.suffix.lower() in JSONL_SUFFIXES:
        return _collected(path, list(_lines(path, text)))
    try:
        return _collected(path, list(_elements(path, text)))
    except JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg.removesuffix(' at')}"
        ) from error


def has_text(record: JsonRecord, key: str) -> bool:
    """Whether `text_of` has a field or messages to read."""
    return key in record.record or (key in _ROLE_OF and "messages" in record.record)


def text_of(record: JsonRecord, key: str) -> str:
    """Return the text of a field; "" where it is missing or null.

    Of a record with `messages` (a list of `{"role": ..., "content": ...}`), `system`, `user` and `assistant` are all
    that they say, one message a line; `instruction` is what the user says, `output` what the assistant says.

    Raises:
        ValueError: naming file and line, if the field or the messages hold something else.
    """
    if key in record.record or key not in _ROLE_OF or "messages" not in record.record:
        return _string(record.record.get(key), f"{record.place}: field {key!r}")
    messages = record.record["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"{record.place}: field 'messages' holds {type(messages).__name__}, not a list")
    said = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or message.get("role") not in (*ROLES, "tool"):
            raise ValueError(f"{record.place}: message {number} is no object with a 'role' of {', '.join(ROLES)}")
        content = _string(message.get("content"), f"{record.place}: 'content' of message {number}")
        if message["role"] == _ROLE_OF[key]:
            said.append(content)
    return "\n".join(said)


def _string(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{what} holds {type(value).__name__}, not text")
    return value


def _collected(path: Path, elements: list[_Element]) -> list[JsonRecord]:
    lines = [line for line, _, _ in elements]
    has_own_lines = len(set(lines)) == len(lines)
    places = [f"line {line}" if has_own_lines else f"record {number}" for number, line in enumerate(lines, start=1)]
    bad = [f"{place}: {wrong}" for place, (_, _, wrong) in zip(places, elements, strict=True) if wrong is not None]
    refuse_bad(path, bad)
    if not elements:
        raise ValueError(f"{path} holds no records; give a JSON array of objects, or .jsonl with one object a line")
    return [
        JsonRecord(value, f"{path}:{line}" if has_own_lines else f"{path}, {place}")
        for place, (line, value, _) in zip(places, elements, strict=True)
    ]


def _lines(path: Path, text: str) -> Iterator[_Element]:
    """Objects of a JSONL file."""
    if text.lstrip().startswith("["):
        raise ValueError(f"{path} starts with '[', as a JSON array does; name it .json, or write one object a line")
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would split inside strings
        if not line.strip():
            continue
        try:
            value, end = _decode(line, _SPACE.match(line).end())  # type: ignore[union-attr]
            if line[end:].strip():
                raise JSONDecodeError("more after the end of the object", line, end)
        except JSONDecodeError as error:
            yield _Element(number, None, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        except ValueError as error:
            yield _Element(number, None, str(error))
        else:
            yield _Element(number, value, _problem(value, line))


def _elements(path: Path, text: str) -> Iterator[_Element]:
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
            yield _Element(line, None, str(error))
            _, end = json.JSONDecoder(parse_int=len).raw_decode(text, start)  # refuses nothing: to go on behind it
        else:
            yield _Element(line, value, _problem(value, text[start:end]))
        start = _after_space(text, end)
        is_last = text.startswith("]", start)
        if not is_last:
            start = _after_comma(text, start)
    end = _after_space(text, start + 1)
    if end < len(text):
        raise JSONDecodeError("more after the end of the array", text, end)


def _refuse_other_than_array(path: Path, text: str, start: int) -> None:
    if start == len(text):
        raise ValueError(f"{path} is empty; give a JSON array of objects, or .jsonl with one object a line")
    if text[start] == "{":
        raise ValueError(
            f"{path} starts with an object, not with an array of them; put [ ] around the objects and commas between "
            "them, or name the file .jsonl if it has one object a line"
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


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_fields, parse_constant=_no_constant)


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The value that starts there, and where it ends.

    Raises:
        JSONDecodeError: if it is not JSON.
        ValueError: if it is JSON that is refused.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise JSONDecodeError("nested too deeply", text, start) from error


def _problem(value: Any, written: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"a JSON {type(value).__name__}, not an object"
    if _SURROGATE.search(written):
        for field, content in value.items():
            position = _half_pair(content)
            if position is not None or _half_pair(field) is not None:
                return f"field {field!r} holds half a surrogate pair at character {position or 0}"
    return None


def _half_pair(content: Any) -> int | None:
    """Where UTF-8 cannot express a string; of other values, in their JSON."""
    written = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
