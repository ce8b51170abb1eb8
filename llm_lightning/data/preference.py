"""Preference data: prompts with a chosen and a rejected answer, of which a model learns to prefer the chosen one.

What flows: records -> pairs -> splits -> template -> token ids of prompt and answers -> batches, padded or packed with
what sequences have in common only once. Everything that was dropped or cut is counted in `report()` and said once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from llm_lightning.data.base import BaseDataModule, evenly_spaced
from llm_lightning.data.batches import (
    LMBatch,
    PairSample,
    PreferenceBatch,
    collate_packed_pairs,
    collate_padded,
    collate_padded_pairs,
    packed_length,
)
from llm_lightning.data.conversations import (
    BATCHES_LOOKED_AT,
    CHOICES,
    PACKING_PAYS_FROM,
    check_choices,
    check_name,
    check_numbers,
    check_slots,
    file_of,
    leaks,
    refuse_losses,
    split_conversations,
)
from llm_lightning.data.download import Pinned
from llm_lightning.data.order import bucketed_order
from llm_lightning.data.preference_records import PreferencePair, read_hugging_face_preferences, read_preferences
from llm_lightning.data.splits import SPLITS
from llm_lightning.data.templates import Conversation, Template, choose_template
from llm_lightning.tokenizers import Tokenizer

log = logging.getLogger(__name__)

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


class Pairs(Dataset):
    """The samples of a split."""

    def __init__(self, rows: list[PairSample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PairSample:
        return self.rows[index]


class PreferenceDataModule(BaseDataModule):
    """Pairs in a training, a validation and a test split. Pairs whose answers are the same are left out.

    Args:
        tokenizer: or a function that trains one on the training texts.
        context_length: most tokens that the model reads.
        name: `short_preferences` (embedded) or `book_preferences` (downloaded).
        path: a file of your own; with a downloaded set, a local copy of it.
        columns, empty_answer: see `read_preferences`.
        hf_dataset, hf_config, hf_split, hf_revision: a dataset of the hub instead.
        template: `alpaca`, `phi3`, `chatml`, or a text with slots, see `templates.py`.
        split: `grouped` (a prompt, or the records of a group, never stand in two splits) or `order` (the book's: the
            first records are for training, then test, then validation).
        val_fraction, test_fraction: of the records.
        split_seed: of the grouped split; another than that of training, so that a sweep over seeds sees one split.
        score_eos: whether the end of an answer is part of it, so that the model learns when to stop; false: the book's.
        score_header: whether the fixed text in front of an answer is scored, line breaks before it aside (the book's).
        too_long: of a pair of which the prompt and the longer answer exceed the context: `cut_prompt` from the left,
            for both answers alike (a pair with an answer too long by itself is dropped), `drop`, or `cut_answer`: both
            answers from the right, to the same limit.
        max_lost: the share of records that may be dropped or have an answer cut.
        max_length: tokens of input; default: `context_length`.
        packing: sequences end to end, and what they have in common only once: true, false (padded), or `auto`: where
            that saves more than 5% of the positions.
        bucket: batches of similar length; false: a plain shuffle.
    """

    template: Template
    pad_id: int

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Callable[[Iterable[str]], Tokenizer],
        context_length: int,
        name: str | None = "short_preferences",
        path: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        empty_answer: str = "refuse",
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        template: str = "alpaca",
        split: str = "grouped",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_seed: int = 123,
        score_eos: bool = True,
        score_header: bool = False,
        too_long: str = "cut_prompt",
        max_lost: float = 0.05,
        max_length: int | None = None,
        packing: bool | str = "auto",
        bucket: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        check_choices(CHOICES, split=split, too_long=too_long, packing=packing)
        check_numbers(val_fraction, test_fraction, max_lost, max_length)
        check_name(name, NAMED)
        if path is not None and name is not None and isinstance(NAMED[name], Path):
            name = None  # a file of one's own wins over the embedded set, of which nobody has a copy
        self.template = choose_template(template)
        self._make_tokenizer, self.context_length = tokenizer, context_length
        self._name, self._path = name, path
        self._columns, self._empty_answer = columns, empty_answer
        self._hub = (hf_dataset, hf_config, hf_split, hf_revision)
        self._split, self._fractions, self._split_seed = split, (val_fraction, test_fraction), split_seed
        self._score_eos, self._score_header = score_eos, score_header
        self._too_long, self._max_lost = too_long, max_lost
        self._limit = min(max_length or context_length, context_length)
        self._packing, self._bucket = packing, bucket
        self.is_packed, self._share_prefix = packing is True, True
        self._pairs: dict[str, list[PreferencePair]] = {}
        self._report: dict[str, Any] = {}

    def build(self) -> None:
        records, skipped = self._read()
        conversations = [pair.conversation for pair in records]
        check_slots(self.template, conversations)
        # Split first: where equal answers are left out must not move what stands in which split.
        parts = split_conversations(conversations, self._split, self._fractions, self._split_seed)
        self._pairs = {
            split: [records[index] for index in part if not records[index].is_identical]
            for split, part in parts.items()
        }
        make = self._make_tokenizer
        self.tokenizer = make if isinstance(make, Tokenizer) else make(self._training_texts())
        if self.tokenizer.eot_id is None:
            raise ValueError("this tokenizer has no end-of-text token, with which an answer ends; use another one")
        self.pad_id = self.tokenizer.eot_id
        identical = len(records) - sum(map(len, self._pairs.values()))
        self._report = {"records": len(records), "skipped": skipped, "identical": identical, "split": self._split}
        self._encode()
        asked = {split: self.conversations_of(split) for split in SPLITS}
        self._report |= {"leaks": {split: leaks(asked, split) for split in ("val", "test")}}
        self.choose_layout(share_prefix=True)
        self.data_digest = self._digest()
        for line in self._lines():
            log.info(line)

    def collate(self, samples: Sequence[PairSample]) -> PreferenceBatch:
        if self.is_packed:
            return collate_packed_pairs(samples, pad_id=self.pad_id, share_prefix=self._share_prefix)
        return collate_padded_pairs(samples, pad_id=self.pad_id, context_length=self.context_length)

    def order_of(self, samples: Any, *, is_training: bool) -> Callable[[int], np.ndarray] | None:
        if not self._bucket or (is_training and not self.shuffle):
            return None
        pairs = [samples[index] for index in range(len(samples))]
        lengths = [2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
        if not is_training:
            return lambda epoch: np.argsort(lengths, kind="stable")
        return lambda epoch: bucketed_order(lengths, [0] * len(lengths), seed=self.seed, epoch=epoch)

    def preview(self, n: int) -> str:
        from llm_lightning.data.inspection import as_text

        batch = self.first_batch("train", n)
        titles = [f"record {row // 2}, {('chosen', 'rejected')[row % 2]}" for row in range(len(batch.input_ids))]
        return as_text(self.tokenizer, batch, colour=sys.stdout.isatty(), titles=titles)

    def first_batch(self, split: str, n: int) -> LMBatch:
        """The first `n` pairs of a split as 2n padded sequences: chosen, rejected, chosen, rejected, and so on."""
        samples: Any = {"train": self.train_samples, **self.eval_samples, **self.test_samples}[split]
        pairs = [samples[index] for index in range(min(n, len(samples)))]
        sequences = [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]
        return collate_padded(sequences, pad_id=self.pad_id, context_length=self.context_length)

    def describe(self) -> str:
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self._pairs.items())
        layout = "packed" if self.is_packed else "padded"
        return f"{self._source()}: {sizes} pairs; template {self.template.name}, {layout}"

    def report(self) -> dict[str, Any]:
        return self._report

    def pairs_of(self, split: str) -> list[PreferencePair]:
        """The pairs of `train`, `val` or `test`, also those that are too long to train on."""
        return self._pairs[split]

    def conversations_of(self, split: str) -> list[Conversation]:
        """The same with the chosen answers alone."""
        return [pair.conversation for pair in self._pairs[split]]

    def sample_prompts(self, n: int) -> list[list[int]]:
        """Token ids of the prompts of the first `n` validation records that leave room for an answer."""
        prompts = (self.template.prompt_ids(self.tokenizer, one) for one in self.conversations_of("val"))
        return [ids for ids in prompts if len(ids) < self.context_length][:n]

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[list[PreferencePair], int]:
        options: dict[str, Any] = {"columns": self._columns, "empty_answer": self._empty_answer}
        dataset, config, split, revision = self._hub
        if dataset is not None:
            return read_hugging_face_preferences(dataset, config, split, revision, **options)
        if self._path is not None:
            return read_preferences(self._path, **options)
        if self._name is None:
            raise ValueError("data.name and data.path are both null; give data.path=FILE, .json or .jsonl")
        return read_preferences(file_of(NAMED[self._name]), **options)

    def _training_texts(self) -> Iterable[str]:
        for pair in self._pairs["train"]:
            yield "".join(segment.text for segment in self.template.segments(pair.conversation))
            yield pair.rejected

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        counts: Counter[str] = Counter()
        samples: dict[str, Pairs] = {}
        facts: dict[str, Any] = {}
        for split in SPLITS:
            fitted = [self._fitted(self._encoded(index, one), counts) for index, one in enumerate(self._pairs[split])]
            rows = [one for one in fitted if one is not None]
            if not rows:
                raise ValueError(
                    f"no {split} pair of two different answers fits into {self._limit} tokens; raise "
                    "model.context_length or data.max_length, or give more records"
                )
            samples[split], facts[split] = Pairs(rows), _facts(rows)
        counted = {name: counts[name] for name in ("prompts_cut", "answers_cut", "dropped")}
        self._report |= {"limit": self._limit, "splits": facts, "too_long": self._too_long, **counted}
        refuse_losses(self._report, self._max_lost)
        self.train_samples, self.test_samples = samples["train"], {"test": samples["test"]}
        self.eval_samples = {"val": samples["val"]}
        if self.eval_batches > 0:
            self.eval_samples["train_eval"] = evenly_spaced(samples["train"], self.eval_batches * self.batch_size)

    def _encoded(self, index: int, pair: PreferencePair) -> PairSample:
        pieces = list(self.template.tokens(self.tokenizer, self.template.prompt(pair.conversation)))
        prompt = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in pieces)])
        chosen, rejected = self._answer(pair.chosen), self._answer(pair.rejected)
        return PairSample(index, prompt, chosen, rejected, self._n_header(pieces))

    def _answer(self, text: str) -> np.ndarray:
        end = [self.pad_id] if self._score_eos else []
        return np.concatenate([self.tokenizer.encode_array(text), np.array(end, dtype=np.int64)])

    def _n_header(self, pieces: Sequence[tuple[np.ndarray, str]]) -> int:
        """How many of the last tokens of a prompt are scored, too."""
        if not self._score_header or not pieces or pieces[-1][1] != "header":
            return 0
        ids = pieces[-1][0].tolist()
        breaks = 0
        while breaks < len(ids) and self.tokenizer.decode([ids[breaks]]).isspace():
            breaks += 1
        return len(ids) - breaks

    def _fitted(self, pair: PairSample, counts: Counter[str]) -> PairSample | None:
        """`pair` within the limit and with something to prefer, or None; what was done is counted."""
        most = self._limit + 1  # the last token is only a label
        prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        excess = len(prompt) + max(len(chosen), len(rejected)) - most
        if excess > 0 and self._too_long == "cut_prompt":
            prompt = prompt[excess:]  # both answers stand behind the same prompt
        if excess > 0 and self._too_long == "cut_answer":
            room = max(most - len(prompt), 0)
            chosen, rejected = chosen[:room], rejected[:room]
        # Without a prompt nothing predicts the first token of an answer.
        is_lost = not len(prompt) or not len(chosen) or not len(rejected) or np.array_equal(chosen, rejected)
        if is_lost or (excess > 0 and self._too_long == "drop"):
            counts["dropped"] += 1
            return None
        if excess > 0:
            counts["prompts_cut" if self._too_long == "cut_prompt" else "answers_cut"] += 1
        return PairSample(pair.sample_id, prompt, chosen, rejected, min(pair.n_header, len(prompt) - 1))

    def choose_layout(self, *, share_prefix: bool) -> None:
        """Decide on padded or packed batches.

        Args:
            share_prefix: whether what sequences of a batch begin with may be computed once.
        """
        self._share_prefix = share_prefix
        saved = self._saved_by_packing()
        if self._packing == "auto":
            self.is_packed = saved > PACKING_PAYS_FROM
        self._report |= {"packed": self.is_packed, "saved_by_packing": round(saved, 4)}

    def _saved_by_packing(self) -> float:
        """The share of positions that packing leaves out, over the first batches of the first epoch."""
        padded = packed = 0
        for batch in self.first_batches(BATCHES_LOOKED_AT):
            longest = max(len(one.prompt_ids) + max(len(one.chosen_ids), len(one.rejected_ids)) for one in batch)
            padded += 2 * len(batch) * (longest - 1)
            packed += packed_length(batch, share_prefix=self._share_prefix)
        return 1 - packed / padded

    # --- words -----------------------------------------------------------------------------------------------------

    def _source(self) -> str:
        return self._hub[0] or (f"{self._name}" if self._path is None else str(self._path))

    def _digest(self) -> str:
        content = {
            split: [[pair.conversation.system, *map(list, pair.conversation.turns), pair.rejected] for pair in rows]
            for split, rows in self._pairs.items()
        }
        scored = [self._score_eos, self._score_header]
        return hashlib.sha256(
            json.dumps([content, self.template.text, self.template.system, scored]).encode()
        ).hexdigest()

    def _lines(self) -> Iterable[str]:
        """What a person should know of the data before believing a number about it."""
        facts = self._report
        for split, part in facts["splits"].items():
            yield (
                f"{split}: {part['pairs']:,} pairs; chosen answers have {part['mean_chosen']:.1f} tokens, rejected "
                f"ones {part['mean_rejected']:.1f}; the chosen one is the longer in {part['chosen_longer']:.0%}"
            )
        yield (
            f"{facts['records']:,} records: {facts['skipped']} without answer and {facts['identical']} with the same "
            f"answer twice left out, {facts['prompts_cut']} prompts and {facts['answers_cut']} answers cut to "
            f"{facts['limit']} tokens, {facts['dropped']} dropped"
        )
        leak = facts["leaks"]["test"]
        yield f"Test prompts that stand in training, too: {leak['prompts']} of {leak['of']}"


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
