"""Conversations in data modules: which settings there are, how they are split, what may be lost."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from llm_lightning.data.base import BaseDataModule, evenly_spaced
from llm_lightning.data.batches import Example, LMBatch, collate_padded
from llm_lightning.data.leaks import leaked_prompts, prompt_key
from llm_lightning.data.samples import Rows
from llm_lightning.data.splits import SPLITS, grouped_split, joined_groups, order_split
from llm_lightning.data.templates import Conversation, Template, choose_template
from llm_lightning.files.download import Pinned, check_name, file_of
from llm_lightning.tokenizers import Tokenizer

log = logging.getLogger(__name__)

CHOICES: dict[str, tuple[Any, ...]] = {
    "split": ("grouped", "order"),
    "too_long": ("cut_prompt", "drop", "cut_answer"),
    "packing": ("auto", True, False),
}


def split_conversations(
    records: Sequence[Conversation], split: str, fractions: tuple[float, float], seed: int
) -> dict[str, list[int]]:
    """split -> indices of its records.

    Args:
        split: `grouped` (a prompt, or the records of a group, never stand in two splits) or `order`.
        fractions: of validation and test.

    Raises:
        ValueError: if a split would be empty.
    """
    if split == "order":
        parts = order_split(len(records), fractions)
    else:
        prompts = list(map(prompt_key, records))
        keys = joined_groups([one.group or key for one, key in zip(records, prompts, strict=True)], prompts)
        parts = grouped_split(keys, [0] * len(keys), fractions, seed)
    for name, part in parts.items():
        if not part:
            raise ValueError(f"{len(records)} records leave none for {name}; give more, or raise data.{name}_fraction")
    return parts


def check_slots(template: Template, records: Sequence[Conversation]) -> None:
    """Refuse a template that would leave something of a record out."""
    for one in records:
        if "system" not in template.slots and one.system:
            raise ValueError(f"{one.place} has a system message, but template {template.name} has no {{system}} slot")
        if "input" not in template.slots and any(turn.input for turn in one.turns):
            raise ValueError(f"{one.place} has an input, but template {template.name} has no {{input}} slot")


def check_choices(allowed: Mapping[str, tuple[Any, ...]], **given: Any) -> None:
    """Raise ValueError for a setting that is none of those allowed."""
    for name, value in given.items():
        if value not in allowed[name]:
            words = ", ".join(str(one).lower() for one in allowed[name])
            raise ValueError(f"data.{name}={value!r} must be one of {words}")


def check_numbers(val: float, test: float, max_lost: float, max_length: int | None) -> None:
    """Raise ValueError for fractions or a length that cannot be."""
    if val <= 0 or test <= 0 or val + test >= 1:
        raise ValueError(
            f"data.val_fraction={val} and data.test_fraction={test} must be positive and sum to less than 1"
        )
    if not 0 <= max_lost <= 1:
        raise ValueError(f"data.max_lost={max_lost} must be between 0 and 1")
    if max_length is not None and max_length < 2:
        raise ValueError(f"data.max_length={max_length} must be at least 2")


def refuse_losses(facts: Mapping[str, Any], max_lost: float) -> None:
    """Raise ValueError if more records were dropped, or had an answer cut, than allowed."""
    lost = facts["dropped"] + facts["answers_cut"]
    if lost > max_lost * facts["records"]:
        raise ValueError(
            f"{lost} of {facts['records']} records do not fit into {facts['limit']} tokens ({facts['dropped']} "
            f"dropped, {facts['answers_cut']} answers cut), more than data.max_lost={max_lost:g} allows; "
            "raise model.context_length or data.max_length, or data.max_lost if that is meant"
        )


Record = TypeVar("Record")


Sample = TypeVar("Sample")


PACKING_PAYS_FROM = 0.05
"""Share of positions to be saved from which packing is faster: at 5% of padding and nothing to share, it took as long
as padded batches, with 124M parameters on a CPU."""


BATCHES_LOOKED_AT = 200


class ConversationDataModule(BaseDataModule, Generic[Record, Sample]):
    """Records of conversations, rendered by a template, in a training, a validation and a test split.

    What flows: records -> splits -> template -> samples -> batches, padded or packed. What was dropped or cut is
    counted in `report()` and said once. Subclasses say how a record is read, becomes a sample, and is collated.

    Args:
        tokenizer: or a function that trains one on the training texts.
        context_length: most tokens that the model reads.
        name: of a set in `NAMED`.
        path: a file of your own; with a downloaded set, a local copy of it.
        columns: what the fields of a record are called.
        hf_dataset, hf_config, hf_split, hf_revision: a dataset of the hub instead.
        template: `alpaca`, `phi3`, `chatml`, or a text with slots, see `templates.py`.
        split: `grouped` (a prompt, or the records of a group, never stand in two splits) or `order` (the book's: the
            first records are for training, then test, then validation).
        val_fraction, test_fraction: of the records.
        split_seed: of the grouped split; another than that of training, so that a sweep over seeds sees one split.
        too_long: what happens to what exceeds the context: `cut_prompt`, `drop` or `cut_answer`; see the subclasses.
        max_lost: the share of records that may be dropped or have an answer cut.
        max_length: tokens of input; default: `context_length`.
        packing: sequences end to end, and what they begin with only once: true, false (padded), or `auto`: where that
            saves more than 5% of the positions.
        bucket: batches of similar length; false: a plain shuffle.
    """

    named: ClassVar[Mapping[str, Path | Pinned]]
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = CHOICES
    unit: ClassVar[str]
    """What one sample is, in `describe`; empty: it goes without saying."""
    left_out_as: ClassVar[str | None] = None
    """Under which name `report()` counts the records that `is_kept` leaves out."""
    nothing_fits: ClassVar[str]
    """The error where a split has no sample; takes `split` and `limit`."""
    template: Template
    pad_id: int

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Callable[[Iterable[str]], Tokenizer],
        context_length: int,
        name: str | None,
        path: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        template: str = "alpaca",
        split: str = "grouped",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_seed: int = 123,
        too_long: str = "cut_prompt",
        max_lost: float = 0.05,
        max_length: int | None = None,
        packing: bool | str = "auto",
        bucket: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(bucket=bucket, **loading)
        check_choices(self.choices, split=split, too_long=too_long, packing=packing)
        check_numbers(val_fraction, test_fraction, max_lost, max_length)
        check_name(name, self.named)
        if path is not None and name is not None and isinstance(self.named[name], Path):
            name = None  # a file of one's own wins over the embedded set, of which nobody has a copy
        self.template = choose_template(template)
        self.context_length, self.columns, self.too_long = context_length, columns, too_long
        self.limit = min(max_length or context_length, context_length)
        self.share_prefix, self.is_packed = True, packing is True
        self.records: dict[str, list[Record]] = {}
        self._make_tokenizer = tokenizer
        self._name, self._path, self._hub = name, path, (hf_dataset, hf_config, hf_split, hf_revision)
        self._split, self._fractions, self._split_seed = split, (val_fraction, test_fraction), split_seed
        self._max_lost, self._packing = max_lost, packing
        self._report: dict[str, Any] = {}

    # --- what a subclass says --------------------------------------------------------------------------------------

    @abstractmethod
    def read_file(self, path: str | Path) -> tuple[list[Record], int]:
        """Records of a file, and how many were skipped."""

    @abstractmethod
    def read_hub(self, name: str, config: str | None, split: str, revision: str | None) -> tuple[list[Record], int]:
        """The same of a dataset of the hub."""

    @abstractmethod
    def conversation_of(self, record: Record) -> Conversation:
        """What is asked, and the answer that is meant."""

    @abstractmethod
    def texts_of(self, record: Record) -> Iterable[str]:
        """What a tokenizer is trained on."""

    @abstractmethod
    def samples_of(self, records: Sequence[Record], counts: Counter[str]) -> tuple[list[Sample], dict[str, Any]]:
        """The samples of a split within `limit`, and facts about them.

        Counts what was done under `prompts_cut`, `answers_cut` and `dropped`.
        """

    @abstractmethod
    def sequences_of(self, sample: Sample) -> list[Example]:
        """The sequences that a sample holds."""

    @abstractmethod
    def positions_of(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """Positions of a batch, padded and packed."""

    @abstractmethod
    def content_of(self, record: Record) -> list[Any]:
        """Plain values that tell records apart, for the digest of the data."""

    @abstractmethod
    def lines_of(self, facts: dict[str, Any]) -> Iterable[str]:
        """What a person should know of the data before believing a number about it."""

    def is_kept(self, record: Record) -> bool:
        """Whether a record is of use. What is left out moves no other to another split. May be overridden."""
        return True

    def digest_more(self) -> list[Any]:
        """Further plain values for the digest. May be overridden."""
        return []

    def preview_titles(self, n_rows: int) -> list[str] | None:
        """What the rows of a preview are called. May be overridden."""
        return None

    # --- building --------------------------------------------------------------------------------------------------

    def build(self) -> None:
        records, skipped = self._read()
        conversations = [self.conversation_of(record) for record in records]
        check_slots(self.template, conversations)
        parts = split_conversations(conversations, self._split, self._fractions, self._split_seed)
        self.records = {
            split: [records[index] for index in part if self.is_kept(records[index])] for split, part in parts.items()
        }
        make = self._make_tokenizer
        texts = (text for record in self.records["train"] for text in self.texts_of(record))
        self.tokenizer = make if isinstance(make, Tokenizer) else make(texts)
        if self.tokenizer.eot_id is None:
            raise ValueError("this tokenizer has no end-of-text token, with which an answer ends; use another one")
        self.pad_id = self.tokenizer.eot_id
        self._report = {"records": len(records), "skipped": skipped, "split": self._split}
        if self.left_out_as is not None:
            self._report[self.left_out_as] = len(records) - sum(map(len, self.records.values()))
        self._encode()
        asked = {split: self.conversations_of(split) for split in SPLITS}
        self._report |= {"leaks": {split: leaked_prompts(asked, split) for split in ("val", "test")}}
        self.choose_layout(share_prefix=True)
        self.data_digest = self._digest()
        for line in self.lines_of(self._report):
            log.info(line)
        leak = self._report["leaks"]["test"]
        log.info("Test prompts that stand in training, too: %d of %d", leak["prompts"], leak["of"])

    def choose_layout(self, *, share_prefix: bool) -> None:
        """Decide on padded or packed batches.

        Args:
            share_prefix: whether what sequences of a batch begin with may be computed once.
        """
        self.share_prefix = share_prefix
        positions = [self.positions_of(batch) for batch in self.first_batches(BATCHES_LOOKED_AT)]
        padded, packed = map(sum, zip(*positions, strict=True))
        saved = 1 - packed / padded
        if self._packing == "auto":
            self.is_packed = saved > PACKING_PAYS_FROM
        self._report |= {"packed": self.is_packed, "saved_by_packing": round(saved, 4)}

    # --- looking at it ---------------------------------------------------------------------------------------------

    def conversations_of(self, split: str) -> list[Conversation]:
        """The conversations of `train`, `val` or `test`, also those that are too long to train on."""
        return [self.conversation_of(record) for record in self.records[split]]

    def sample_prompts(self, n: int) -> list[list[int]]:
        """Token ids of the prompts of the first `n` validation records that leave room for an answer."""
        prompts = (self.template.prompt_ids(self.tokenizer, one) for one in self.conversations_of("val"))
        return list(islice((ids for ids in prompts if len(ids) < self.context_length), n))

    def first_batch(self, split: str, n: int) -> LMBatch:
        """The sequences of the first `n` samples of a split, padded."""
        samples: Any = {"train": self.train_samples, **self.eval_samples, **self.test_samples}[split]
        rows = [one for index in range(min(n, len(samples))) for one in self.sequences_of(samples[index])]
        return collate_padded(rows, pad_id=self.pad_id, context_length=self.context_length)

    def preview(self, n: int) -> str:
        from llm_lightning.data.inspection import as_text

        batch = self.first_batch("train", n)
        titles = self.preview_titles(len(batch.input_ids))
        return as_text(self.tokenizer, batch, colour=sys.stdout.isatty(), titles=titles)

    def describe(self) -> str:
        source = self._hub[0] or (f"{self._name}" if self._path is None else str(self._path))
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self.records.items())
        layout = "packed" if self.is_packed else "padded"
        return f"{source}: {sizes}{self.unit and f' {self.unit}'}; template {self.template.name}, {layout}"

    def report(self) -> dict[str, Any]:
        return self._report

    # --- details ---------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[list[Record], int]:
        dataset, config, split, revision = self._hub
        if dataset is not None:
            return self.read_hub(dataset, config, split, revision)
        if self._path is not None:
            return self.read_file(self._path)
        if self._name is None:
            raise ValueError("data.name and data.path are both null; give data.path=FILE, .json or .jsonl")
        return self.read_file(file_of(self.named[self._name]))

    def _encode(self) -> None:
        counts: Counter[str] = Counter()
        samples: dict[str, Rows[Sample]] = {}
        facts: dict[str, Any] = {}
        for split in SPLITS:
            rows, facts[split] = self.samples_of(self.records[split], counts)
            if not rows:
                raise ValueError(self.nothing_fits.format(split=split, limit=self.limit))
            samples[split] = Rows(rows)
        counted = {name: counts[name] for name in ("prompts_cut", "answers_cut", "dropped")}
        self._report |= {"limit": self.limit, "splits": facts, "too_long": self.too_long, **counted}
        refuse_losses(self._report, self._max_lost)
        self.train_samples, self.test_samples = samples["train"], {"test": samples["test"]}
        self.eval_samples = {"val": samples["val"]}
        if self.eval_batches > 0:
            self.eval_samples["train_eval"] = evenly_spaced(samples["train"], self.eval_batches * self.batch_size)

    def _digest(self) -> str:
        content = {split: [self.content_of(record) for record in rows] for split, rows in self.records.items()}
        told = [content, self.template.text, self.template.system, *self.digest_more()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
