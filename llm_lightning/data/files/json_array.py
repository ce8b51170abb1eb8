"""Rows of a file that is one JSON array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from llm_lightning.data.files.form import FileForm
from llm_lightning.data.files.row import Row
from llm_lightning.data.files.strict_json import STRICT, TOO_DEEP, has_escapes, problem, refuse_deep
from llm_lightning.data.files.text import TextFile

MOST_BYTES = 200 * 10**6
"""An array is read as a whole, with several times its size in memory."""

_SPACE = re.compile(r"[ \t\r\n]*")


def json_array_rows(path: Path, form: FileForm) -> list[Row]:
    """Read all elements of the array.

    Raises:
        ValueError: if it is no array of objects, is broken, or is too large.
    """
    text = _whole_text(path, form)
    try:
        elements = list(_elements(path, text))
    except JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg.removesuffix(' at')}"
        ) from error
    escapes = has_escapes(text)
    has_own_lines = len({line for line, _, _ in elements}) == len(elements)
    return [
        Row(f"line {line}" if has_own_lines else f"record {number}", value, wrong, escapes)
        for number, (line, value, wrong) in enumerate(elements, start=1)
    ]


def _whole_text(path: Path, form: FileForm) -> str:
    """The text of a file of at most `MOST_BYTES`, decompressed ones too."""
    _refuse_large(path, path.stat().st_size)
    chunks, n_chars = [], 0
    for chunk in TextFile(path, form, keeps_ends=True):
        chunks.append(chunk)
        n_chars += len(chunk)
        _refuse_large(path, n_chars)
    return "".join(chunks)


def _refuse_large(path: Path, n_bytes: int) -> None:
    if n_bytes > MOST_BYTES:
        raise ValueError(
            f"{path} is a JSON array of at least {n_bytes / 1e6:,.0f} MB, which is read as a whole, and "
            f"{MOST_BYTES / 1e6:.0f} MB are the most; write one object per line (.jsonl): jq -c '.[]' {path.name}"
        )


def _elements(path: Path, text: str) -> Iterator[tuple[int, Any, str | None]]:
    """(line, value, what is wrong) of the elements, one by one: `json.loads` would not say where each starts.

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
            yield (line, None, str(error))
            _, end = json.JSONDecoder(parse_int=len).raw_decode(text, start)  # refuses nothing: to go on behind it
        else:
            yield (line, value, problem(value, has_escapes(text[start:end])))
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
        value, end = STRICT.raw_decode(text, start)
    except RecursionError as error:
        raise JSONDecodeError(TOO_DEEP, text, start) from error
    refuse_deep(text[start:end])
    return value, end
