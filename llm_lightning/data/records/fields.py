"""The fields of one record, by the names that a form has for them; it knows which were read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_lightning.data.files.strict_json import STRICT, decode, half_pair

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class Fields:
    """The fields of a record.

    Args:
        names: field -> its name in the records; None: there is none.
    """

    def __init__(self, record: Mapping[str, Any], names: Mapping[str, str | None]) -> None:
        self.record, self.names = record, names
        self._read: set[str] = set()

    def name(self, field: str) -> str:
        """The name in the records, for messages."""
        return self.names[field] or field

    def is_there(self, field: str) -> bool:
        """Whether the record has the field, even if it holds null."""
        name = self.names[field]
        return name is not None and name in self.record

    def has(self, field: str) -> bool:
        """Whether the field holds anything but null."""
        return self.is_there(field) and self.record[self.name(field)] is not None

    def value(self, field: str) -> Any:
        """What a field holds; None where it is missing."""
        self.read(self.name(field))
        return self.record[self.name(field)] if self.is_there(field) else None

    def read(self, *names: str) -> None:
        """Take note of names that are read."""
        self._read.update(names)

    def text(self, field: str, *, required: bool = True) -> str:
        """A field that holds text; "" where it is null, or is missing and not required.

        Raises:
            ValueError: with the reason.
        """
        if not self.is_there(field):
            if not required:
                return ""
            there = ", ".join(map(repr, self.record)) or "none"
            raise ValueError(f"no field {self.name(field)!r}; there are {there} (choose with data.columns.{field})")
        value = self.value(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            words = f"a {type(value).__name__}" if isinstance(value, (Mapping, list)) else repr(value)
            raise ValueError(f"field {self.name(field)!r} holds {words}, not text")
        return value

    @property
    def unread(self) -> list[str]:
        """The names of the fields that hold something and were not read."""
        return [name for name, value in self.record.items() if name not in self._read and value not in _NOTHING]


_NOTHING: tuple[Any, ...] = (None, "", [], {})


def field_names(fields: Sequence[str], columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """field -> its name in the records; None: there is none."""
    unknown = set(columns or {}) - set(fields)
    if unknown:
        raise ValueError(f"data.columns: unknown field {sorted(unknown)[0]!r}; there are {', '.join(fields)}")
    return {field: field for field in fields} | dict(columns or {})


def list_of(value: Any, name: str) -> Any:
    """`value`, or the list that it spells as JSON: a cell of a table is text.

    Raises:
        ValueError: if it begins as a list and is no JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = decode(STRICT, value.strip())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"field {name!r} is text that begins with '[', but not JSON: {error.msg} at column {error.colno}; write "
            "lists as json.dumps does"
        ) from None
    if half_pair(found) is not None:
        raise ValueError(f"field {name!r} holds half a surrogate pair")
    return found


def messages_in(value: Any, name: str) -> Any:
    """`value`, or the messages that a text spells as JSON; any other text is one message, even if it is JSON."""
    return list_of(value, name) if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value) else value
