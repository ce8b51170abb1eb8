"""Instruction data: conversations, rendered by a template; the loss is taken on the answers.

Data flow: records -> splits -> template -> token ids, each marked as prompt or answer -> batches, padded or packed.
Everything that was dropped or cut is counted in `report()` and logged once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_lightning.data.batches import Example, collate_packed, collate_padded, packed_length
from llm_lightning.data.conversations import ConversationDataModule, Layouts
from llm_lightning.data.record_store.limits import check_choices
from llm_lightning.data.record_store.samples import SampleKind
from llm_lightning.data.record_store.tokens import KINDS, Pieces, encode_conversation, of_kinds
from llm_lightning.data.records.instruction import InstructionForm
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.files.download import Pinned
from llm_lightning.terminal import counted
from llm_lightning.tokenizers.base import Tokenizer

NAMED: dict[str, Path | Pinned] = {
    "short_answers": Path(__file__).with_name("embedded") / "short_answers.json",
    # The 1,100 records of the book's chapter 7, Apache-2.0
    "book_instructions": Pinned(
        url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/"
        "instruction-data.json",
        sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        n_bytes=203_524,
        filename="instruction-data.json",
    ),
    # Stanford Alpaca (Taori et al. 2023), CC BY-NC 4.0, 52,002 records
    "alpaca_52k": Pinned(
        url="https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
        "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
        sha256="2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
        n_bytes=None,
        filename="alpaca_data.json",
    ),
}
LOSS_ON = ("response", "header", "all")
_CHOICES = {"loss_on": LOSS_ON, "eos_targets": ("all", "first")}


@dataclass(frozen=True)
class Targets(SampleKind):
    """Which tokens of a conversation are trained on.

    Args:
        loss_on: `response` (each answer and its end), `header` (also the fixed text before an answer, as in the book's
            exercise 7.2), or `all` (also the prompt: the book's chapter 7).
        eos_targets: whether `all` ends of a conversation are targets, or the `first` one (the book's collate function).
    """

    loss_on: str = "response"
    eos_targets: str = "all"
    encode = staticmethod(encode_conversation)

    def sample(self, number: int, pieces: Pieces) -> Example | None:
        example = Example(number, pieces.ids, self.are_targets(pieces))
        return example if example.label_mask.any() else None

    def are_targets(self, pieces: Pieces) -> np.ndarray:
        """(n,) bool."""
        is_target = _TRAINED[self.loss_on][pieces.kinds]
        if self.eos_targets == "first":
            is_target[np.flatnonzero(pieces.kinds == _END)[1:]] = False
        return pieces.marked(is_target)

    def length(self, pieces: Pieces) -> int:
        return len(pieces.ids)

    def n_answer(self, pieces: Pieces) -> int:
        # The first token of a row is never a target, even of an answer.
        return int(pieces.marked(_ANSWERS[pieces.kinds])[1:].sum())

    def with_cut_answers(self, pieces: Pieces, most: int) -> Pieces:
        return pieces.cut(most)

    def measures(self, sample: Example) -> tuple[int, ...]:
        return (sample.n_targets,)

    def facts(self, whole: np.ndarray, measures: np.ndarray) -> dict[str, Any]:
        return {
            "records": len(measures),
            "mean_tokens": int(whole.sum()) / len(whole),
            "most_tokens": int(whole.max()),
            "targets": int(measures.sum()),
        }


_TRAINED = {
    "response": of_kinds("response", "end"),
    "header": of_kinds("header", "response", "end"),
    "all": ~of_kinds("untrained"),
}
_ANSWERS, _END = of_kinds("response", "end"), KINDS.index("end")


class InstructionDataModule(ConversationDataModule[Example]):
    """Conversations with the loss on their answers. For the other settings see `ConversationDataModule`.

    Args:
        name: `short_answers` (embedded), `book_instructions` or `alpaca_52k` (downloaded).
        empty_output: see `read_instructions`.
        loss_on, eos_targets: see `Targets`.
        too_long: what happens to a conversation longer than the context: `cut_prompt` (see `cutting.py`; one whose last
            answer alone is too long is dropped), `drop`, or `cut_answer` from the right (the book's).
    """

    named = NAMED
    layouts = Layouts(collate_padded, collate_packed, packed_length)
    samples_are = "records"
    nothing_fits = "no {split} record fits into {limit} tokens; raise model.context_length or data.max_length"

    def __init__(
        self,
        *,
        name: str | None = "short_answers",
        empty_output: str = "refuse",
        loss_on: str = "response",
        eos_targets: str = "all",
        **common: Any,
    ) -> None:
        super().__init__(name=name, **common)
        check_choices(_CHOICES, loss_on=loss_on, eos_targets=eos_targets)
        self._empty_output, self._targets = empty_output, Targets(loss_on, eos_targets)

    @property
    def form(self) -> InstructionForm:
        return InstructionForm(columns=self.columns, empty_output=self._empty_output, **self.form_settings)

    @property
    def kind(self) -> Targets:
        return self._targets

    def lines_of(self, facts: dict[str, Any]) -> Iterable[str]:
        before = " before cuts" if facts["prompts_cut"] or facts["answers_cut"] or facts["dropped"] else ""
        for split, part in facts["splits"].items():
            yield (
                f"{split}: {counted(part['records'], 'record')}; {part['mean_tokens']:.1f} tokens each{before}, "
                f"at most {part['most_tokens']}; loss on {counted(part['targets'], 'token')}"
            )
        yield (
            f"{counted(facts['records'], 'record')}: {facts['skipped']} without answer left out, "
            f"{counted(facts['prompts_cut'], 'prompt')} and {counted(facts['answers_cut'], 'answer')} cut to "
            f"{facts['limit']} tokens, {facts['dropped']} dropped"
        )


def encode(
    tokenizer: Tokenizer, template: Template, conversation: Conversation, targets: Targets | None = None
) -> Example:
    """Token ids of a whole conversation, however long, and which of them are targets."""
    pieces = Pieces.of(encode_conversation(tokenizer, template, conversation))
    return Example(0, pieces.ids, (targets or Targets()).are_targets(pieces))
