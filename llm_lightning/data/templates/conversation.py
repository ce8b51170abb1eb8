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

    @property
    def has_equal_answers(self) -> bool:
        """Whether chosen and rejected answer differ at most by white space at their ends."""
        return self.rejected is not None and self.turns[-1].response.strip() == self.rejected.strip()


def as_plain(conversation: Conversation) -> list[Any]:
    """Plain values that tell conversations apart: their digest is over these."""
    rejected = [] if conversation.rejected is None else [conversation.rejected]
    return [conversation.system or "", *map(list, conversation.turns), *rejected]


def as_stored(conversation: Conversation) -> str:
    """One line of text from which `from_stored` makes the same conversation."""
    values = conversation._asdict() | {"turns": [list(turn) for turn in conversation.turns]}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def from_stored(line: str | bytes) -> Conversation:
    """The conversation that `as_stored` wrote."""
    values = json.loads(line)
    return Conversation(**values | {"turns": tuple(Turn(*turn) for turn in values["turns"])})


class Segment(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    kind: str
    """prompt; header: the fixed text before an answer; response; end: what ends an answer."""
    ids: tuple[int, ...] = ()
    """Control tokens, which `text` spells out; none: the text is encoded, and never becomes one."""


def answers_of(conversation: Conversation) -> list[str]:
    """Every answer, the rejected one included."""
    rejected = [] if conversation.rejected is None else [conversation.rejected]
    return [turn.response for turn in conversation.turns] + rejected


def with_answers(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with every answer changed."""
    turns = tuple(turn._replace(response=change(turn.response)) for turn in conversation.turns)
    rejected = None if conversation.rejected is None else change(conversation.rejected)
    return conversation._replace(turns=turns, rejected=rejected)
