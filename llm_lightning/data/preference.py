"""Preference data: prompts with a chosen and a rejected answer; the model learns to prefer the chosen one.

Data flow: records -> splits -> template -> token ids of prompt and answers -> batches, padded, or packed with shared
prefixes stored once. Everything that was dropped or cut is counted in `report()` and logged once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
from llm_lightning.data.record_store.samples import SampleKind
from llm_lightning.data.record_store.tokens import Pieces, encode_pair, of_kinds
from llm_lightning.data.records.preference import PreferenceForm
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


@dataclass(frozen=True)
class Scoring(SampleKind):
    """Which tokens of a pair are scored.

    Args:
        score_eos: the end of an answer, so that the model learns when to stop; false: the book's.
        score_header: the fixed text before an answer, without the line breaks at its start (the book's).
    """

    score_eos: bool = True
    score_header: bool = False
    encode = staticmethod(encode_pair)

    def sample(self, number: int, pieces: Pieces) -> PairSample | None:
        pair = self.whole(number, pieces)
        # Without a prompt nothing predicts the first token of an answer.
        is_useless = not len(pair.prompt_ids) or not len(pair.chosen_ids) or not len(pair.rejected_ids)
        return None if is_useless or np.array_equal(pair.chosen_ids, pair.rejected_ids) else pair

    def whole(self, number: int, pieces: Pieces) -> PairSample:
        """The pair, also if it is of no use."""
        prompt, chosen, rejected = self._parts(pieces)
        n_header = min(int(pieces.marked(_HEADER[pieces.kinds]).sum()), len(prompt) - 1) if self.score_header else 0
        return PairSample(number, prompt, chosen, rejected, n_header)

    def length(self, pieces: Pieces) -> int:
        prompt, chosen, rejected = map(len, self._parts(pieces))
        return prompt + max(chosen, rejected)

    def n_answer(self, pieces: Pieces) -> int:
        return sum(map(len, self._parts(pieces)[1:]))

    def with_cut_answers(self, pieces: Pieces, most: int) -> Pieces:
        """Both answers are cut to the same limit."""
        prompt, chosen, rejected = self._parts(pieces)
        room = max(most - len(prompt), 0)
        kept = [part for part in pieces.parts() if part[1] in ("prompt", "header")]
        return Pieces.of([*kept, (chosen[:room], "response"), (rejected[:room], "rejected")])

    def measures(self, sample: PairSample) -> tuple[int, ...]:
        return len(sample.prompt_ids), len(sample.chosen_ids), len(sample.rejected_ids)

    def facts(self, whole: np.ndarray, measures: np.ndarray) -> dict[str, Any]:
        prompt, chosen, rejected = measures.T.astype(np.int64)
        n = len(measures)
        return {
            "pairs": n,
            "mean_prompt": int(prompt.sum()) / n,
            "mean_chosen": int(chosen.sum()) / n,
            "mean_rejected": int(rejected.sum()) / n,
            "chosen_longer": int((chosen > rejected).sum()) / n,
            "most_tokens": int((prompt + np.maximum(chosen, rejected)).max()),
        }

    def _parts(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The scored tokens of prompt, chosen and rejected answer."""
        chosen = _CHOSEN if self.score_eos else _CHOSEN_TEXT
        rejected = _REJECTED if self.score_eos else _REJECTED_TEXT
        prompt, first, second = (pieces.ids[pieces.marked(one[pieces.kinds])] for one in (_PROMPT, chosen, rejected))
        return prompt, first, second


_PROMPT, _HEADER = of_kinds("prompt", "header"), of_kinds("header")
_CHOSEN, _CHOSEN_TEXT = of_kinds("response", "end"), of_kinds("response")
_REJECTED, _REJECTED_TEXT = of_kinds("rejected", "rejected_end"), of_kinds("rejected")


class PreferenceDataModule(ConversationDataModule[PairSample]):
    """Pairs of answers; a pair with equal answers is left out. For the other settings see `ConversationDataModule`.

    Args:
        name: `short_preferences` (embedded) or `book_preferences` (downloaded).
        empty_answer, repeated_prompt: see `PreferenceForm`.
        score_eos, score_header: see `Scoring`.
        too_long: what happens to a pair whose prompt and longer answer exceed the context: `cut_prompt` (see
            `cutting.py`; alike for both answers; a pair with an answer that alone is too long is dropped), `drop`, or
            `cut_answer`: both answers from the right, to the same limit.
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
        self._empty_answer, self._scoring = empty_answer, Scoring(score_eos, score_header)

    @property
    def form(self) -> PreferenceForm:
        return PreferenceForm(
            columns=self.columns,
            empty_answer=self._empty_answer,
            repeated_prompt=self._repeated_prompt,
            **self.form_settings,
        )

    @property
    def kind(self) -> Scoring:
        return self._scoring

    def titled(self, record: str, sequence: int) -> str:
        return f"{record}, {('chosen', 'rejected')[sequence]}"

    def digest_more(self) -> list[Any]:
        return [[self._scoring.score_eos, self._scoring.score_header]]

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


def encode(tokenizer: Tokenizer, template: Template, pair: Conversation, scoring: Scoring | None = None) -> PairSample:
    """Token ids of a whole pair, however long."""
    return (scoring or Scoring()).whole(0, Pieces.of(encode_pair(tokenizer, template, pair)))


def titles_of_pairs(n_rows: int) -> list[str]:
    """Titles of rows that hold both answers of every pair."""
    return [f"record {row // 2}, {('chosen', 'rejected')[row % 2]}" for row in range(n_rows)]
