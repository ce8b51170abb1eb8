"""JSON without what `json` would pass over in silence: a field that occurs twice, NaN, half a surrogate pair."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

MOST_LEVELS = 200
TOO_DEEP = "nested too deeply"

_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}]')
"""A string, in which brackets are text, or a bracket."""
_ESCAPES = re.compile(r"\\(?:r|u000[dD]|u[dD][89a-fA-F])")
"""Of CR and of halves of surrogate pairs: strings of JSON that is UTF-8 can hold them in no other way."""


def decode(decoder: json.JSONDecoder, text: str) -> Any:
    """The value of a text that is JSON.

    Raises:
        JSONDecodeError: if it is not JSON.
        ValueError: if it is JSON that is refused.
    """
    try:
        value = decoder.decode(text)
    except RecursionError as error:
        raise json.JSONDecodeError(TOO_DEEP, text, 0) from error
    refuse_deep(text)
    return value


def has_escapes(text: str) -> bool:
    """Whether a JSON text may hold CR or half a surrogate pair: to walk through its values takes as long as parsing."""
    return _ESCAPES.search(text) is not None


def refuse_deep(text: str) -> None:
    """Raise ValueError where the value of a text that is JSON is nested so deeply that Python's own walks fail."""
    if text.count("[") <= MOST_LEVELS // 2 and text.count("{") <= MOST_LEVELS // 2:
        return
    depth = deepest = 0
    for mark in _BRACKETS.findall(text):
        depth += 1 if mark in "[{" else -1 if mark in "]}" else 0
        deepest = max(deepest, depth)
    if deepest > MOST_LEVELS:
        raise ValueError(f"{TOO_DEEP}: {deepest:,} levels, and {MOST_LEVELS} are the most")


def problem(value: Any, escapes: bool, fields: Sequence[str] | None = None) -> str | None:
    """Why a value is no record; None if it is one.

    Args:
        escapes: whether the JSON of the value `has_escapes`.
        fields: see `json_line_rows`.
    """
    if not isinstance(value, dict):
        return f"a JSON {type(value).__name__}, not an object"
    if escapes:
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
