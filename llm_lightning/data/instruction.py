"""Instruction data: conversations, rendered by a template; the loss is taken on the answers.

Data flow: records -> splits -> template -> token ids, each marked as prompt or answer -> batches, padded or packed.
Everything that was dropped or cut is counted in `report()` and logged once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_lightning.data.batches import Example, collate_packed, collate_padded, packed_length
from llm_lightning.data.conversations import ConversationDataModule, Layouts, check_choices
from llm_lightning.data.records.instruction import read_instructions
from llm_lightning.data.records.rows import Source
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


class Encoded(NamedTuple):
    """Token ids of a conversation."""

    ids: np.ndarray
    is_target: np.ndarray
    is_answer: np.ndarray
    """(n,) bool: answers and their ends, whatever the targets are."""
    answer_at: int
    """Index of the first token of the last answer that is trained."""


class InstructionDataModule(ConversationDataModule[Example]):
    """Conversations with the loss on their answers. For the other settings see `ConversationDataModule`.

    Args:
        name: `short_answers` (embedded), `book_instructions` or `alpaca_52k` (downloaded).
        empty_output: see `read_instructions`.
        loss_on: the targets: `response` (each answer and its end), `header` (also the fixed text before an answer, as
            in the book's exercise 7.2), or `all` (also the prompt: the book's chapter 7).
        eos_targets: whether `all` ends of a conversation are targets, or the `first` one (the book's collate function).
        too_long: what happens to a conversation longer than the context: `cut_prompt` from the left, behind the id that
            begins a text (a conversation whose answer alone is too long is dropped), `drop`, or `cut_answer` from the
            right (the book's).
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
        self._empty_output, self._loss_on, self._eos_targets = empty_output, loss_on, eos_targets

    def read_records(self, source: Source) -> tuple[list[Conversation], int]:
        return read_instructions(
            source,
            options=self.file_options,
            columns=self.columns,
            empty_output=self._empty_output,
            **self.form_settings,
        )

    def samples_of(self, records: Sequence[Conversation], counts: Counter[str]) -> tuple[list[Example], dict[str, Any]]:
        options = {"loss_on": self._loss_on, "eos_targets": self._eos_targets}
        encoded = [encode(self.tokenizer, self.template, one, **options) for one in records]
        fitted = [self._fitted(one, counts) for one in encoded]
        rows = [Example(index, one.ids, one.is_target) for index, one in enumerate(fitted) if one is not None]
        return rows, _facts(encoded, rows)

    def lines_of(self, facts: dict[str, Any]) -> Iterable[str]:
        for split, part in facts["splits"].items():
            yield (
                f"{split}: {counted(part['records'], 'record')}; {part['mean_tokens']:.1f} tokens each, at most "
                f"{part['most_tokens']}; loss on {counted(part['targets'], 'token')}"
            )
        yield (
            f"{counted(facts['records'], 'record')}: {facts['skipped']} without answer left out, "
            f"{counted(facts['prompts_cut'], 'prompt')} and {counted(facts['answers_cut'], 'answer')} cut to "
            f"{facts['limit']} tokens, {facts['dropped']} dropped"
        )

    def _fitted(self, one: Encoded, counts: Counter[str]) -> Encoded | None:
        """`one` cut to the limit, or None if it is dropped; both are counted."""
        excess = len(one.ids) - (self.limit + 1)  # the last token is only a label
        if excess > 0 and (self.too_long == "drop" or (self.too_long == "cut_prompt" and excess >= one.answer_at)):
            counts["dropped"] += 1
            return None
        kept = np.arange(self.limit + 1 if excess > 0 else len(one.ids))
        if excess > 0 and self.too_long == "cut_prompt":
            kept = self.kept_behind_cut(one.ids, excess)
        fitted = Encoded(one.ids[kept], one.is_target[kept], one.is_answer[kept], one.answer_at)
        if not fitted.is_target[1:].any():
            counts["dropped"] += 1
            return None
        if excess > 0:
            # The first token of a row is never a target, even of an answer.
            counts["answers_cut" if fitted.is_answer[1:].sum() < one.is_answer.sum() else "prompts_cut"] += 1
        return fitted


def encode(
    tokenizer: Tokenizer,
    template: Template,
    conversation: Conversation,
    *,
    loss_on: str = "response",
    eos_targets: str = "all",
) -> Encoded:
    """Token ids of a whole conversation, and which of them are targets."""
    trained = {"response": {"response", "end"}, "header": {"header", "response", "end"}}.get(loss_on)
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    prompt_end, answer_at, n_ids, n_ends = 0, 0, 0, 0
    for piece, kind in template.tokens(tokenizer, template.segments(conversation, tokenizer)):
        is_target = kind != "untrained" and (trained is None or kind in trained)
        if kind == "end":
            n_ends += 1
            is_target = is_target and (eos_targets == "all" or n_ends == 1)
        if kind in ("header", "prompt"):
            prompt_end = n_ids + len(piece)
        elif kind != "untrained":
            answer_at = prompt_end
        n_ids += len(piece)
        ids.append(piece)
        targets.append(np.full(len(piece), is_target))
        answers.append(np.full(len(piece), kind in ("response", "end")))
    return Encoded(np.concatenate(ids), np.concatenate(targets), np.concatenate(answers), answer_at)


def _facts(encoded: Sequence[Encoded], rows: Sequence[Example]) -> dict[str, Any]:
    lengths = [len(one.ids) for one in encoded]
    return {
        "records": len(rows),
        "mean_tokens": sum(lengths) / len(lengths),
        "most_tokens": max(lengths),
        "targets": sum(row.n_targets for row in rows),
    }
