"""Preference records: a prompt with a chosen and a rejected answer, read strictly from files or the hub.

The prompt is `instruction` and `input`, `prompt` (text, or a list of messages), or `messages` or `conversations` that
end with the user's; `chosen` and `rejected` are texts, or lists of one message of the assistant. Or both are the whole
conversation, alike up to their last message: lists of messages, as UltraFeedback's, or transcripts of `Human:` and
`Assistant:`, as HH's; then the other fields are not read. Or it is in OpenAI's format, with `preferred_output`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.records.fields import Fields, messages_in
from llm_lightning.data.records.form import ConversationForm, refuse_by_name
from llm_lightning.data.records.instruction import check_questions
from llm_lightning.data.records.messages import Message, messages_of, tools_of
from llm_lightning.data.records.rows import SkippedError, Source, collected
from llm_lightning.data.templates.conversation import Conversation, Turn

FIELDS = (
    "instruction", "input", "prompt", "history", "messages", "conversations", "chosen", "rejected", "tools", "system",
    "group",
)  # fmt: skip
EMPTY_ANSWERS = ("refuse", "skip")
REPEATED_PROMPTS = ("strip", "keep")
SHORTEST_REPEATED = 20
"""Characters of a prompt from which answers that both begin with it are taken to repeat it."""
PAIR = ("chosen", "rejected")
OTHER_DATA = {
    "unpaired preference data, as for KTO": (
        frozenset({"prompt", "completion", "label"}),
        "give two answers to one prompt as chosen and rejected, or learn from the good ones with task=sft",
    ),
    "instruction data": (
        frozenset({"prompt", "completion"}),
        "task=sft learns from it; task=dpo needs two answers to a prompt, chosen and rejected",
    ),
    "classification data": (frozenset({"text", "label"}), "task=classification learns labels"),
    "pre-rendered text": (
        frozenset({"text"}),
        "give prompt, chosen and rejected, and a template renders them; task=pretraining learns running text",
    ),
}
"""Kind of data -> the fields by which it is known, and what to do."""
_TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")

Answers = tuple[list[Message] | None, str, str]
"""The messages before the answers, None if the prompt is no list of messages; chosen; rejected."""


@dataclass(frozen=True)
class PreferenceForm(ConversationForm):
    """How a record becomes a conversation with a rejected answer. For the other settings see `ConversationForm`.

    Args:
        empty_answer: how a record with an answer without text is treated: `refuse` or `skip`.
        repeated_prompt: whether a prompt of 20 characters or more with which both answers begin is stripped from them
            (`strip`, `keep`).
    """

    needed: ClassVar[str] = "a prompt, a chosen and a rejected answer"
    fields: ClassVar[tuple[str, ...]] = FIELDS

    empty_answer: str = "refuse"
    repeated_prompt: str = field(default="strip", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.empty_answer not in EMPTY_ANSWERS:
            raise ValueError(f"data.empty_answer={self.empty_answer!r} must be one of {', '.join(EMPTY_ANSWERS)}")
        if self.repeated_prompt not in REPEATED_PROMPTS:
            raise ValueError(
                f"data.repeated_prompt={self.repeated_prompt!r} must be one of {', '.join(REPEATED_PROMPTS)}"
            )

    def conversation(self, fields: Fields, counts: Counter[str]) -> Conversation:
        if not any(map(fields.is_there, PAIR)):
            _read_openai(fields)
        if not any(map(fields.is_there, PAIR)):
            refuse_by_name(fields, OTHER_DATA)
        history, chosen, rejected = self._answers(fields, counts)
        if history is None:
            first, turns = None, (*self.earlier(fields, counts), self._question(fields, chosen))
            chosen, rejected = self._without_prompt(turns[-1], rejected, counts)
            turns = (*turns[:-1], turns[-1]._replace(response=chosen))
        else:
            first, turns = self.turns([*history, Message("assistant", chosen)], counts)
            # Only the last answer has a loss.
            turns = tuple(turn._replace(is_trained=True) for turn in turns)
        system = self.system(fields, first)
        check_questions(turns, "prompt")
        self._check_answers(chosen, rejected)
        tools = tools_of(fields.value("tools"), fields.name("tools"))
        group = fields.text("group", required=False)
        return Conversation(turns, system, group=group, rejected=rejected, tools=tools)

    def _answers(self, fields: Fields, counts: Counter[str]) -> Answers:
        given = {name: _as_messages(fields, name) for name in PAIR}
        if all(isinstance(one, list) and one for one in given.values()):
            return self._of_messages(fields, given, counts)
        if any(isinstance(one, list) for one in given.values()):
            raise ValueError("chosen and rejected must both be text, or both lists of messages")
        chosen, rejected = (fields.text(name) for name in PAIR)
        better, worse = _transcript(chosen), _transcript(rejected)
        has_prompt = any(map(fields.has, ("instruction", "prompt", "messages", "conversations")))
        if has_prompt or better is None or worse is None:
            return self._history(fields, counts), chosen, rejected
        counts["pair of transcripts of Human and Assistant, read as messages"] += 1
        return self._of_whole({"chosen": better, "rejected": worse}, [])

    def _of_messages(self, fields: Fields, given: Mapping[str, Any], counts: Counter[str]) -> Answers:
        read = {name: messages_of(one, fields.name(name), self.reading, counts) for name, one in given.items()}
        is_whole = all(len(one) > 1 and one[0].role != "assistant" for one in read.values())
        if is_whole or any(one[0].role != "assistant" for one in read.values()):
            return self._of_whole(read, [])
        before = self._history(fields, counts)
        if before is None and any(len(one) > 1 for one in read.values()):
            asked = self._question(fields, "")
            before = [Message("user", "\n".join(filter(None, (asked.instruction, asked.input))))]
        return self._of_whole(read, before)

    def _of_whole(self, read: Mapping[str, list[Message]], before: list[Message] | None) -> Answers:
        """The parts of two conversations that are alike up to their last message."""
        for name, messages in read.items():
            if messages[-1].role != "assistant":
                raise ValueError(f"the messages of {name} must end with assistant, not with {messages[-1].role}")
            if messages[-1].more:
                raise ValueError(f"the {name} answer calls a tool; pairs are of answers in words")
        chosen, rejected = read.values()
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("chosen and rejected must be alike up to their last message")
        history = None if before is None else [*before, *chosen[:-1]]
        return history, chosen[-1].content, rejected[-1].content

    def _history(self, fields: Fields, counts: Counter[str]) -> list[Message] | None:
        """The messages that end with the user's; None if the prompt is no list of messages."""
        for name in ("messages", "conversations", "prompt"):
            if not fields.has(name):
                continue
            if name == "prompt" and isinstance(messages_in(fields.value(name), fields.name(name)), str):
                continue
            messages = (
                self.said(fields, name, "user", counts) if name == "prompt" else self.messages(fields, name, counts)
            )
            last = messages[-1].role
            if last not in ("user", "tool"):
                where = fields.name(name)
                raise ValueError(
                    f"the messages of {where!r} must end with user, whom both answers answer, not with {last}"
                )
            return messages
        return None

    def _question(self, fields: Fields, chosen: str) -> Turn:
        if fields.has("prompt"):
            return Turn(fields.text("prompt"), "", chosen)
        return Turn(fields.text("instruction"), fields.text("input", required=False), chosen)

    def _without_prompt(self, turn: Turn, rejected: str, counts: Counter[str]) -> tuple[str, str]:
        """Both answers without the prompt, if they repeat it."""
        prompt, chosen = turn.instruction, turn.response
        is_repeated = chosen.startswith(prompt) and rejected.startswith(prompt) and len(prompt) >= SHORTEST_REPEATED
        if self.repeated_prompt == "keep" or turn.input or not is_repeated:
            return chosen, rejected
        counts["pairs whose answers both began with the prompt, which is stripped from them"] += 1
        return chosen[len(prompt) :], rejected[len(prompt) :]

    def _check_answers(self, chosen: str, rejected: str) -> None:
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.strip():
                if self.empty_answer == "skip":
                    raise SkippedError
                raise ValueError(f"the {name} answer is empty; data.empty_answer=skip leaves such records out")


def read_preferences(
    source: Source,
    *,
    options: FileOptions | None = None,
    columns: Mapping[str, str | None] | None = None,
    empty_answer: str = "refuse",
    **settings: Any,
) -> tuple[list[Conversation], int]:
    """Read all records of a file or a dataset.

    Args:
        source: files of records of any form, or a dataset of the hub.
        options: how the files are read.
        columns, empty_answer, settings: of `PreferenceForm`.

    Returns:
        the conversations, whose last response is the chosen answer, with the `rejected` one; and the number of records
        skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    return collected(source, options or AS_THEY_ARE, PreferenceForm(columns, empty_answer, **settings))


def _as_messages(fields: Fields, name: str) -> Any:
    """The list of messages of an answer, which may be one message alone; anything else as it is."""
    value = messages_in(fields.value(name), fields.name(name))
    return [value] if isinstance(value, Mapping) else value


def _transcript(text: str) -> list[Message] | None:
    """The messages of a transcript; None if it is no transcript of a question and an answer."""
    before, *pieces = _TRANSCRIPT.split(text)
    if before.strip() or len(pieces) < 4:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[name], content) for name, content in zip(pieces[::2], pieces[1::2], strict=True)]


def _read_openai(fields: Fields) -> None:
    """Give a record of OpenAI's format our names; leave any other as it is."""
    given = fields.record.get("input")
    answers = [fields.record.get(name) for name in ("preferred_output", "non_preferred_output")]
    if not isinstance(given, Mapping) or not all(answers):
        return
    ours = {name: given[name] for name in ("messages", "tools") if name in given} | dict(
        zip(PAIR, answers, strict=True)
    )
    others = {name: value for name, value in fields.record.items() if name not in _OPENAI}
    fields.record, fields.names = (
        {**others, **ours},
        {**fields.names, **{name: name for name in ("tools", "messages", *PAIR)}},
    )


_OPENAI = ("input", "preferred_output", "non_preferred_output")
