"""What a chat template gets of a conversation: messages and tools as transformers passes them, and where to cut.

Control tokens that these spell out are hidden in all texts: contents, names, arguments and schemas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.data.templates.hiding import Controls, Hiding

Message = dict[str, Any]


class Chat(NamedTuple):
    """The variables of a template that come from a record."""

    messages: list[Message]
    tools: list[Mapping[str, Any]] | None = None

    @property
    def is_structured(self) -> bool:
        """Whether there is anything but roles and contents."""
        return bool(self.tools) or any(set(message) > {"role", "content"} for message in self.messages)


def chat_of(conversation: Conversation, *, takes_objects: bool = True) -> Chat:
    """A message for each role and turn; the input of a question is on the lines after the instruction.

    Args:
        takes_objects: whether arguments of tool calls are objects, or the JSON text of one. Records have both, and a
            template takes one of them.
    """
    messages: list[Message] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        messages += [dict(message) for message in turn.before] or [_question(turn)]
        calls = [_with_arguments(call, takes_objects) for call in turn.calls]
        messages.append({"role": "assistant", "content": turn.response, **({"tool_calls": calls} if calls else {})})
    return Chat(messages, list(conversation.tools) or None)


def cuts_of(conversation: Conversation) -> tuple[list[tuple[int, bool]], list[tuple[int, bool]]]:
    """(number of first messages, whether the generation prompt follows): up to each question, and up to each answer."""
    begun, answered = [], []
    n = 0 if conversation.system is None else 1
    for turn in conversation.turns:
        n += len(turn.before) or 1
        begun.append((n, True))
        n += 1
        answered.append((n, False))
    return begun, answered


def hidden(chat: Chat, hiding: Hiding, controls: Controls, kept: Collection[str], *, whole_only: bool) -> Chat:
    """The same with control tokens hidden.

    Args:
        kept: control tokens that stay as they are in answers.
        whole_only: hide in structured values no more than whole control tokens: a template may compare a value such as
            the type `object`, which is also a part of a control token.
    """

    def hide(text: str) -> str:
        return hiding.hide(text, controls.whole_in(text) if whole_only else controls.spelled_in(text))

    def hide_key(text: str) -> str:
        return hiding.hide(text, controls.whole_in(text))

    def message_of(message: Message) -> Message:
        content = message["content"]
        positions = controls.spelled_in(content, kept if message["role"] == "assistant" else ())
        more = {
            key: _changed(value, hide, hide_key) for key, value in message.items() if key not in ("role", "content")
        }
        return {"role": message["role"], "content": hiding.hide(content, positions), **more}

    return Chat(list(map(message_of, chat.messages)), _changed(chat.tools, hide, hide_key))


def _changed(value: Any, text: Callable[[str], str], key: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key(name): _changed(inner, text, key) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(inner, text, key) for inner in value]
    return value


def _question(turn: Turn) -> Message:
    return {"role": "user", "content": f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction}


def _with_arguments(call: Mapping[str, Any], takes_objects: bool) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], takes_objects)}
    arguments = call.get("arguments")
    if takes_objects and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    if not takes_objects and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call
