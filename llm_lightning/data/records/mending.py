"""The order of messages: turns of a question and an answer; any other order is refused, or mended by choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from llm_lightning.data.files.bad_records import KindError
from llm_lightning.data.records.messages import Message
from llm_lightning.data.templates.conversation import Turn

IRREGULAR = ("refuse", "mend")
REMEDY = (
    "data.irregular=mend leaves out what is before the first question and behind the last answer, and joins messages "
    "of one role, and system messages, by a blank line"
)
Turns = tuple[str | None, tuple[Turn, ...]]


def turns_of(messages: Sequence[Message], counts: Counter[str], *, irregular: str = "refuse") -> Turns:
    """The system message, which may be empty, or None, and the turns.

    Args:
        counts: what is left out or joined is counted here.

    Raises:
        ValueError: if the messages are in another order than the system's, and the user's and the assistant's in turn,
            and are not to be mended, or cannot be.
    """
    if kinds := _irregularities(messages):
        if irregular == "refuse":
            raise KindError(f"the conversation {' and '.join(kinds)}", kinds, REMEDY)
        messages = _mended(messages, counts)
    system, rest = (messages[0].content, messages[1:]) if messages[0].role == "system" else (None, messages)
    turns, question = [], list[Message]()
    for number, message in enumerate(rest, start=1 + len(messages) - len(rest)):
        if message.role == "tool" and question and question[-1].role == "user":
            raise ValueError(f"message {number}, of a tool, follows the user's; it must follow the assistant's call")
        if message.role != "assistant":
            question.append(message)
            continue
        turns.append(_turn(question, message))
        question = []
    return system, tuple(turns)


def _turn(question: Sequence[Message], answer: Message) -> Turn:
    calls = tuple(answer.more.get("tool_calls", ()))
    if len(question) == 1 and question[0].role == "user":
        return Turn(question[0].content, "", answer.content, answer.is_trained, calls=calls)
    text = "\n\n".join(message.content for message in question)
    return Turn(text, "", answer.content, answer.is_trained, tuple(message.plain() for message in question), calls)


def _irregularities(messages: Sequence[Message]) -> list[str]:
    """What is wrong with the order, in words that follow `the conversation`."""
    rest = [message.role for message in messages if message.role != "system"]
    if not {"user", "assistant"} <= set(rest):
        there = ", ".join(dict.fromkeys(message.role for message in messages))
        raise ValueError(f"the conversation has no question with an answer: its roles are {there}")
    found = []
    if any(message.role == "system" for message in messages[1:]):
        found.append("has a system message behind the first message")
    if rest[0] != "user":
        found.append(f"begins with the {rest[0]}")
    if rest[-1] != "assistant":
        found.append(f"ends with the {rest[-1]}")
    twice = {one for one, other in pairwise(rest) if one == other}
    found += [f"has two messages of the {role} in a row" for role in ("user", "assistant") if role in twice]
    return found


def _mended(messages: Sequence[Message], counts: Counter[str]) -> list[Message]:
    systems = [message for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    if len(systems) > 1 or (systems and messages[0].role != "system"):
        n_moved = len(systems) - (messages[0].role == "system")
        counts["a system message behind the first message, joined to the beginning"] += n_moved
        systems = [Message("system", "\n\n".join(message.content for message in systems))]
    while rest and rest[0].role != "user":
        counts[f"a message of the {rest.pop(0).role} before the first question, left out"] += 1
    while rest and rest[-1].role != "assistant":
        counts[f"a message of the {rest.pop().role} behind the last answer, left out"] += 1
    if not rest:
        raise ValueError("the conversation has no question with an answer behind it")
    joined = rest[:1]
    for message in rest[1:]:
        if message.role != joined[-1].role or message.role == "tool":
            joined.append(message)
        else:
            joined[-1] = _joined(joined[-1], message)
            counts[f"a message of the {message.role}, joined to the one before it"] += 1
    return [*systems, *joined]


def _joined(first: Message, second: Message) -> Message:
    if first.more or second.more:
        raise ValueError("two messages of the assistant in a row, of which one calls a tool, cannot be joined")
    if first.is_trained != second.is_trained:
        raise ValueError("two messages of the assistant in a row, one with weight 0 and one without, cannot be joined")
    return first._replace(content="\n\n".join(filter(None, (first.content, second.content))))
