"""Instruction records: questions with answers, read strictly from JSON, JSONL or a Hugging Face dataset.

A record is in the Alpaca format (`instruction`, `input`, `output`) or has `messages`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.records.messages import messages_of, turns_of
from llm_lightning.data.records.rows import SkippedError, Source, collected, field_names, text_field
from llm_lightning.data.templates.conversation import Conversation, Turn

FIELDS = ("instruction", "input", "output", "messages", "system", "group")
EMPTY_OUTPUTS = ("refuse", "skip", "keep")


@dataclass(frozen=True)
class InstructionForm:
    """How a record becomes a conversation; see `RecordForm`.

    Args:
        columns: names of the fields in the records, where they differ from `FIELDS`; None: there is no such field.
        empty_output: how an answer without text is treated: `refuse`, `skip`, or `keep` (its end is trained on).

    Raises:
        ValueError: if a setting is none of these.
    """

    needed: ClassVar[str] = "an instruction and an output"

    columns: Mapping[str, str | None] | None = None
    empty_output: str = "refuse"

    def __post_init__(self) -> None:
        if self.empty_output not in EMPTY_OUTPUTS:
            raise ValueError(f"data.empty_output={self.empty_output!r} must be one of {', '.join(EMPTY_OUTPUTS)}")
        self.names  # noqa: B018 (checked now)

    @cached_property
    def names(self) -> dict[str, str | None]:
        """field -> its name in the records; None: there is none."""
        return field_names(FIELDS, self.columns)

    def __call__(self, record: Mapping[str, Any], place: str, counts: Counter[str]) -> Conversation:
        return _conversation(record, place, self.names, self.empty_output)


def read_instructions(
    source: Source,
    *,
    options: FileOptions | None = None,
    columns: Mapping[str, str | None] | None = None,
    empty_output: str = "refuse",
) -> tuple[list[Conversation], int]:
    """Read all records of a file or a dataset.

    Args:
        source: files of records of any form, or a dataset of the hub.
        options: how the files are read.
        columns: names of the fields in the source, where they differ from `FIELDS`; None: there is no such field.
        empty_output: what happens to an answer without text: `refuse`, `skip`, or `keep` (its end is trained on).

    Returns:
        the conversations, and the number of records skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    return collected(source, options or AS_THEY_ARE, InstructionForm(columns, empty_output))


def _conversation(
    record: Mapping[str, Any], place: str, names: Mapping[str, str | None], empty_output: str
) -> Conversation:
    """Raises ValueError with the reason."""
    messages = names["messages"]
    system = text_field(record, names, "system", required=False) or None
    if messages is not None and record.get(messages) is not None:
        first, turns = turns_of(messages_of(record[messages], messages))
        if system and first:
            raise ValueError(f"a system message is both in {messages!r} and under {names['system']!r}")
        system = system or first
    else:
        turns = (
            Turn(
                text_field(record, names, "instruction"),
                text_field(record, names, "input", required=False),
                text_field(record, names, "output"),
            ),
        )
    for number, turn in enumerate(turns, start=1):
        where = f" of turn {number}" if len(turns) > 1 else ""
        if not turn.instruction.strip():
            raise ValueError(f"the instruction{where} is empty")
        if not turn.response.strip() and empty_output != "keep":
            if empty_output == "skip":
                raise SkippedError
            raise ValueError(f"the output{where} is empty; data.empty_output=skip leaves such records out")
    return Conversation(turns, system, place, text_field(record, names, "group", required=False), record)
