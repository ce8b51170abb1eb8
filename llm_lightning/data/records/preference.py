"""Preference records: a prompt with a chosen and a rejected answer, read strictly from JSON, JSONL or the hub.

The prompt is `instruction` and `input`, `prompt` (text, or a list of messages), or `messages` that end with the user's;
`chosen` and `rejected` are texts, or lists of one message of the assistant. Or both are lists of the whole
conversation, alike up to their last message: then the other fields are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.records.messages import Message, messages_of, turns_of
from llm_lightning.data.records.rows import SkippedError, Source, collected, field_names, text_field
from llm_lightning.data.templates.conversation import Conversation, Turn

FIELDS = ("instruction", "input", "prompt", "messages", "chosen", "rejected", "system", "group")
EMPTY_ANSWERS = ("refuse", "skip")


@dataclass(frozen=True)
class PreferenceForm:
    """How a record becomes a conversation with a rejected answer; see `RecordForm`.

    Args:
        columns: names of the fields in the records, where they differ from `FIELDS`; None: there is no such field.
        empty_answer: how a record with an answer without text is treated: `refuse` or `skip`.

    Raises:
        ValueError: if a setting is none of these.
    """

    needed: ClassVar[str] = "a prompt, a chosen and a rejected answer"

    columns: Mapping[str, str | None] | None = None
    empty_answer: str = "refuse"

    def __post_init__(self) -> None:
        if self.empty_answer not in EMPTY_ANSWERS:
            raise ValueError(f"data.empty_answer={self.empty_answer!r} must be one of {', '.join(EMPTY_ANSWERS)}")
        self.names  # noqa: B018 (checked now)

    @cached_property
    def names(self) -> dict[str, str | None]:
        """field -> its name in the records; None: there is none."""
        return field_names(FIELDS, self.columns)

    def __call__(self, record: Mapping[str, Any], place: str, counts: Counter[str]) -> Conversation:
        return _pair(record, place, self.names, self.empty_answer)


def read_preferences(
    source: Source,
    *,
    options: FileOptions | None = None,
    columns: Mapping[str, str | None] | None = None,
    empty_answer: str = "refuse",
) -> tuple[list[Conversation], int]:
    """Read all records of a file or a dataset.

    Args:
        source: files of records of any form, or a dataset of the hub.
        options: how the files are read.
        columns: names of the fields in the source, where they differ from `FIELDS`; None: there is no such field.
        empty_answer: what happens to a record with an answer without text: `refuse` or `skip`.

    Returns:
        the conversations, whose last response is the chosen answer, with the `rejected` one; and the number of records
        skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    return collected(source, options or AS_THEY_ARE, PreferenceForm(columns, empty_answer))


def _pair(record: Mapping[str, Any], place: str, names: Mapping[str, str | None], empty_answer: str) -> Conversation:
    """Raises ValueError with the reason."""
    history, chosen, rejected = _answers(record, names)
    system = text_field(record, names, "system", required=False) or None
    if history is None:
        turns: tuple[Turn, ...] = (_question(record, names, chosen),)
    else:
        first, turns = turns_of([*history, Message("assistant", chosen)])
        if system and first:
            raise ValueError(f"a system message is both in the messages and under {names['system']!r}")
        system = system or first
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
    return Conversation(turns, system, place, group, record, rejected)


def _answers(record: Mapping[str, Any], names: Mapping[str, str | None]) -> tuple[list[Message] | None, str, str]:
    """(messages before the answers, None if there are none; chosen; rejected)."""
    given: list[Any] = [record.get(names[field] or "") for field in ("chosen", "rejected")]
    if not any(isinstance(one, list) for one in given):
        chosen, rejected = (text_field(record, names, field) for field in ("chosen", "rejected"))
        return _history(record, names), chosen, rejected
    if not all(isinstance(one, list) and one for one in given):
        raise ValueError("chosen and rejected must both be text, or both lists of messages")
    chosen_messages, rejected_messages = (
        messages_of(one, names[field] or field) for one, field in zip(given, ("chosen", "rejected"), strict=True)
    )
    for name, messages in (("chosen", chosen_messages), ("rejected", rejected_messages)):
        if messages[-1].role != "assistant":
            raise ValueError(f"the messages of {name} must end with assistant, not with {messages[-1].role}")
    if chosen_messages[:-1] != rejected_messages[:-1]:
        raise ValueError("chosen and rejected must be alike up to their last message")
    history = chosen_messages[:-1] or _history(record, names)
    return history, chosen_messages[-1].content, rejected_messages[-1].content


def _history(record: Mapping[str, Any], names: Mapping[str, str | None]) -> list[Message] | None:
    """The messages that end with the user's; None if the prompt is no list of messages."""
    for field in ("messages", "prompt"):
        name = names[field]
        value = record.get(name) if name is not None else None
        if name is None or value is None or (field == "prompt" and isinstance(value, str)):
            continue
        messages = messages_of(value, name)
        last = messages[-1].role
        if last != "user":
            raise ValueError(f"the messages of {name!r} must end with user, whom both answers answer, not with {last}")
        return messages
    return None


def _question(record: Mapping[str, Any], names: Mapping[str, str | None], chosen: str) -> Turn:
    name = names["prompt"]
    if name is not None and record.get(name) is not None:
        return Turn(text_field(record, names, "prompt"), "", chosen)
    return Turn(text_field(record, names, "instruction"), text_field(record, names, "input", required=False), chosen)
