"""Instruction records: questions with answers, read strictly from JSON, JSONL or a Hugging Face dataset.

A record is in the Alpaca format (`instruction`, `input`, `output`) or has `messages`, a list of
`{"role": "system" | "user" | "assistant", "content": "..."}`. What is wrong is collected over the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_lightning.data.json_records import read_json_records
from llm_lightning.data.sources import LISTED, hugging_face_file
from llm_lightning.data.templates import Conversation, Turn

FIELDS = ("instruction", "input", "output", "messages", "system", "group")
EMPTY_OUTPUTS = ("refuse", "skip", "keep")


class _SkippedError(Exception):
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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; check data.path")
    return collected(str(path), read_json_records(path), columns, empty_output)


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
    file = hugging_face_file(name, config, split, revision)
    with file.open(encoding="utf-8") as lines:
        rows = [(json.loads(line), f"{name}/{split}: row {number}") for number, line in enumerate(lines)]
    return collected(name, rows, columns, empty_output)


def collected(
    source: str,
    rows: Iterable[tuple[Mapping[str, Any], str]],
    columns: Mapping[str, str | None] | None = None,
    empty_output: str = "refuse",
) -> tuple[list[Conversation], int]:
    """Turn (record, place) pairs into conversations; see `read_instructions`."""
    if empty_output not in EMPTY_OUTPUTS:
        raise ValueError(f"data.empty_output={empty_output!r} must be one of {', '.join(EMPTY_OUTPUTS)}")
    names = _names(columns)
    found: list[Conversation] = []
    bad: list[str] = []
    skipped = 0
    for record, place in rows:
        try:
            found.append(_conversation(record, place, names, empty_output))
        except _SkippedError:
            skipped += 1
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad:
        more = f" (the first {LISTED} of {len(bad)})" if len(bad) > LISTED else ""
        raise ValueError(f"{source}: {len(bad)} bad record{'s'[: len(bad) > 1]}{more}: {'; '.join(bad[:LISTED])}")
    if not found:
        raise ValueError(f"{source} holds no records; give a file with an instruction and an output in each")
    return found, skipped


def _names(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    unknown = set(columns or {}) - set(FIELDS)
    if unknown:
        raise ValueError(f"data.columns: unknown field {sorted(unknown)[0]!r}; there are {', '.join(FIELDS)}")
    return {field: field for field in FIELDS} | dict(columns or {})


def _conversation(
    record: Mapping[str, Any], place: str, names: Mapping[str, str | None], empty_output: str
) -> Conversation:
    """Raises ValueError with the reason."""
    messages = names["messages"]
    system = _text(record, names, "system", required=False)
    if messages is not None and record.get(messages) is not None:
        said, turns = _turns(record[messages], messages)
        if system and said:
            raise ValueError(f"a system message stands both in {messages!r} and under {names['system']!r}")
        system = said or system
    else:
        turns = (
            Turn(
                _text(record, names, "instruction"),
                _text(record, names, "input", required=False),
                _text(record, names, "output"),
            ),
        )
    for number, turn in enumerate(turns, start=1):
        where = f" of turn {number}" if len(turns) > 1 else ""
        if not turn.instruction.strip():
            raise ValueError(f"the instruction{where} is empty")
        if not turn.response.strip() and empty_output != "keep":
            if empty_output == "skip":
                raise _SkippedError
            raise ValueError(f"the output{where} is empty; data.empty_output=skip leaves such records out")
    return Conversation(turns, system, place, _text(record, names, "group", required=False), record)


def _text(record: Mapping[str, Any], names: Mapping[str, str | None], field: str, *, required: bool = True) -> str:
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
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} holds half a surrogate pair at character {error.start}") from error
    return value


def _turns(messages: Any, name: str) -> tuple[str, tuple[Turn, ...]]:
    """(system message, turns) of a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {name!r} must be a list of messages with 'role' and 'content'")
    pairs = [_message(number, message) for number, message in enumerate(messages, start=1)]
    system = pairs.pop(0)[1] if pairs[0][0] == "system" else ""
    if len(pairs) % 2 or not pairs or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(pairs)):
        roles = ", ".join(role for role, _ in pairs) or "none"
        raise ValueError(f"messages must alternate between user and assistant and end with assistant; roles: {roles}")
    contents = [content for _, content in pairs]
    return system, tuple(Turn(q, "", a) for q, a in zip(contents[::2], contents[1::2], strict=True))


def _message(number: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with 'role' and 'content'")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"message {number} has no text under 'content'")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant") or (role == "system" and number > 1):
        raise ValueError(f"message {number} has the role {role!r}; only user and assistant, and system as the first")
    return role, content
