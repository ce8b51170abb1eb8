"""The dataloaders, once: every data module names its samples, this class turns them into exact, resumable batches.

What instruction and preference data have in common stands here, too: `ConversationDataModule`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from llm_lightning.data.batches import LMBatch, MaskedSample, collate_padded
from llm_lightning.data.conversations import (
    CHOICES,
    check_choices,
    check_numbers,
    check_slots,
    leaks,
    refuse_losses,
    split_conversations,
)
from llm_lightning.data.order import BatchOrder, bucketed_order, limited, spread_sample
from llm_lightning.data.samples import Rows
from llm_lightning.data.splits import SPLITS
from llm_lightning.data.templates import Conversation, Template, choose_template
from llm_lightning.data.workers import Loader, are_forked, begin_with
from llm_lightning.files.download import Pinned, check_name, file_of
from llm_lightning.tokenizers import Tokenizer

Record = TypeVar("Record")
Sample = TypeVar("Sample")

PACKING_PAYS_FROM = 0.05
"""Share of positions to be saved from which packing is faster: at 5% of padding and nothing to share, it took as long
as padded batches, with 124M parameters on a CPU."""
BATCHES_LOOKED_AT = 200

log = logging.getLogger(__name__)


class BaseDataModule(L.LightningDataModule):
    """Builds the loaders of `train_samples` and `eval_samples`.

    Subclasses fill these in `build` and override `collator`:

    - `tokenizer`
    - `train_samples`: a map-style Dataset of samples
    - `eval_samples`: stage name (`val`, `train_eval`) to Dataset, in the order they are evaluated
    - `test_samples`: the same for what is evaluated once, at the end, with the best weights
    - `data_digest`: names the data, for lineage

    Args:
        batch_size: samples per process and micro-batch.
        num_workers: loader processes; 0 is fastest for memory-mapped tokens.
        shuffle: a new order of the training samples every epoch.
        drop_last: leave out the last samples of an epoch that do not fill a batch.
        eval_batches: how many batches of training data are evaluated, without dropout, for `train/eval_loss`.
        seed: of the shuffle.
    """

    tokenizer: Tokenizer
    train_samples: Dataset
    eval_samples: dict[str, Dataset]
    test_samples: dict[str, Dataset]
    data_digest: str
    samples_are: ClassVar[str] = "samples"
    """What a person calls them."""

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        eval_batches: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.shuffle, self.drop_last = shuffle, drop_last
        self.eval_batches, self.seed = eval_batches, seed
        self.test_samples = {}
        self._train_order: BatchOrder | None = None
        self._resume_at = (0, 0)

    @abstractmethod
    def build(self) -> None:
        """Read, check and tokenise the data. Called once, before the model is built: it needs the vocabulary."""

    def collator(self) -> Callable[[Sequence[Any]], Any]:
        """The function that turns samples of one micro-batch, possibly none, into a named batch.

        Subclasses return a function of a module with plain values bound to it: it is sent to every loader process that
        is not forked, where a method would drag the data and the trainer along.
        """
        return self.collate

    def collate(self, samples: Sequence[Any]) -> Any:
        """The batch of these samples. Overridden instead of `collator`, it does where loader processes are forked."""
        return self.collator()(samples)

    @abstractmethod
    def preview(self, n: int) -> str:
        """The first `n` training samples as a person reads them."""

    @abstractmethod
    def describe(self) -> str:
        """One line on what is trained on."""

    def report(self) -> dict[str, Any]:
        """Plain values for `summary.json`: what the data is like. Subclasses may override."""
        return {}

    def digest_of_source(self) -> str | None:
        """`data_digest` before anything is built, where that is cheaper; else None. May be overridden."""
        return None

    def order_of(self, samples: Dataset, *, is_training: bool) -> Callable[[int], np.ndarray] | None:
        """epoch -> the order of `samples`; None: shuffled for training, as they stand otherwise. May be overridden."""
        return None

    def train_dataloader(self) -> DataLoader:
        self._train_order = self._train_batches()
        self._train_order.resume(*self._resume_at)
        return self._loader(self.train_samples, self._train_order)

    def val_dataloader(self) -> list[DataLoader]:
        limit = None if self.trainer is None else self.trainer.limit_val_batches
        return [self._eval_loader(samples, limit) for samples in self.eval_samples.values()]

    def test_dataloader(self) -> list[DataLoader]:
        limit = None if self.trainer is None else self.trainer.limit_test_batches
        return [self._eval_loader(samples, limit) for samples in self.test_samples.values()]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming epoch."""
        if self._train_order is not None:
            self._train_order.set_epoch(epoch)

    def resume(self, epoch: int, batches_done: int) -> None:
        """Continue behind the first `batches_done` batches of `epoch`. Takes effect when the loader is made."""
        self._resume_at = (epoch, batches_done)

    def expected_samples(self, epoch: int, batch: int) -> tuple[int, ...]:
        """The sample ids of this process's batch number `batch` in `epoch`, computed afresh."""
        order = self._train_batches()
        order.resume(epoch, batch)
        return tuple(next(iter(order)))

    def batches_per_epoch(self, world_size: int) -> int:
        """Micro-batches that each process sees in one epoch."""
        batches = len(self._train_batches(world_size=world_size))
        if batches == 0:
            raise ValueError(
                f"{len(self.train_samples)} training samples do not fill one batch of data.batch_size="  # type: ignore[arg-type]
                f"{self.batch_size} on {world_size} process(es); lower it, or set data.drop_last=false"
            )
        return batches

    def first_batches(self, most: int) -> Iterator[list[Any]]:
        """The samples of the first `most` training batches, as one process would see them."""
        samples: Any = self.train_samples
        order = self.order_of(samples, is_training=True)
        batches = BatchOrder(len(samples), self.batch_size, shuffle=self.shuffle, seed=self.seed, order=order)
        for indices in islice(batches, most):
            yield [samples[index] for index in indices]

    def all_samples(self) -> list[Any]:
        """Every sample of every split, those that stand in several of them as often."""
        splits: list[Any] = [self.train_samples, *self.eval_samples.values(), *self.test_samples.values()]
        return [split[index] for split in splits for index in range(len(split))]

    def _train_batches(self, world_size: int | None = None) -> BatchOrder:
        options = {"shuffle": self.shuffle, "drop_last": self.drop_last, "world_size": world_size}
        return self._order(self.train_samples, order=self.order_of(self.train_samples, is_training=True), **options)

    def _eval_loader(self, samples: Any, limit: int | float | None) -> DataLoader:
        """A loader of `samples`, whose first batches, as many as Lightning reads within `limit`, are a fair sample."""
        order = self._order(samples)
        measured = min(len(samples), limited(len(order), limit) * self.batch_size * order.world_size)
        if measured in (0, len(samples)):
            order.order = self.order_of(samples, is_training=False)
            return self._loader(samples, order)
        # In the order of evaluation the first batches would be the shortest samples.
        chosen = spread_sample(len(samples), measured)
        within = self.order_of(Subset(samples, chosen.tolist()), is_training=False)
        others = np.setdiff1d(np.arange(len(samples)), chosen)
        order.order = lambda epoch: np.concatenate([chosen if within is None else chosen[within(epoch)], others])
        return self._loader(samples, order)

    def sampled(self, trainer: L.Trainer) -> dict[str, dict[str, Any]]:
        """Of each split that the limits of `trainer` do not evaluate whole: how many samples are, and of how many."""
        found = {}
        limits = {"val": trainer.limit_val_batches, "test": trainer.limit_test_batches}
        for split, limit in limits.items():
            samples: Any = {**self.eval_samples, **self.test_samples}.get(split, ())
            per_batch = self.batch_size * trainer.world_size
            measured = min(len(samples), limited(-(-len(samples) // per_batch), limit) * per_batch)
            if measured < len(samples):
                found[split] = {"measured": measured, "of": len(samples), "what": self.samples_are}
        return found

    def _order(self, samples: Any, *, world_size: int | None = None, **options: Any) -> BatchOrder:
        options = {"shuffle": False, "seed": self.seed, **options}
        rank = 0 if self.trainer is None else self.trainer.global_rank
        if world_size is None:
            world_size = 1 if self.trainer is None else self.trainer.world_size
        return BatchOrder(len(samples), self.batch_size, rank=rank, world_size=world_size, **options)

    def _loader(self, samples: Dataset, order: BatchOrder) -> DataLoader:
        return Loader(
            samples,
            batch_sampler=order,
            collate_fn=self.collator(),
            num_workers=self.num_workers,
            worker_init_fn=begin_with(),
            persistent_workers=self.num_workers > 0 and not are_forked(),  # one that is not takes seconds to start
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: a DataLoader without one draws from the global RNG at every epoch, which would
            # tie dropout to how often the loader was made. Workers are seeded from it, those of each rank differently.
            generator=torch.Generator().manual_seed(self.seed + order.rank),
        )


def evenly_spaced(samples: Dataset, n: int) -> Subset:
    """A fixed subset of `n` samples (or all) spread over the whole data set."""
    size = len(samples)  # type: ignore[arg-type]
    return Subset(samples, np.unique(np.linspace(0, size - 1, min(n, size)).astype(int)).tolist())


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
        super().__init__(**loading)
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
        self._max_lost, self._packing, self._bucket = max_lost, packing, bucket
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
    def sequences_of(self, sample: Sample) -> list[MaskedSample]:
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
        self._report |= {"leaks": {split: leaks(asked, split) for split in ("val", "test")}}
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

    def order_of(self, samples: Any, *, is_training: bool) -> Callable[[int], np.ndarray] | None:
        if not self._bucket or (is_training and not self.shuffle):
            return None
        rows = (self.sequences_of(samples[index]) for index in range(len(samples)))
        lengths = [sum(len(sequence.token_ids) for sequence in sequences) for sequences in rows]
        if not is_training:
            return lambda epoch: np.argsort(lengths, kind="stable")
        return lambda epoch: bucketed_order(lengths, [0] * len(lengths), seed=self.seed, epoch=epoch)

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
