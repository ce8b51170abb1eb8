"""What the forms of instruction and preference records have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from llm_lightning.data.files.bad_records import KindError
from llm_lightning.data.records.fields import Fields, field_names, list_of, messages_in
from llm_lightning.data.records.mending import IRREGULAR, Turns, turns_of
from llm_lightning.data.records.messages import Message, Reading, messages_of
from llm_lightning.data.records.rows import NOT_READ
from llm_lightning.data.templates.conversation import Conversation, Turn


@dataclass(frozen=True)
class ConversationForm(ABC):
    """How a record becomes a conversation; see `RecordForm`.

    Args:
        columns: names of the fields in the records, where they differ from `fields`; None: there is no such field.
        roles: names of roles in messages, besides the usual ones -> system, user, assistant or tool.
        irregular: whether messages that do not alternate between user and assistant, from a question to an answer, are
            refused or mended (`refuse`, `mend`).
        other_parts: whether parts of messages that are no text are refused or dropped (`refuse`, `drop`).

    Raises:
        ValueError: if a setting is none of these.
    """

    needed: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    version: ClassVar[int] = 1
    """Is raised when the same record becomes another conversation."""

    columns: Mapping[str, str | None] | None = None
    roles: Mapping[str, str] | None = field(default=None, kw_only=True)
    irregular: str = field(default="refuse", kw_only=True)
    other_parts: str = field(default="refuse", kw_only=True)

    def __post_init__(self) -> None:
        if self.irregular not in IRREGULAR:
            raise ValueError(f"data.irregular={self.irregular!r} must be one of {', '.join(IRREGULAR)}")
        self.reading  # noqa: B018 (checked now)

    @cached_property
    def names(self) -> dict[str, str | None]:
        """field -> its name in the records; None: there is none."""
        return field_names(self.fields, self.columns)

    @cached_property
    def reading(self) -> Reading:
        """How messages are read."""
        return Reading(self.roles, self.other_parts, self.names.get("weight"))

    def __call__(self, record: Mapping[str, Any], place: str, counts: Counter[str]) -> Conversation:
        fields, found = Fields(record, self.names), Counter[str]()
        made = self.conversation(fields, found)._replace(place=place, record=record)
        for name, n in found.items():
            counts[name] += 1 if name.startswith(NOT_READ) else n
        for name in fields.unread:
            counts[f"{NOT_READ}{name!r}"] += 1
        return made

    @abstractmethod
    def conversation(self, fields: Fields, counts: Counter[str]) -> Conversation:
        """Make the conversation of a record, without its place; see `RecordForm.__call__`."""

    # --- parts of a record -----------------------------------------------------------------------------------------

    def messages(self, fields: Fields, name: str, counts: Counter[str]) -> list[Message]:
        """The messages of a field."""
        return messages_of(fields.value(name), fields.name(name), self.reading, counts)

    def turns(self, messages: list[Message], counts: Counter[str]) -> Turns:
        """The system message and the turns of messages."""
        return turns_of(messages, counts, irregular=self.irregular)

    def said(self, fields: Fields, name: str, role: str, counts: Counter[str]) -> list[Message]:
        """The messages of a field that holds messages, or one text, which is a message of `role`."""
        value = messages_in(fields.value(name), fields.name(name))
        if isinstance(value, list):
            return messages_of(value, fields.name(name), self.reading, counts)
        return [Message(role, fields.text(name))]

    def earlier(self, fields: Fields, counts: Counter[str]) -> tuple[Turn, ...]:
        """The turns of `history`, a list of pairs of a question and an answer; of anything else, none: it is not read.

        Raises:
            ValueError: if a question is empty.
        """
        if not fields.has("history"):
            return ()
        value = fields.record[fields.name("history")]
        pairs = list_of(value, fields.name("history"))
        if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
            return ()
        fields.read(fields.name("history"))
        counts[f"pairs of {fields.name('history')!r}, read as earlier turns"] += len(pairs)
        return tuple(Turn(question, "", answer) for question, answer in pairs)

    def system(self, fields: Fields, of_messages: str | None) -> str | None:
        """The system message, of a field or of the messages.

        Raises:
            ValueError: if there are two.
        """
        system = fields.text("system", required=False)
        if system and of_messages:
            raise ValueError(f"a system message is both in the messages and under {fields.name('system')!r}")
        return system or of_messages


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(one, str) for one in value)


def refuse_by_name(fields: Fields, known: Mapping[str, tuple[frozenset[str], str]]) -> None:
    """Refuse records of another kind of data, which are missing the fields that are needed.

    Args:
        known: the kind -> the fields by which it is known, and what to do.

    Raises:
        KindError: if a record has all fields of a kind.
    """
    for kind, (marks, remedy) in known.items():
        if marks <= fields.record.keys():
            raise KindError(f"this is {kind} ({', '.join(sorted(marks))})", [kind], remedy)
