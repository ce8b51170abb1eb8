"""Instruction records: questions with answers, read strictly from files of records or a Hugging Face dataset.

A record has `messages`; or is in the Alpaca format (`instruction`, `input`, `output`, and `history`, earlier questions
and answers); or has `conversations`, ShareGPT's; or `prompt` and `completion`, texts or messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llm_lightning.data.files.bad_records import KindError
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.records.fields import Fields
from llm_lightning.data.records.form import ConversationForm, refuse_by_name
from llm_lightning.data.records.mending import Turns
from llm_lightning.data.records.messages import tools_of
from llm_lightning.data.records.rows import SkippedError, Source, collected
from llm_lightning.data.templates.conversation import Conversation, Turn

FIELDS = (
    "instruction", "input", "output", "history", "messages", "conversations", "prompt", "completion", "tools",
    "weight", "system", "group",
)  # fmt: skip
EMPTY_OUTPUTS = ("refuse", "skip", "keep")
OTHER_DATA = {
    "preference data": (
        frozenset({"chosen", "rejected"}),
        "task=dpo learns from pairs; data.columns.output=chosen takes the better answers alone",
    ),
    "classification data": (frozenset({"text", "label"}), "task=classification learns labels"),
    "pre-rendered text": (
        frozenset({"text"}),
        "give the conversation itself, as messages or instruction and output, and a template renders it and marks the "
        "answers; task=pretraining learns running text",
    ),
}
"""Kind of data -> the fields by which it is known, and what to do."""
UNPAIRED = "of good and bad answers, keep the good ones alone, without the label, to learn to give them"


@dataclass(frozen=True)
class InstructionForm(ConversationForm):
    """How a record becomes a conversation. For the other settings see `ConversationForm`.

    Args:
        empty_output: how an answer without text is treated: `refuse`, `skip`, or `keep` (its end is trained on).
    """

    needed: ClassVar[str] = "an instruction and an output"
    fields: ClassVar[tuple[str, ...]] = FIELDS

    empty_output: str = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.empty_output not in EMPTY_OUTPUTS:
            raise ValueError(f"data.empty_output={self.empty_output!r} must be one of {', '.join(EMPTY_OUTPUTS)}")

    def conversation(self, fields: Fields, counts: Counter[str]) -> Conversation:
        first, turns = self._turns(fields, counts)
        system = self.system(fields, first)
        tools = tools_of(fields.value("tools"), fields.name("tools"))
        check_questions(turns, "instruction")
        self._check_answers(turns)
        return Conversation(turns, system, group=fields.text("group", required=False), tools=tools)

    def _turns(self, fields: Fields, counts: Counter[str]) -> Turns:
        is_alpaca = fields.is_there("instruction") and fields.is_there("output")
        if fields.has("messages"):
            return self.turns(self.messages(fields, "messages", counts), counts)
        if fields.has("conversations") and not is_alpaca:
            return self.turns(self.messages(fields, "conversations", counts), counts)
        if fields.has("completion") and fields.has("prompt") and not is_alpaca:
            if isinstance(fields.record.get("label"), bool):
                raise KindError("this is a completion with a label, as for KTO", ["KTO's answers"], UNPAIRED)
            asked = self.said(fields, "prompt", "user", counts)
            return self.turns([*asked, *self.said(fields, "completion", "assistant", counts)], counts)
        if not fields.is_there("instruction") and not fields.is_there("output"):
            refuse_by_name(fields, OTHER_DATA)
        asked_last = Turn(fields.text("instruction"), fields.text("input", required=False), fields.text("output"))
        return None, (*self.earlier(fields, counts), asked_last)

    def _check_answers(self, turns: Sequence[Turn]) -> None:
        if self.empty_output == "keep":
            return
        trained = [turn for turn in turns if turn.is_trained]
        empty = [turn for turn in trained if not turn.response.strip() and not turn.calls]
        if (empty or not trained) and self.empty_output == "skip":
            raise SkippedError
        remedy = "data.empty_output=skip leaves such records out"
        if not trained:
            raise KindError("no answer has a loss: all have weight 0", ["without an answer that has a loss"], remedy)
        if empty:
            where = f" of turn {turns.index(empty[0]) + 1}" if len(turns) > 1 else ""
            raise ValueError(f"the output{where} is empty; {remedy}")


def read_instructions(
    source: Source,
    *,
    options: FileOptions | None = None,
    columns: Mapping[str, str | None] | None = None,
    empty_output: str = "refuse",
    **settings: Any,
) -> tuple[list[Conversation], int]:
    """Read all records of a file or a dataset.

    Args:
        source: files of records of any form, or a dataset of the hub.
        options: how the files are read.
        columns, empty_output, settings: of `InstructionForm`.

    Returns:
        the conversations, and the number of records skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    return collected(source, options or AS_THEY_ARE, InstructionForm(columns, empty_output, **settings))


def check_questions(turns: Sequence[Turn], name: str) -> None:
    """Raise ValueError if a question is empty; the result of a tool may be."""
    for number, turn in enumerate(turns, start=1):
        if not turn.instruction.strip() and not turn.before:
            where = f" of turn {number}" if len(turns) > 1 else ""
            raise ValueError(f"the {name}{where} is empty")
