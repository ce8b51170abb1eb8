"""Preference records: a prompt with a chosen and a rejected answer, read strictly from JSON, JSONL or the hub.

The prompt is given as `instruction` and `input`, as `prompt` (text, or a list of messages), or as `messages` that end
with the user's; `chosen` and `rejected` are texts, or lists of one message of the assistant. Or both are lists of the
whole conversation, alike up to their last message: then other fields are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.records.instruction import (
    SkippedError,
    collected,
    message_of,
    names_of_fields,
    rows_of_file,
    rows_of_hugging_face,
    text_field,
    turns_of,
)
from llm_lightning.data.templates import Conversation, Turn

FIELDS = ("instruction", "input", "prompt", "messages", "chosen", "rejected", "system", "group")
EMPTY_ANSWERS = ("refuse", "skip")


class PreferencePair(NamedTuple):
    """One record."""

    conversation: Conversation
    """The response of its last turn is the chosen answer."""
    rejected: str
    """The other answer."""

    @property
    def chosen(self) -> str:
        """The better answer."""
        return self.conversation.turns[-1].response

    @property
    def is_identical(self) -> bool:
        """Whether there is nothing to prefer, white space at the ends aside."""
        return self.chosen.strip() == self.rejected.strip()


def read_preferences(
    path: str | Path, *, columns: Mapping[str, str | None] | None = None, empty_answer: str = "refuse"
) -> tuple[list[PreferencePair], int]:
    """Read a file of records.

    Args:
        path: a JSON array of objects, or `.jsonl` / `.ndjson` with one object a line.
        columns: what the fields are called in the file, where it is not their name in `FIELDS`; None: there is none.
        empty_answer: of a record of which an answer has no text: `refuse` or `skip`.

    Returns:
        the pairs, and how many records were skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    make = _maker(columns, empty_answer)
    return collected(str(path), rows_of_file(path), make, "a prompt, a chosen and a rejected answer")


def read_hugging_face_preferences(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    *,
    columns: Mapping[str, str | None] | None = None,
    empty_answer: str = "refuse",
) -> tuple[list[PreferencePair], int]:
    """Read a dataset of the hub, through the cache.

    Raises:
        ValueError: if the dataset, its split or a column cannot be had.
    """
    make = _maker(columns, empty_answer)
    rows = rows_of_hugging_face(name, config, split, revision)
    return collected(name, rows, make, "a prompt, a chosen and a rejected answer")


def _maker(
    columns: Mapping[str, str | None] | None, empty_answer: str
) -> Callable[[Mapping[str, Any], str], PreferencePair]:
    if empty_answer not in EMPTY_ANSWERS:
        raise ValueError(f"data.empty_answer={empty_answer!r} must be one of {', '.join(EMPTY_ANSWERS)}")
    names = names_of_fields(FIELDS, columns)
    return lambda record, place: _pair(record, place, names, empty_answer)


def _pair(record: Mapping[str, Any], place: str, names: Mapping[str, str | None], empty_answer: str) -> PreferencePair:
    """Raises ValueError with the reason."""
    history, chosen, rejected = _answers(record, names)
    system = text_field(record, names, "system", required=False)
    if history is None:
        turns: tuple[Turn, ...] = (_question(record, names, chosen),)
    else:
        said, turns = turns_of([*history, {"role": "assistant", "content": chosen}], "messages")
        if system and said:
            raise ValueError(f"a system message stands both in the messages and under {names['system']!r}")
        system = said or system
    for number, turn in enumerate(turns, start=1):
        where = f" of turn {number}" if len(turns) > 1 else ""
        if not turn.instruction.strip():
            raise ValueError(f"the prompt{where} is empty")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            if empty_answer == "skip":
                raise SkippedError
            raise ValueError(f"the {name} answer is empty; data.empty_answer=skip leaves such records out")
    group = text_field(record, names, "group", required=False)
    return PreferencePair(Conversation(turns, system, place, group, record), rejected)


def _answers(record: Mapping[str, Any], names: Mapping[str, str | None]) -> tuple[list[Any] | None, str, str]:
    """(messages before the answers, None if there are none; chosen; rejected)."""
    given: list[Any] = [record.get(names[field] or "") for field in ("chosen", "rejected")]
    if not any(isinstance(one, list) for one in given):
        chosen, rejected = (text_field(record, names, field) for field in ("chosen", "rejected"))
        return _history(record, names), chosen, rejected
    if not all(isinstance(one, list) and one for one in given):
        raise ValueError("chosen and rejected must both be text, or both lists of messages")
    said = [[message_of(number, message) for number, message in enumerate(one, start=1)] for one in given]
    for name, messages in zip(("chosen", "rejected"), said, strict=True):
        if messages[-1][0] != "assistant":
            raise ValueError(f"the messages of {name} must end with assistant, not with {messages[-1][0]}")
    before = [messages[:-1] for messages in said]
    if before[0] != before[1]:
        raise ValueError("chosen and rejected must be alike up to their last message")
    history = given[0][:-1] if before[0] else _history(record, names)
    return history, said[0][-1][1], said[1][-1][1]


def _history(record: Mapping[str, Any], names: Mapping[str, str | None]) -> list[Any] | None:
    """The messages that end with the user's, None if the prompt is no list of messages."""
    for field in ("messages", "prompt"):
        name = names[field]
        value = record.get(name) if name is not None else None
        if value is None or (field == "prompt" and isinstance(value, str)):
            continue
        if not isinstance(value, list) or not value:
            raise ValueError(f"field {name!r} must be a list of messages with 'role' and 'content'")
        last, _ = message_of(len(value), value[-1])
        if last != "user":
            raise ValueError(f"the messages of {name!r} must end with user, whom both answers answer, not with {last}")
        return value
    return None


def _question(record: Mapping[str, Any], names: Mapping[str, str | None], chosen: str) -> Turn:
    name = names["prompt"]
    if name is not None and record.get(name) is not None:
        return Turn(text_field(record, names, "prompt"), "", chosen)
    return Turn(text_field(record, names, "instruction"), text_field(record, names, "input", required=False), chosen)
