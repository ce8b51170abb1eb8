"""Preference data: prompts with a chosen and a rejected answer; the model learns to prefer the chosen one.

Data flow: records -> splits -> template -> token ids of prompt and answers -> batches, padded, or packed with shared
prefixes stored once. Everything that was dropped or cut is counted in `report()` and logged once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_lightning.data.conversations import ConversationDataModule, Layouts
from llm_lightning.data.pairs import (
    PairSample,
    collate_packed_pairs,
    collate_padded_pairs,
    packed_pairs_length,
)
from llm_lightning.data.records.preference import read_preferences
from llm_lightning.data.records.rows import Source
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.files.download import Pinned
from llm_lightning.terminal import counted
from llm_lightning.tokenizers.base import Tokenizer

NAMED: dict[str, Path | Pinned] = {
    "short_preferences": Path(__file__).with_name("embedded") / "short_preferences.json",
    # The 1,100 pairs of the book's chapter 7, section 4, Apache-2.0
    "book_preferences": Pinned(
        url="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/04_preference-tuning-with-dpo/"
        "instruction-data-with-preference.json",
        sha256="305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        n_bytes=386_968,
        filename="instruction-data-with-preference.json",
    ),
}


class PreferenceDataModule(ConversationDataModule[PairSample]):
    """Pairs of answers; a pair with equal answers is left out. For the other settings see `ConversationDataModule`.

    Args:
        name: `short_preferences` (embedded) or `book_preferences` (downloaded).
        empty_answer, repeated_prompt: see `PreferenceForm`.
        score_eos: whether the end of an answer is scored, so that the model learns when to stop; false: the book's.
        score_header: whether the fixed text before an answer is scored, without line breaks at its start (the book's).
        too_long: what happens to a pair whose prompt and longer answer exceed the context: `cut_prompt` from the left,
            alike for both answers (a pair with an answer that alone is too long is dropped), `drop`, or `cut_answer`:
            both answers from the right, to the same limit.
    """

    named = NAMED
    layouts = Layouts(collate_padded_pairs, collate_packed_pairs, packed_pairs_length)
    samples_are = "pairs"
    left_out_as = "identical"
    nothing_fits = (
        "no {split} pair of two different answers fits into {limit} tokens; raise model.context_length or "
        "data.max_length, or give more records"
    )

    def __init__(
        self,
        *,
        name: str | None = "short_preferences",
        empty_answer: str = "refuse",
        repeated_prompt: str = "strip",
        score_eos: bool = True,
        score_header: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(name=name, **common)
        self._repeated_prompt = repeated_prompt
        self._empty_answer, self._score_eos, self._score_header = empty_answer, score_eos, score_header

    def read_records(self, source: Source) -> tuple[list[Conversation], int]:
        return read_preferences(
            source,
            options=self.file_options,
            columns=self.columns,
            empty_answer=self._empty_answer,
            repeated_prompt=self._repeated_prompt,
            **self.form_settings,
        )

    def samples_of(
        self, records: Sequence[Conversation], counts: Counter[str]
    ) -> tuple[list[PairSample], dict[str, Any]]:
        options: dict[str, Any] = {"score_eos": self._score_eos, "score_header": self._score_header}
        rows = []
        for index, record in enumerate(records):
            one = self._fitted(encode_pair(self.tokenizer, self.template, index, record, **options), counts)
            if one is not None:
                rows.append(one)
        return rows, _facts(rows) if rows else {}

    def preview_titles(self, n_rows: int) -> list[str]:
        return titles_of_pairs(n_rows)

    def digest_more(self) -> list[Any]:
        return [[self._score_eos, self._score_header]]

    def lines_of(self, facts: dict[str, Any]) -> Iterable[str]:
        for split, part in facts["splits"].items():
            yield (
                f"{split}: {counted(part['pairs'], 'pair')}; chosen answers have {part['mean_chosen']:.1f} tokens, "
                f"rejected ones {part['mean_rejected']:.1f}; the chosen one is longer in {part['chosen_longer']:.0%}"
            )
        yield (
            f"{counted(facts['records'], 'record')}: {facts['skipped']} without answer and {facts['identical']} with "
            f"the same answer twice left out, {counted(facts['prompts_cut'], 'prompt')} and "
            f"{counted(facts['answers_cut'], 'answer')} cut to {facts['limit']} tokens, {facts['dropped']} dropped"
        )

    def _fitted(self, pair: PairSample, counts: Counter[str]) -> PairSample | None:
        """`pair` cut to the limit, or None if it is dropped or its answers are equal; both are counted."""
        most = self.limit + 1  # the last token is only a label
        prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        excess = len(prompt) + max(len(chosen), len(rejected)) - most
        if excess > 0 and self.too_long == "cut_prompt":
            prompt = prompt[self.kept_behind_cut(prompt, excess)]  # both answers follow the same prompt
        if excess > 0 and self.too_long == "cut_answer":
            room = max(most - len(prompt), 0)
            chosen, rejected = chosen[:room], rejected[:room]
        # Without a prompt nothing predicts the first token of an answer.
        is_useless = not len(prompt) or not len(chosen) or not len(rejected) or np.array_equal(chosen, rejected)
        if is_useless or (excess > 0 and self.too_long == "drop"):
            counts["dropped"] += 1
            return None
        if excess > 0:
            counts["prompts_cut" if self.too_long == "cut_prompt" else "answers_cut"] += 1
        return PairSample(pair.sample_id, prompt, chosen, rejected, min(pair.n_header, len(prompt) - 1))


def encode_pair(
    tokenizer: Tokenizer,
    template: Template,
    index: int,
    pair: Conversation,
    *,
    score_eos: bool = True,
    score_header: bool = False,
) -> PairSample:
    """Token ids of a whole pair, however long; see `PreferenceDataModule` for what is scored."""
    pieces = list(template.tokens(tokenizer, template.prompt(pair, tokenizer)))
    prompt = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in pieces)])
    chosen, rejected = (
        _answer(tokenizer, template, pair, text, score_eos) for text in (pair.turns[-1].response, pair.rejected or "")
    )
    return PairSample(index, prompt, chosen, rejected, _n_header(tokenizer, pieces) if score_header else 0)


def _answer(tokenizer: Tokenizer, template: Template, pair: Conversation, text: str, score_eos: bool) -> np.ndarray:
    """Token ids of one answer to the last question, with its end if that is scored."""
    last = pair.turns[-1]._replace(response=text)
    ids, end = template.answer_ids(tokenizer, pair._replace(turns=(*pair.turns[:-1], last)))
    return np.concatenate([ids, end]) if score_eos else ids


def titles_of_pairs(n_rows: int) -> list[str]:
    """Titles of rows that hold both answers of every pair."""
    return [f"record {row // 2}, {('chosen', 'rejected')[row % 2]}" for row in range(n_rows)]


def _n_header(tokenizer: Tokenizer, pieces: Sequence[tuple[np.ndarray, str]]) -> int:
    """Number of last prompt tokens that are the header, without the line breaks before it."""
    if not pieces or pieces[-1][1] != "header":
        return 0
    ids = pieces[-1][0].tolist()
    breaks = 0
    while breaks < len(ids) and tokenizer.decode([ids[breaks]]).isspace():
        breaks += 1
    return len(ids) - breaks


def _facts(rows: Sequence[PairSample]) -> dict[str, Any]:
    chosen, rejected = [len(row.chosen_ids) for row in rows], [len(row.rejected_ids) for row in rows]
    return {
        "pairs": len(rows),
        "mean_prompt": sum(len(row.prompt_ids) for row in rows) / len(rows),
        "mean_chosen": sum(chosen) / len(rows),
        "mean_rejected": sum(rejected) / len(rows),
        "chosen_longer": sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(rows),
        "most_tokens": max(len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids)) for row in rows),
    }
