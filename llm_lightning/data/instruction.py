"""Instruction data: conversations, rendered by a template, of which the model learns the answers.

What flows: records -> conversations -> splits -> template -> token ids, each marked as prompt or answer -> batches,
padded or packed. Everything that was dropped or cut is counted in `report()` and said once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from llm_lightning.data.base import BaseDataModule, evenly_spaced
from llm_lightning.data.batches import LMBatch, MaskedSample, collate_packed, collate_padded, shared_prefix
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
from llm_lightning.data.instruction_records import read_hugging_face_instructions, read_instructions
from llm_lightning.data.order import bucketed_order
from llm_lightning.data.splits import SPLITS
from llm_lightning.data.templates import Conversation, Segment, Template, choose_template
from llm_lightning.tokenizers import Tokenizer

log = logging.getLogger(__name__)

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
_CHOICES = {**CHOICES, "loss_on": LOSS_ON, "eos_targets": ("all", "first")}


class Encoded(NamedTuple):
    """Token ids of a conversation."""

    ids: np.ndarray
    is_target: np.ndarray
    is_answer: np.ndarray
    """(n,) bool: answers and their ends, whatever the loss is taken on."""
    answer_at: int
    """Where the last answer begins."""


class Conversations(Dataset):
    """The samples of a split."""

    def __init__(self, rows: list[MaskedSample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> MaskedSample:
        return self.rows[index]


class InstructionDataModule(BaseDataModule):
    """Conversations in a training, a validation and a test split.

    Args:
        tokenizer: or a function that trains one on the training texts.
        context_length: most tokens that the model reads.
        name: `short_answers` (embedded), `book_instructions` or `alpaca_52k` (downloaded).
        path: a file of your own; with a downloaded set, a local copy of it.
        columns, empty_output: see `read_instructions`.
        hf_dataset, hf_config, hf_split, hf_revision: a dataset of the hub instead.
        template: `alpaca`, `phi3`, `chatml`, or a text with slots, see `templates.py`.
        split: `grouped` (a prompt, or the records of a group, never stand in two splits) or `order` (the book's: the
            first records are for training, then test, then validation).
        val_fraction, test_fraction: of the records.
        split_seed: of the grouped split; another than that of training, so that a sweep over seeds sees one split.
        loss_on: `response` (each answer and its end), `header` (also the fixed text in front of it, as in the book's
            exercise 7.2), or `all` (the prompt, too: the book's chapter 7).
        eos_targets: `all` ends are learnt, or only the `first` of a conversation (the book's collate function).
        too_long: of a conversation longer than the context: `cut_prompt` from the left (an answer too long by itself
            is dropped), `drop`, or `cut_answer` from the right (the book's).
        max_lost: the share of records that may be dropped or have an answer cut.
        max_length: tokens of input; default: `context_length`.
        packing: sequences end to end, and what all of a batch begin with only once: true, false (padded), or `auto`:
            where that saves more than 5% of the positions.
        bucket: batches of similar length; false: a plain shuffle.
    """

    template: Template
    pad_id: int

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Callable[[Iterable[str]], Tokenizer],
        context_length: int,
        name: str | None = "short_answers",
        path: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        empty_output: str = "refuse",
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        template: str = "alpaca",
        split: str = "grouped",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_seed: int = 123,
        loss_on: str = "response",
        eos_targets: str = "all",
        too_long: str = "cut_prompt",
        max_lost: float = 0.05,
        max_length: int | None = None,
        packing: bool | str = "auto",
        bucket: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        given = {"split": split, "loss_on": loss_on, "eos_targets": eos_targets, "too_long": too_long}
        check_choices(_CHOICES, **given, packing=packing)
        check_numbers(val_fraction, test_fraction, max_lost, max_length)
        check_name(name, NAMED)
        if path is not None and name is not None and isinstance(NAMED[name], Path):
            name = None  # a file of one's own wins over the embedded set, of which nobody has a copy
        self.template = choose_template(template)
        self._make_tokenizer, self.context_length = tokenizer, context_length
        self._name, self._path = name, path
        self._columns, self._empty_output = columns, empty_output
        self._hub = (hf_dataset, hf_config, hf_split, hf_revision)
        self._split, self._fractions, self._split_seed = split, (val_fraction, test_fraction), split_seed
        self._loss_on, self._eos_targets = loss_on, eos_targets
        self._too_long, self._max_lost = too_long, max_lost
        self._limit = min(max_length or context_length, context_length)
        self._packing, self._bucket = packing, bucket
        self.is_packed, self._share_prefix = packing is True, True
        self._conversations: dict[str, list[Conversation]] = {}
        self._report: dict[str, Any] = {}

    def build(self) -> None:
        records, skipped = self._read()
        check_slots(self.template, records)
        parts = split_conversations(records, self._split, self._fractions, self._split_seed)
        self._conversations = {split: [records[index] for index in part] for split, part in parts.items()}
        make = self._make_tokenizer
        texts = (_text(self.template.segments(one)) for one in self._conversations["train"])
        self.tokenizer = make if isinstance(make, Tokenizer) else make(texts)
        if self.tokenizer.eot_id is None:
            raise ValueError("this tokenizer has no end-of-text token, with which an answer ends; use another one")
        self.pad_id = self.tokenizer.eot_id
        self._report = {"records": len(records), "skipped": skipped, "split": self._split}
        self._encode()
        self._report |= {"leaks": {split: leaks(self._conversations, split) for split in ("val", "test")}}
        self.choose_layout(share_prefix=True)
        self.data_digest = self._digest()
        for line in self._lines():
            log.info(line)

    def collate(self, samples: Sequence[MaskedSample]) -> LMBatch:
        if self.is_packed:
            return collate_packed(samples, pad_id=self.pad_id, share_prefix=self._share_prefix)
        return collate_padded(samples, pad_id=self.pad_id, context_length=self.context_length)

    def order_of(self, samples: Any, *, is_training: bool) -> Callable[[int], np.ndarray] | None:
        if not self._bucket or (is_training and not self.shuffle):
            return None
        lengths = [len(samples[index].token_ids) for index in range(len(samples))]
        if not is_training:
            return lambda epoch: np.argsort(lengths, kind="stable")
        return lambda epoch: bucketed_order(lengths, [0] * len(lengths), seed=self.seed, epoch=epoch)

    def preview(self, n: int) -> str:
        from llm_lightning.data.inspection import as_text

        return as_text(self.tokenizer, self.first_batch("train", n), colour=sys.stdout.isatty())

    def first_batch(self, split: str, n: int) -> LMBatch:
        """The first `n` samples of a split, padded."""
        samples: Any = {"train": self.train_samples, **self.eval_samples, **self.test_samples}[split]
        rows = [samples[index] for index in range(min(n, len(samples)))]
        return collate_padded(rows, pad_id=self.pad_id, context_length=self.context_length)

    def describe(self) -> str:
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self._conversations.items())
        return f"{self._source()}: {sizes}; template {self.template.name}, {'packed' if self.is_packed else 'padded'}"

    def report(self) -> dict[str, Any]:
        return self._report

    def conversations_of(self, split: str) -> list[Conversation]:
        """The conversations of `train`, `val` or `test`, also those that are too long to train on."""
        return self._conversations[split]

    def sample_prompts(self, n: int) -> list[list[int]]:
        """Token ids of the prompts of the first `n` validation records that leave room for an answer."""
        prompts = (self.template.prompt_ids(self.tokenizer, one) for one in self._conversations["val"])
        return [ids for ids in prompts if len(ids) < self.context_length][:n]

    # --- reading and splitting -------------------------------------------------------------------------------------

    def _read(self) -> tuple[list[Conversation], int]:
        options: dict[str, Any] = {"columns": self._columns, "empty_output": self._empty_output}
        dataset, config, split, revision = self._hub
        if dataset is not None:
            return read_hugging_face_instructions(dataset, config, split, revision, **options)
        if self._path is not None:
            return read_instructions(self._path, **options)
        if self._name is None:
            raise ValueError("data.name and data.path are both null; give data.path=FILE, .json or .jsonl")
        return read_instructions(local_file(self._name), **options)

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        counts: Counter[str] = Counter()
        samples: dict[str, Conversations] = {}
        facts: dict[str, Any] = {}
        for split in SPLITS:
            options = {"loss_on": self._loss_on, "eos_targets": self._eos_targets}
            encoded = [encode(self.tokenizer, self.template, one, **options) for one in self._conversations[split]]
            fitted = [self._fitted(one, counts) for one in encoded]
            rows = [MaskedSample(index, one.ids, one.is_target) for index, one in enumerate(fitted) if one is not None]
            if not rows:
                raise ValueError(
                    f"no {split} record fits into {self._limit} tokens; raise model.context_length or data.max_length"
                )
            samples[split] = Conversations(rows)
            facts[split] = _facts(encoded, rows)
        self._report |= {"limit": self._limit, "splits": facts, "too_long": self._too_long, **_counted(counts)}
        refuse_losses(self._report, self._max_lost)
        self.train_samples, self.test_samples = samples["train"], {"test": samples["test"]}
        self.eval_samples = {"val": samples["val"]}
        if self.eval_batches > 0:
            self.eval_samples["train_eval"] = evenly_spaced(samples["train"], self.eval_batches * self.batch_size)

    def _fitted(self, one: Encoded, counts: Counter[str]) -> Encoded | None:
        """`one` within the limit, or None; what was done is counted."""
        excess = len(one.ids) - (self._limit + 1)  # the last token is only a label
        if excess > 0 and (self._too_long == "drop" or (self._too_long == "cut_prompt" and excess >= one.answer_at)):
            counts["dropped"] += 1
            return None
        kept = slice(max(excess, 0), None) if self._too_long == "cut_prompt" else slice(None, self._limit + 1)
        fitted = Encoded(one.ids[kept], one.is_target[kept], one.is_answer[kept], one.answer_at)
        if not fitted.is_target[1:].any():
            counts["dropped"] += 1
            return None
        if excess > 0:
            # The first token of a row is never learnt, be it of an answer.
            counts["answers_cut" if fitted.is_answer[1:].sum() < one.is_answer.sum() else "prompts_cut"] += 1
        return fitted

    def choose_layout(self, *, share_prefix: bool) -> None:
        """Decide on padded or packed batches.

        Args:
            share_prefix: whether what all records of a batch begin with may be computed once.
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
            lengths = [len(row.token_ids) - 1 for row in batch]
            padded += len(batch) * max(lengths)
            packed += sum(lengths) - (len(batch) - 1) * (shared_prefix(batch) if self._share_prefix else 0)
        return 1 - packed / padded

    # --- words -----------------------------------------------------------------------------------------------------

    def _source(self) -> str:
        return self._hub[0] or (f"{self._name}" if self._path is None else str(self._path))

    def _digest(self) -> str:
        content = {
            split: [[one.system, *map(list, one.turns)] for one in rows] for split, rows in self._conversations.items()
        }
        return hashlib.sha256(json.dumps([content, self.template.text, self.template.system]).encode()).hexdigest()

    def _lines(self) -> Iterable[str]:
        """What a person should know of the data before believing a number about it."""
        facts = self._report
        for split, part in facts["splits"].items():
            yield (
                f"{split}: {part['records']:,} records; {part['mean_tokens']:.1f} tokens each, at most "
                f"{part['most_tokens']}; {part['targets']:,} are learnt"
            )
        yield (
            f"{facts['records']:,} records: {facts['skipped']} without answer left out, {facts['prompts_cut']} prompts "
            f"and {facts['answers_cut']} answers cut to {facts['limit']} tokens, {facts['dropped']} dropped"
        )
        leak = facts["leaks"]["test"]
        yield f"Test prompts that stand in training, too: {leak['prompts']} of {leak['of']}"


def local_file(name: str) -> Path:
    """The file of a named set, downloaded if need be."""
    return file_of(NAMED[name])


def encode(
    tokenizer: Tokenizer,
    template: Template,
    conversation: Conversation,
    *,
    loss_on: str = "response",
    eos_targets: str = "all",
) -> Encoded:
    """Token ids of a whole conversation, and which of them are learnt."""
    trained = {"response": {"response", "end"}, "header": {"header", "response", "end"}}.get(loss_on)
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    answer_at, n_ends = 0, 0
    for piece, kind in template.tokens(tokenizer, template.segments(conversation)):
        is_target = trained is None or kind in trained
        if kind == "end":
            n_ends += 1
            is_target = is_target and (eos_targets == "all" or n_ends == 1)
        if kind in ("header", "prompt"):
            answer_at = sum(len(one) for one in ids) + len(piece)
        ids.append(piece)
        targets.append(np.full(len(piece), is_target))
        answers.append(np.full(len(piece), kind in ("response", "end")))
    return Encoded(np.concatenate(ids), np.concatenate(targets), np.concatenate(answers), answer_at)


def _text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _facts(encoded: Sequence[Encoded], rows: Sequence[MaskedSample]) -> dict[str, Any]:
    lengths = [len(one.ids) for one in encoded]
    return {
        "records": len(rows),
        "mean_tokens": sum(lengths) / len(lengths),
        "most_tokens": max(lengths),
        "targets": sum(row.n_targets for row in rows),
    }


def _counted(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in ("prompts_cut", "answers_cut", "dropped")}
