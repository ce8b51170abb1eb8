"""A record as turns, and a piece of its rendering."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """One question and its answer."""

    instruction: str
    input: str
    response: str
    is_trained: bool = True
    """Whether the answer has a loss."""
    before: tuple[Mapping[str, Any], ...] = ()
    """The messages of the question, as a chat template gets them, where they are not one text of the user: results of
    tools. `instruction` has their texts."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """Tool calls of the answer, as a chat template gets them."""


class Conversation(NamedTuple):
    """One record."""

    turns: tuple[Turn, ...]
    system: str | None = None
    """None: there is no system message, for which some templates write one of their own."""
    place: str = ""
    """file:line"""
    group: str = ""
    """Records of one group are in the same split; empty: the prompt is the group."""
    record: Mapping[str, Any] = {}
    """As it was read."""
    rejected: str | None = None
    """In preference data, the worse answer to the last question, whose response is the better one."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the assistant may call, as a chat template gets them."""

    @property
    def has_equal_answers(self) -> bool:
        """Whether chosen and rejected answer differ at most by white space at their ends."""
        return self.rejected is not None and self.turns[-1].response.strip() == self.rejected.strip()


def as_plain(conversation: Conversation) -> list[Any]:
    """Plain values that tell conversations apart: their digest is over these."""
    rejected = [] if conversation.rejected is None else [conversation.rejected]
    tools = [{"tools": list(conversation.tools)}] if conversation.tools else []
    return [conversation.system or "", *map(_plain_turn, conversation.turns), *rejected, *tools]


def _plain_turn(turn: Turn) -> list[Any]:
    """The three texts, and what else a turn has: that of a question and an answer alone is always the same."""
    more = {"is_trained": turn.is_trained, "before": list(turn.before), "calls": list(turn.calls)}
    usual = {"is_trained": True, "before": [], "calls": []}
    return [turn.instruction, turn.input, turn.response, *([more] if more != usual else [])]


def in_words(value: Any) -> str:
    """What JSON has no form for, such as dates and decimals of parquet; a picture would be four times as long."""
    return f"{len(value):,} bytes" if isinstance(value, (bytes, bytearray)) else str(value)


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=in_words)


def as_stored(conversation: Conversation) -> str:
    """One line of text from which `from_stored` makes the same conversation: `plain_text`, a tab, and what is left."""
    rest = (conversation.system is None, conversation.place, conversation.group, conversation.record)
    return f"{plain_text(conversation)}\t{_COMPACT.encode(rest)}"


def plain_text(conversation: Conversation) -> str:
    """`as_plain` as JSON, whose digest is that of the conversation."""
    return json.dumps(as_plain(conversation), default=in_words)


def plain_part(line: bytes) -> bytes:
    """The `plain_text` in a stored line."""
    return line[: line.index(b"\t")]


def from_stored(line: bytes) -> Conversation:
    """The conversation that `as_stored` wrote."""
    plain, rest = line.split(b"\t")
    system, *values = json.loads(plain)
    has_no_system, place, group, record = json.loads(rest)
    tools = tuple(values.pop()["tools"]) if isinstance(values[-1], dict) else ()
    rejected = values.pop() if isinstance(values[-1], str) else None
    turns = tuple(map(_turn, values))
    return Conversation(turns, None if has_no_system else system, place, group, record, rejected, tools)


def _turn(values: list[Any]) -> Turn:
    if len(values) == 3:
        return Turn(*values)
    instruction, question, response, more = values
    return Turn(instruction, question, response, more["is_trained"], tuple(more["before"]), tuple(more["calls"]))


def more_than_text(conversation: Conversation) -> dict[str, bool]:
    """What a conversation may have besides texts of system, user and assistant -> whether it does."""
    return {
        "tools": bool(conversation.tools),
        "tool calls": any(turn.calls for turn in conversation.turns),
        "results of tools": any(turn.before for turn in conversation.turns),
    }


class Segment(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    kind: str
    """prompt; header: the fixed text before an answer; response; end: what ends an answer; untrained: an answer and its
    end that have no loss, whatever the settings."""
    ids: tuple[int, ...] = ()
    """Control tokens, which `text` spells out; none: the text is encoded, and never becomes one."""


def untrained(segment: Segment) -> Segment:
    """A segment of a turn whose answer has no loss."""
    return segment._replace(kind="prompt" if segment.kind in ("prompt", "header") else "untrained")


def answers_of(conversation: Conversation) -> list[str]:
    """Every answer, the rejected one included."""
    rejected = [] if conversation.rejected is None else [conversation.rejected]
    return [turn.response for turn in conversation.turns] + rejected


def with_answers(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with every answer changed."""
    turns = tuple(turn._replace(response=change(turn.response)) for turn in conversation.turns)
    rejected = None if conversation.rejected is None else change(conversation.rejected)
    return conversation._replace(turns=turns, rejected=rejected)
