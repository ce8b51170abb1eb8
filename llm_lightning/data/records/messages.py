"""Messages of a record: `role` and `content`, or ShareGPT's `from` and `value`; texts, tool calls and their weights.

{"role": "user", "content": "Is it cold in Oslo?"}
{"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", ...}}]}
{"role": "tool", "content": "-4"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llm_lightning.data.files.bad_records import KindError
from llm_lightning.data.records.fields import list_of
from llm_lightning.data.records.rows import NOT_READ

ROLES = ("system", "user", "assistant", "tool")
NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bot", "model", "ai"), "assistant"),
    "developer": "system",
    **dict.fromkeys(("function", "observation"), "tool"),
}
"""Names of roles that people write -> ours."""
KEYS = {"role": "content", "from": "value"}
OTHER_PARTS = ("refuse", "drop")
_OF_ROLE = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}
"""What a chat template gets besides role and content."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str
    is_trained: bool = True
    more: Mapping[str, Any] = {}
    """As a chat template gets it: tool calls of the assistant, the name and the call that a tool answers."""

    def plain(self) -> dict[str, Any]:
        """As a chat template gets it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Reading:
    """How messages are read.

    Args:
        roles: name in the records -> system, user, assistant or tool; besides `NAMES`, capitals are as small letters.
        other_parts: whether parts of a content that are no text, such as images, are refused or dropped.
        weight: name of the key with OpenAI's weight; None: it is not read.
        is_strict: whether the content of the system and of the user may not be null.

    Raises:
        ValueError: if a setting is none of these.
    """

    roles: Mapping[str, str] | None = None
    other_parts: str = "refuse"
    weight: str | None = "weight"
    is_strict: bool = True

    def __post_init__(self) -> None:
        if self.other_parts not in OTHER_PARTS:
            raise ValueError(f"data.other_parts={self.other_parts!r} must be one of {', '.join(OTHER_PARTS)}")
        for name, role in (self.roles or {}).items():
            if role not in ROLES:
                raise ValueError(f"data.roles.{name}={role!r} must be one of {', '.join(ROLES)}")

    def role_of(self, name: str, number: int) -> str:
        """Our role of a name.

        Raises:
            KindError: if it is unknown.
        """
        role = (self.roles or {}).get(name) or NAMES.get(name) or NAMES.get(name.casefold())
        if role is None:
            known = ", ".join([*(self.roles or {}), *NAMES])
            raise KindError(
                f"message {number} has the role {name!r}, which is none of {known}",
                [f"the role {name!r}"],
                f"data.roles.{name}=user, or system, assistant or tool, says whose messages these are",
            )
        return role


LENIENT = Reading(other_parts="drop", is_strict=False)


def messages_of(value: Any, name: str, reading: Reading = LENIENT, counts: Counter[str] | None = None) -> list[Message]:
    """Check the messages of a record, in any order.

    Args:
        value: a list of messages, or the JSON text of one.
        name: of their field, for error messages.
        counts: what is changed or left out is counted here.

    Raises:
        ValueError: with the reason.
    """
    value = list_of(value, name)
    if not isinstance(value, list) or (reading.is_strict and not value):
        raise ValueError(f"field {name!r} must be a list of messages with 'role' and 'content', or 'from' and 'value'")
    key = next((key for key in KEYS if value and isinstance(value[0], Mapping) and key in value[0]), "role")
    found = Counter[str]()
    messages = [_message(number, one, key, reading, found) for number, one in enumerate(value, start=1)]
    if counts is not None:
        counts.update(found)
    return messages


def _message(number: int, value: Any, key: str, reading: Reading, counts: Counter[str]) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get(key), str):
        raise ValueError(f"message {number} must be an object with {key!r} and {KEYS[key]!r}")
    role = reading.role_of(value[key], number)
    if len(value) == 2 and isinstance(value.get(KEYS[key]), str):
        return Message(role, value[KEYS[key]])  # as nearly all are
    more = {name: value[name] for name in _OF_ROLE.get(role, ()) if value.get(name)}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], number)
    may_be_empty = not reading.is_strict or role in ("assistant", "tool")
    content = _content(value.get(KEYS[key]), number, KEYS[key], may_be_empty, reading, counts)
    is_trained = _is_trained(value, number, reading) if role == "assistant" else True
    read = {key, KEYS[key], *more, *_OF_ROLE.get(role, ()), reading.weight}
    for other in (name for name, held in value.items() if name not in read and held not in (None, "", [], {})):
        counts[unread_key(other)] = 1  # per record
    return Message(role, content, is_trained, more)


def unread_key(name: str) -> str:
    """The key of a count: records whose messages have a key that is not read."""
    return f"{NOT_READ}{name!r} of messages"


def _content(value: Any, number: int, key: str, may_be_empty: bool, reading: Reading, counts: Counter[str]) -> str:
    if value is None and may_be_empty:
        return ""
    if isinstance(value, list):
        return "".join(_texts(value, number, reading, counts))
    if not isinstance(value, str):
        raise ValueError(f"message {number} has no text under {key!r}")
    return value


def _texts(parts: list[Any], number: int, reading: Reading, counts: Counter[str]) -> Iterable[str]:
    """The texts of a content in parts; templates write them one behind the other, with nothing in between."""
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            yield part["text"]
        else:
            kind = str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            if reading.other_parts == "refuse":
                raise KindError(
                    f"message {number} has a part {kind!r}, which is no text",
                    [f"a part {kind!r}"],
                    "data.other_parts=drop leaves such parts out",
                )
            counts[f"a part {kind!r} of a message, left out"] += 1


def _is_trained(message: Mapping[str, Any], number: int, reading: Reading) -> bool:
    weight = message.get(reading.weight) if reading.weight is not None else None
    if weight is None or (weight in (0, 1) and not isinstance(weight, str)):
        return weight is None or weight == 1
    raise ValueError(f"message {number} has {reading.weight}={weight!r}; it must be 0 (no loss on it) or 1")


def _calls(value: Any, number: int) -> list[Any]:
    calls = list_of(value, "tool_calls")
    if not isinstance(calls, list) or not all(_has_name(call) for call in calls):
        raise ValueError(
            f"message {number}: 'tool_calls' must be a list of objects, each with a 'function' and its 'name'"
        )
    return calls


def _has_name(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def tools_of(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    """Schemas of tools: a list of objects, each of them and all together also as JSON text.

    Raises:
        ValueError: with the reason.
    """
    if value in (None, "", [], {}):
        return ()
    value = list_of(value, name)
    tools = [one for tool in value for one in _schema(tool, name)] if isinstance(value, list) else None
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"field {name!r} must be a list of JSON schemas of tools, or the JSON text of one")
    return tuple(tools)


def _schema(tool: Any, name: str) -> list[Any]:
    if not isinstance(tool, str):
        return [tool]
    found = list_of(f"[{tool}]", name)
    return found if isinstance(found, list) else [found]
