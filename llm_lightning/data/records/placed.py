"""Records of files with the place of each, and the text of their fields, for tools that look at any record."""

from __future__ import annotations

from typing import Any, NamedTuple

from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.find import PathWords, find_files
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import RECORD_FORMS, rows_of_files
from llm_lightning.data.records.fields import messages_in
from llm_lightning.data.records.messages import ROLES, Message, messages_of

_ROLE_OF = {role: role for role in ROLES} | {"instruction": "user", "output": "assistant"}
_CONVERSATIONS = ("messages", "conversations")
_COMPLETION = {"prompt": "user", "completion": "assistant"}
"""Fields that hold a text of this role, or messages."""


class PlacedRecord(NamedTuple):
    """One record."""

    record: dict[str, Any]
    place: str
    """file:line of its start; `file, record 12` (from 1) where records do not begin on lines of their own"""


def placed_records(path: PathWords, options: FileOptions | None = None) -> list[PlacedRecord]:
    """Read all records of all files that `path` names; see `find_files`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    found = find_files(path, RECORD_FORMS)
    records, bad = [], BadRecords()
    for row in rows_of_files(found, options or AS_THEY_ARE):
        if row.wrong is not None:
            bad.add(row.short, row.wrong)
        else:
            records.append(PlacedRecord(row.record, row.place))
    bad.refuse(found.label)
    if not records:
        raise ValueError(f"{found.label} holds no records; give .jsonl, .json, .csv, .tsv or parquet")
    return records


def has_messages(record: PlacedRecord) -> bool:
    """Whether a record is a conversation: messages, ShareGPT's `conversations`, or `prompt` and `completion`."""
    fields = record.record
    return any(name in fields for name in _CONVERSATIONS) or all(name in fields for name in _COMPLETION)


def has_text(record: PlacedRecord, key: str) -> bool:
    """Whether `text_of` has a field or messages to read."""
    return key in record.record or (key in _ROLE_OF and has_messages(record))


def text_of(record: PlacedRecord, key: str) -> str:
    """Return the text of a field; "" where it is missing or null.

    In a record with messages, see `has_messages`, `system`, `user`, `assistant` and `tool` are all messages of that
    role, one per line; `instruction` is the user's, `output` the assistant's.

    Raises:
        ValueError: naming file and line, if the field or the messages hold something else.
    """
    if key in record.record or key not in _ROLE_OF or not has_messages(record):
        value = record.record.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{record.place}: field {key!r} holds {type(value).__name__}, not text")
        return value or ""
    try:
        messages = _messages(record.record)
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from error
    return "\n".join(message.content for message in messages if message.role == _ROLE_OF[key])


def _messages(record: dict[str, Any]) -> list[Message]:
    for name in _CONVERSATIONS:
        if name in record:
            return messages_of(record[name], name)
    messages: list[Message] = []
    for name, role in _COMPLETION.items():
        value = messages_in(record[name], name)
        messages += [Message(role, value)] if isinstance(value, str) else messages_of(value, name)
    return messages
