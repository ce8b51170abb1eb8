"""`messages`: lists of `{"role": "system" | "user" | "assistant", "content": "..."}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_lightning.data.templates.conversation import Turn

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def messages_of(value: Any, name: str, *, is_strict: bool = True) -> list[Message]:
    """Check the messages of a record.

    Args:
        name: of their field, for error messages.
        is_strict: roles are user and assistant, system only first, and there is a message. Otherwise any order will
            do, `tool` is a role, too, and content may be null.

    Raises:
        ValueError: with the reason.
    """
    if not isinstance(value, list) or (is_strict and not value):
        raise ValueError(f"field {name!r} must be a list of messages with 'role' and 'content'")
    return [_checked(number, message, is_strict) for number, message in enumerate(value, start=1)]


def _checked(number: int, message: Any, is_strict: bool) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with 'role' and 'content'")
    role, content = message["role"], message.get("content")
    if content is None and not is_strict:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text under 'content'")
    if is_strict and (role not in ROLES or (role == "system" and number > 1)):
        raise ValueError(f"message {number} has the role {role!r}; only user and assistant, and system as the first")
    if role not in (*ROLES, "tool"):
        raise ValueError(f"message {number} has the role {role!r}; there are {', '.join(ROLES)} and tool")
    return Message(role, content)


def turns_of(messages: Sequence[Message]) -> tuple[str | None, tuple[Turn, ...]]:
    """The system message, which may be empty, or None, and the turns.

    Raises:
        ValueError: if user and assistant do not alternate up to an answer of the assistant.
    """
    system, rest = (messages[0].content, messages[1:]) if messages[0].role == "system" else (None, messages)
    roles = [message.role for message in rest]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            "messages must alternate between user and assistant and end with assistant; roles: "
            + (", ".join(roles) or "none")
        )
    contents = [message.content for message in rest]
    return system, tuple(Turn(q, "", a) for q, a in zip(contents[::2], contents[1::2], strict=True))
