"""Instruction records: questions with answers, read strictly from JSON, JSONL or a Hugging Face dataset.

A record is in the Alpaca format (`instruction`, `input`, `output`) or has `messages`, a list of
`{"role": "system" | "user" | "assistant", "content": "..."}`. What is wrong is collected over the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_lightning.data.hugging_face import hugging_face_file
from llm_lightning.data.reading import refuse_bad
from llm_lightning.data.records.json import ROLES, read_json_records
from llm_lightning.data.templates import Conversation, Turn

FIELDS = ("instruction", "input", "output", "messages", "system", "group")
EMPTY_OUTPUTS = ("refuse", "skip", "keep")

Row = tuple[Mapping[str, Any], str]
"""A record, and the place it comes from."""
Made = TypeVar("Made")


class SkippedError(Exception):
    """A record that is left out on purpose."""


def read_instructions(
    path: str | Path, *, columns: Mapping[str, str | None] | None = None, empty_output: str = "refuse"
) -> tuple[list[Conversation], int]:
    """Read a file of records.

    Args:
        path: a JSON array of objects, or `.jsonl` / `.ndjson` with one object a line.
        columns: what the fields are called in the file, where it is not `instruction`, `input`, `output`, `messages`,
            `system` or `group`; None: there is none.
        empty_output: of an answer without text: `refuse`, `skip`, or `keep` (only the end of text is learnt).

    Returns:
        the conversations, and how many records were skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    make = _maker(columns, empty_output)
    return collected(str(path), rows_of_file(path), make)


def read_hugging_face_instructions(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    *,
    columns: Mapping[str, str | None] | None = None,
    empty_output: str = "refuse",
) -> tuple[list[Conversation], int]:
    """Read a dataset of the hub, through the cache.

    Raises:
        ValueError: if the dataset, its split or a column cannot be had.
    """
    make = _maker(columns, empty_output)
    return collected(name, rows_of_hugging_face(name, config, split, revision), make)


def rows_of_file(path: str | Path) -> Iterable[Row]:
    """The records of a file, see `read_json_records`.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; check data.path")
    return read_json_records(path)


def rows_of_hugging_face(name: str, config: str | None, split: str, revision: str | None) -> Iterable[Row]:
    """The rows of a dataset of the hub."""
    file = hugging_face_file(name, config, split, revision)
    with file.open(encoding="utf-8") as lines:
        return [(json.loads(line), f"{name}/{split}: row {number}") for number, line in enumerate(lines)]


def collected(
    source: str,
    rows: Iterable[Row],
    make: Callable[[Mapping[str, Any], str], Made],
    needed: str = "an instruction and an output",
) -> tuple[list[Made], int]:
    """Make something of every record.

    Args:
        source: for messages.
        make: called with record and place; raises ValueError with what is wrong, or SkippedError.
        needed: in each record, for messages.

    Returns:
        what was made, and how many records were skipped.
    """
    found: list[Made] = []
    bad: list[str] = []
    skipped = 0
    for record, place in rows:
        try:
            found.append(make(record, place))
        except SkippedError:
            skipped += 1
        except ValueError as error:
            bad.append(f"{place}: {error}")
    refuse_bad(source, bad)
    if not found:
        raise ValueError(f"{source} holds no records; give a file with {needed} in each")
    return found, skipped


def names_of_fields(fields: Sequence[str], columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """field -> what it is called in the records; None: there is none."""
    unknown = set(columns or {}) - set(fields)
    if unknown:
        raise ValueError(f"data.columns: unknown field {sorted(unknown)[0]!r}; there are {', '.join(fields)}")
    return {field: field for field in fields} | dict(columns or {})


def _maker(
    columns: Mapping[str, str | None] | None, empty_output: str
) -> Callable[[Mapping[str, Any], str], Conversation]:
    if empty_output not in EMPTY_OUTPUTS:
        raise ValueError(f"data.empty_output={empty_output!r} must be one of {', '.join(EMPTY_OUTPUTS)}")
    names = names_of_fields(FIELDS, columns)
    return lambda record, place: _conversation(record, place, names, empty_output)


def _conversation(
    record: Mapping[str, Any], place: str, names: Mapping[str, str | None], empty_output: str
) -> Conversation:
    """Raises ValueError with the reason."""
    messages = names["messages"]
    system = text_field(record, names, "system", required=False)
    if messages is not None and record.get(messages) is not None:
        said, turns = turns_of(record[messages], messages)
        if system and said:
            raise ValueError(f"a system message stands both in {messages!r} and under {names['system']!r}")
        system = said or system
    else:
        turns = (
            Turn(
                text_field(record, names, "instruction"),
                text_field(record, names, "input", required=False),
                text_field(record, names, "output"),
            ),
        )
    for number, turn in enumerate(turns, start=1):
        where = f" of turn {number}" if len(turns) > 1 else ""
        if not turn.instruction.strip():
            raise ValueError(f"the instruction{where} is empty")
        if not turn.response.strip() and empty_output != "keep":
            if empty_output == "skip":
                raise SkippedError
            raise ValueError(f"the output{where} is empty; data.empty_output=skip leaves such records out")
    return Conversation(turns, system, place, text_field(record, names, "group", required=False), record)


def text_field(record: Mapping[str, Any], names: Mapping[str, str | None], field: str, *, required: bool = True) -> str:
    """A field that holds text. Raises ValueError with the reason."""
    name = names[field]
    if name is None or name not in record:
        if not required:
            return ""
        raise ValueError(
            f"no field {name!r}; there are {', '.join(map(repr, record)) or 'none'} (choose with data.columns.{field})"
        )
    value = record[name]
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} holds {type(value).__name__}, not text")
    return value


def turns_of(messages: Any, name: str) -> tuple[str, tuple[Turn, ...]]:
    """(system message, turns) of a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {name!r} must be a list of messages with 'role' and 'content'")
    pairs = [message_of(number, message) for number, message in enumerate(messages, start=1)]
    system = pairs.pop(0)[1] if pairs[0][0] == "system" else ""
    if len(pairs) % 2 or not pairs or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(pairs)):
        roles = ", ".join(role for role, _ in pairs) or "none"
        raise ValueError(f"messages must alternate between user and assistant and end with assistant; roles: {roles}")
    contents = [content for _, content in pairs]
    return system, tuple(Turn(q, "", a) for q, a in zip(contents[::2], contents[1::2], strict=True))


def message_of(number: int, message: Any) -> tuple[str, str]:
    """(role, content) of a message. Raises ValueError with the reason."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with 'role' and 'content'")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"message {number} has no text under 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES or (role == "system" and number > 1):
        raise ValueError(f"message {number} has the role {role!r}; only user and assistant, and system as the first")
    return role, content
