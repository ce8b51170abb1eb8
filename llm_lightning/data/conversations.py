"""Data modules of conversations: what instruction and preference data have in common."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from llm_lightning.data.base import BaseDataModule, evenly_spaced
from llm_lightning.data.batches import LMBatch, collate_padded
from llm_lightning.data.control_words import WordCount, described, without_end
from llm_lightning.data.files.find import PathWords, words
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.leaks import leaked_prompts, prompt_key
from llm_lightning.data.records.rows import Source
from llm_lightning.data.samples import Rows
from llm_lightning.data.splits import SPLITS, grouped_split, joined_groups, order_split
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, answers_of, as_plain, with_answers
from llm_lightning.files.download import Pinned, check_name, file_of
from llm_lightning.tokenizers.base import Tokenizer

CHOICES: dict[str, tuple[Any, ...]] = {
    "split": ("grouped", "order"),
    "too_long": ("cut_prompt", "drop", "cut_answer"),
    "packing": ("auto", True, False),
}
PACKING_PAYS_FROM = 0.05
"""Share of saved positions from which packing is faster: with 5% of padding and no shared prefix, it took as long as
padded batches, with 124M parameters on a CPU."""
BATCHES_LOOKED_AT = 200

Sample = TypeVar("Sample")

log = logging.getLogger(__name__)


class Layouts(NamedTuple):
    """How samples of a kind become a batch."""

    padded: Callable[..., Any]
    """(samples, pad_id, context_length) -> batch"""
    packed: Callable[..., Any]
    """(samples, pad_id, share_prefix) -> batch"""
    packed_length: Callable[..., int]
    """(samples, share_prefix) -> tokens of the packed batch"""


class ConversationDataModule(BaseDataModule, Generic[Sample]):
    """Conversations, rendered by a template, in a training, a validation and a test split.

    Data flow: records -> splits -> template -> samples -> batches, padded or packed. What was dropped or cut is counted
    in `report()` and logged once. A subclass reads records, makes samples of them, and describes them.

    Args:
        tokenizer: or a function that trains one on the training texts.
        context_length: longest input of the model, in tokens.
        name: of a set in `named`.
        path: files of your own, see `find_files`; with a downloaded set, a local copy of it.
        columns: names of the fields in the records.
        hf_dataset, hf_config, hf_split, hf_revision: a dataset of the hub instead.
        template: a name, a text with slots or a `.jinja` file, see `templates/`; None: the model's own, else alpaca.
        template_date: the day that a Jinja template sees, YYYY-MM-DD; None: the own template's, else 2024-07-26.
        own_template: the description of the model's own template.
        strip_eot: strip control tokens that are spelt out, such as `<|endoftext|>`, from the ends of answers.
        split: `grouped` (no prompt, and no group of records, appears in two splits) or `order` (the book's: the first
            records are for training, the next for test, the last for validation).
        val_fraction, test_fraction: of the records.
        split_seed: of the grouped split; apart from the training seed, so that a sweep over seeds has one split.
        too_long: what happens to what exceeds the context: `cut_prompt`, `drop` or `cut_answer`; see the subclasses.
        max_dropped: the share of records that may be dropped or have an answer cut.
        max_length: longest input in tokens; default: `context_length`.
        packing: sequences end to end, a shared prefix stored once: true, false (padded), or `auto`: where that saves
            more than 5% of the positions.
        share_prefix: whether packing may store a shared prefix once, see `may_share_prefix`.
        bucket: batches of similar length; false: a plain shuffle.
    """

    named: ClassVar[Mapping[str, Path | Pinned]]
    layouts: ClassVar[Layouts]
    left_out_as: ClassVar[str | None] = None
    """Key in `report()` for the number of pairs with equal answers; None: there are no pairs."""
    nothing_fits: ClassVar[str]
    """The error for a split without a sample; takes `split` and `limit`."""
    template: Template
    pad_id: int

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Callable[[Iterable[str]], Tokenizer],
        context_length: int,
        name: str | None,
        path: PathWords | None = None,
        columns: Mapping[str, str | None] | None = None,
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        template: str | None = None,
        template_date: str | None = None,
        own_template: Mapping[str, Any] | None = None,
        strip_eot: bool = False,
        split: str = "grouped",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_seed: int = 123,
        too_long: str = "cut_prompt",
        max_dropped: float = 0.05,
        max_length: int | None = None,
        packing: bool | str = "auto",
        share_prefix: bool = True,
        bucket: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(bucket=bucket, **loading)
        check_choices(CHOICES, split=split, too_long=too_long, packing=packing)
        check_numbers(val_fraction, test_fraction, max_dropped, max_length)
        check_name(name, self.named)
        if path is not None and name is not None and isinstance(self.named[name], Path):
            name = None  # your own file wins over the embedded set, of which nobody has a copy
        self.template = choose_template(template, own=own_template, template_date=template_date)
        self.context_length, self.columns, self.too_long = context_length, columns, too_long
        self.limit = min(max_length or context_length, context_length)
        self.share_prefix, self.is_packed = share_prefix, packing is True
        self.records: dict[str, list[Conversation]] = {}
        self._make_tokenizer = tokenizer
        self._name, self._path = name, path
        self._hub = HubDataset(hf_dataset, hf_config, hf_split, hf_revision) if hf_dataset is not None else None
        self._split, self._fractions, self._split_seed = split, (val_fraction, test_fraction), split_seed
        self._strip_eot = strip_eot
        self._max_dropped, self._packing = max_dropped, packing
        self._report: dict[str, Any] = {}

    # --- what a subclass defines -----------------------------------------------------------------------------------

    @abstractmethod
    def read_records(self, source: Source) -> tuple[list[Conversation], int]:
        """The records of a file or dataset, and the number skipped."""

    @abstractmethod
    def samples_of(self, records: Sequence[Conversation], counts: Counter[str]) -> tuple[list[Sample], dict[str, Any]]:
        """The samples of a split within `limit`, and facts about them.

        Counts under `prompts_cut`, `answers_cut` and `dropped`.
        """

    @abstractmethod
    def lines_of(self, facts: dict[str, Any]) -> Iterable[str]:
        """What a reader should know about the data before trusting a number about it."""

    def digest_more(self) -> list[Any]:
        """Further plain values for the digest. May be overridden."""
        return []

    def preview_titles(self, n_rows: int) -> list[str] | None:
        """Titles for the rows of a preview. May be overridden."""
        return None

    # --- building --------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read, check and split the records, without tokenising: enough for `conversations_of` and `data_digest`."""
        records, skipped = self.read_records(self._source())
        records = self._checked_ends(records)
        self.template.check(records)
        parts = split_conversations(records, self._split, self._fractions, self._split_seed)
        # After the split: a pair that is left out moves no other record to another split.
        self.records = {
            split: [records[index] for index in part if not records[index].has_equal_answers]
            for split, part in parts.items()
        }
        self.data_digest = self._digest()
        self._report = {"records": len(records), "skipped": skipped, "split": self._split}
        if self.left_out_as is not None:
            self._report[self.left_out_as] = len(records) - sum(map(len, self.records.values()))

    def build(self) -> None:
        self.read()
        make = self._make_tokenizer
        self.tokenizer = make if isinstance(make, Tokenizer) else make(self._training_texts())
        self.template.check_tokenizer(self.tokenizer)
        self.pad_id = self.tokenizer.eot_id or 0  # without effect: nothing sees a pad, and no mask looks at ids
        self._encode()
        self._report |= {"leaks": {split: leaked_prompts(self.records, split) for split in ("val", "test")}}
        self.choose_layout()
        for line in self.lines_of(self._report):
            log.info(line)
        leak = self._report["leaks"]["test"]
        log.info("Test prompts also in training: %d of %d", leak["prompts"], leak["of"])

    def choose_layout(self) -> None:
        """Measure what packing saves on the first training batches, and with `packing: auto` decide on the layout."""
        padded = packed = 0
        for samples in self.first_batches(BATCHES_LOOKED_AT):
            lengths = [sequence.n_tokens - 1 for sample in samples for sequence in sample.sequences]
            padded += len(lengths) * max(lengths)
            packed += self.layouts.packed_length(samples, share_prefix=self.share_prefix)
        saved = 1 - packed / padded
        if self._packing == "auto":
            self.is_packed = saved > PACKING_PAYS_FROM
        self._report |= {"packed": self.is_packed, "saved_by_packing": round(saved, 4)}

    def collator(self) -> Callable[[Sequence[Sample]], Any]:
        if self.is_packed:
            return partial(self.layouts.packed, pad_id=self.pad_id, share_prefix=self.share_prefix)
        return partial(self.layouts.padded, pad_id=self.pad_id, context_length=self.context_length)

    def kept_behind_cut(self, ids: np.ndarray, excess: int) -> np.ndarray:
        """The indices of `ids` that remain when `excess` are cut from the left; the id that begins a text does."""
        indices = np.arange(len(ids))
        first = indices[: int(len(ids) > excess and ids[0] == self.tokenizer.bos_id)]
        return np.concatenate([first, indices[len(first) + excess :]])

    # --- inspection ------------------------------------------------------------------------------------------------

    def conversations_of(self, split: str) -> list[Conversation]:
        """The conversations of `train`, `val` or `test`, including those that are too long to train on."""
        return self.records[split]

    def sample_prompts(self, n: int) -> list[list[int]]:
        """Token ids of the prompts of the first `n` validation records that leave room for an answer."""
        prompts = (self.template.prompt_ids(self.tokenizer, one) for one in self.records["val"])
        return list(islice((ids for ids in prompts if len(ids) < self.context_length), n))

    def first_batch(self, split: str, n: int) -> LMBatch:
        """The sequences of the first `n` samples of a split, padded."""
        samples: Any = {"train": self.train_samples, **self.eval_samples, **self.test_samples}[split]
        rows = [one for index in range(min(n, len(samples))) for one in samples[index].sequences]
        return collate_padded(rows, pad_id=self.pad_id, context_length=self.context_length)

    def preview(self, n: int) -> str:
        from llm_lightning.data.inspection import as_text

        batch = self.first_batch("train", n)
        titles = self.preview_titles(len(batch.input_ids))
        return as_text(self.tokenizer, batch, colour=sys.stdout.isatty(), titles=titles)

    def describe(self) -> str:
        source = (
            self._hub.name if self._hub else (f"{self._name}" if self._path is None else ", ".join(words(self._path)))
        )
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self.records.items())
        layout = "packed" if self.is_packed else "padded"
        return f"{source}: {sizes} {self.samples_are}; template {self.template.name}, {layout}"

    def report(self) -> dict[str, Any]:
        return self._report

    # --- details ---------------------------------------------------------------------------------------------------

    def _source(self) -> Source:
        if self._hub is not None:
            return self._hub
        if self._path is not None:
            return self._path
        if self._name is None:
            raise ValueError("data.name and data.path are both null; give data.path=FILE with records")
        return file_of(self.named[self._name])

    def _checked_ends(self, records: list[Conversation]) -> list[Conversation]:
        """Warn of control tokens that answers spell out, or strip them from their ends."""
        if self._strip_eot:
            records = [with_answers(one, without_end) for one in records]
        spelt = WordCount()
        for record in records:
            for answer in answers_of(record):
                spelt.add(answer)
                spelt.end()
        if spelt.found:
            remedy = "" if self._strip_eot else "; data.strip_eot=true strips them from the ends of answers"
            log.warning(
                "Answers spell out control tokens, which are read as text: %s%s", described(spelt.found), remedy
            )
        return records

    def _training_texts(self) -> Iterable[str]:
        for record in self.records["train"]:
            yield self.template.text_of(record)
            if record.rejected is not None:
                yield record.rejected

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
        check_dropped_fraction(self._report, self._max_dropped)
        self.train_samples, self.test_samples = samples["train"], {"test": samples["test"]}
        self.eval_samples = {"val": samples["val"]}
        if self.eval_batches > 0:
            self.eval_samples["train_eval"] = evenly_spaced(samples["train"], self.eval_batches * self.batch_size)

    def _digest(self) -> str:
        content = {split: [as_plain(record) for record in rows] for split, rows in self.records.items()}
        values = [content, *self.template.digest_values(), *self.digest_more()]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def may_share_prefix(model: Mapping[str, Any], lora: Mapping[str, Any] | None) -> bool:
    """Whether a shared prefix may be computed once: dropout would give all sequences the same draws.

    Args:
        model, lora: the fields of `GPTConfig` and `LoRAConfig`.
    """
    dropouts = [model.get(f"{place}_dropout") for place in ("embedding", "attention", "residual")]
    return not any(dropouts) and not (lora and lora.get("dropout"))


def split_conversations(
    records: Sequence[Conversation], split: str, fractions: tuple[float, float], seed: int
) -> dict[str, list[int]]:
    """split -> indices of its records.

    Args:
        split: `grouped` (no prompt, and no group of records, appears in two splits) or `order`.
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


def check_choices(allowed: Mapping[str, tuple[Any, ...]], **given: Any) -> None:
    """Raise ValueError for a setting that is not allowed."""
    for name, value in given.items():
        if value not in allowed[name]:
            words = ", ".join(str(one).lower() for one in allowed[name])
            raise ValueError(f"data.{name}={value!r} must be one of {words}")


def check_numbers(val: float, test: float, max_dropped: float, max_length: int | None) -> None:
    """Raise ValueError for impossible fractions or lengths."""
    if val <= 0 or test <= 0 or val + test >= 1:
        raise ValueError(
            f"data.val_fraction={val} and data.test_fraction={test} must be positive and sum to less than 1"
        )
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"data.max_dropped={max_dropped} must be between 0 and 1")
    if max_length is not None and max_length < 2:
        raise ValueError(f"data.max_length={max_length} must be at least 2")


def check_dropped_fraction(facts: Mapping[str, Any], max_dropped: float) -> None:
    """Raise ValueError if more records were dropped, or had an answer cut, than allowed."""
    n_dropped = facts["dropped"] + facts["answers_cut"]
    if n_dropped > max_dropped * facts["records"]:
        raise ValueError(
            f"{n_dropped} of {facts['records']} records do not fit into {facts['limit']} tokens ({facts['dropped']} "
            f"dropped, {facts['answers_cut']} answers cut), more than data.max_dropped={max_dropped:g} allows; "
            "raise model.context_length or data.max_length, or data.max_dropped if that is intended"
        )
