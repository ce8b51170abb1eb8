"""Data modules of conversations: what instruction and preference data have in common."""

from __future__ import annotations

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

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import LMBatch, collate_padded
from llm_lightning.data.control_words import described
from llm_lightning.data.files.find import PathWords, words
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.mixture import Mixture, mixture_entries
from llm_lightning.data.own_splits import check_one_source, cut_fractions, named_by, own_splits, splits_in_order
from llm_lightning.data.record_store.limits import (
    check_choices,
    check_cut_fraction,
    check_dropped_fraction,
    check_lengths,
    check_numbers,
    lost_of,
)
from llm_lightning.data.record_store.pool import Part, Pool, TokenPool, leaks, remembered
from llm_lightning.data.record_store.records import Reading, RecordStore, open_store
from llm_lightning.data.record_store.samples import Fitting, SampleKind, Samples
from llm_lightning.data.record_store.splitting import digest_of, split_pool
from llm_lightning.data.record_store.tokens import tokens_of
from llm_lightning.data.records.rows import RecordForm, Source, lines_of
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.files.download import Pinned, check_name, file_of
from llm_lightning.terminal import counted
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
WORST = 2
"""Records that a preview shows of those that were cut most."""

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
        roles, irregular, other_parts: how messages are read, see `ConversationForm`.
        hf_dataset, hf_config, hf_split, hf_revision: a dataset of the hub instead.
        val_path, test_path: files with records of one's own for validation and test, used whole.
        hf_val_split, hf_test_split: splits of that dataset instead.
        val_sets: further validation sets, name -> path, each with metrics `val/<name>/...`.
        mixture: several sources with their shares of the records of an epoch, see `mixture_entries`.
        template: a name, a text with slots or a `.jinja` file, see `templates/`; None: the model's own, else alpaca.
        template_date: the day that a Jinja template sees, YYYY-MM-DD; None: the own template's, else 2024-07-26.
        own_template: the description of the model's own template.
        strip_eot: strip control tokens that are spelt out, such as `<|endoftext|>`, from the ends of answers.
        split: `grouped` (no prompt, and no group of records, appears in two splits) or `order` (the book's: the first
            records are for training, the next for test, the last for validation).
        val_fraction, test_fraction: of the records; not used for a split with records of its own.
        split_seed: of the grouped split; apart from the training seed, so that a sweep over seeds has one split.
        too_long: what happens to what exceeds the context: `cut_prompt`, `drop` or `cut_answer`; see the subclasses.
        max_dropped: the share of records that may be dropped or have an answer cut.
        max_cut: the share of records that may have their prompt cut.
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
        roles: Mapping[str, str] | None = None,
        irregular: str = "refuse",
        other_parts: str = "refuse",
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        val_path: PathWords | None = None,
        test_path: PathWords | None = None,
        hf_val_split: str | None = None,
        hf_test_split: str | None = None,
        val_sets: Mapping[str, PathWords] | None = None,
        mixture: Sequence[Mapping[str, Any]] | None = None,
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
        max_cut: float = 0.05,
        max_length: int | None = None,
        packing: bool | str = "auto",
        share_prefix: bool = True,
        bucket: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(bucket=bucket, **loading)
        check_choices(CHOICES, split=split, too_long=too_long, packing=packing)
        check_numbers(max_dropped, max_cut, max_length)
        check_name(name, self.named)
        check_one_source(path=path, hf_dataset=hf_dataset, mixture=mixture)
        if path is not None and name is not None and isinstance(self.named[name], Path):
            name = None  # your own file wins over the embedded set, of which nobody has a copy
        self.template = choose_template(template, own=own_template, template_date=template_date)
        self.context_length, self.columns, self.too_long = context_length, columns, too_long
        self.form_settings: dict[str, Any] = {"roles": roles, "irregular": irregular, "other_parts": other_parts}
        self.limit = min(max_length or context_length, context_length)
        self.share_prefix, self.is_packed = share_prefix, packing is True
        self.records: dict[str, Part] = {}
        self._make_tokenizer = tokenizer
        self._name, self._path = name, path
        self._hub = HubDataset(hf_dataset, hf_config, hf_split, hf_revision) if hf_dataset is not None else None
        self._own = own_splits(
            val_path=val_path, test_path=test_path, val_sets=val_sets,
            hub=self._hub, hf_val_split=hf_val_split, hf_test_split=hf_test_split,
        )  # fmt: skip
        self._how, self._split_seed = split, split_seed
        self._fractions = cut_fractions(self._own, val_fraction, test_fraction)
        self._entries = mixture_entries(mixture) if mixture is not None else []
        self._strip_eot = strip_eot
        self._max_dropped, self._max_cut, self._packing = max_dropped, max_cut, packing
        self._report: dict[str, Any] = {}

    # --- what a subclass defines -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def form(self) -> RecordForm:
        """How a record becomes a conversation."""

    @property
    @abstractmethod
    def kind(self) -> SampleKind:
        """How tokens become a sample."""

    @abstractmethod
    def lines_of(self, facts: dict[str, Any]) -> Iterable[str]:
        """What a reader should know about the data before trusting a number about it."""

    def digest_more(self) -> list[Any]:
        """Further plain values for the digest. May be overridden."""
        return []

    def titled(self, record: str, sequence: int) -> str:
        """The title of a sequence of a record in a preview. May be overridden."""
        return record

    # --- building --------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read, check and split the records, without tokenising: enough for `conversations_of` and `data_digest`."""
        pool = self._pool(self._sources())
        how = (self._how, self._fractions, self._split_seed)
        parts = split_pool(pool, *how, by_source=bool(self._entries), verify=self.verify)
        own = {split: self._pool({one.setting: one.source}) for split, one in self._own.items()}
        parts |= {split: Part(one, np.arange(len(one))) for split, one in own.items()}
        parts = {split: parts[split] for split in splits_in_order(parts)}
        pools = [pool, *own.values()]
        stores = [store for one in pools for store in one.stores]
        n_records = sum(map(len, pools))
        self._report = {"records": n_records, "skipped": sum(one.n_skipped for one in stores), "split": self._how}
        # After the split: a pair that is left out moves no other record to another split.
        self.records = {split: part.with_different_answers() for split, part in parts.items()}
        if self.left_out_as is not None:
            self._report[self.left_out_as] = n_records - sum(map(len, self.records.values()))
        self._say_what_was_found(stores)
        self.data_digest = self._digest()

    def build(self) -> None:
        self.read()
        make = self._make_tokenizer
        self.tokenizer = make if isinstance(make, Tokenizer) else make(self._training_texts())
        self.template.check_tokenizer(self.tokenizer)
        self.pad_id = self.tokenizer.eot_id or 0  # without effect: nothing sees a pad, and no mask looks at ids
        self._encode()
        self._report |= {"leaks": self._remembered("leaks", self._leaks)}
        self.choose_layout()
        for line in self.lines_of(self._report):
            log.info(line)
        for split, leak in self._report["leaks"].items():
            if split != "val" or self._own:
                log.info("%s prompts also in training: %d of %d", split.capitalize(), leak["prompts"], leak["of"])

    def choose_layout(self) -> None:
        """Measure what packing saves on the first training batches, and with `packing: auto` decide on the layout."""
        samples: Any = self.train_samples
        order: list[Any] = [self.batch_size, self.seed, self.shuffle, self.bucket, self.share_prefix]
        order += [self.mixture.report()] if self.mixture else []
        saved = self._remembered("layout", self._saved_by_packing, samples.key, order)
        if self._packing == "auto":
            self.is_packed = saved > PACKING_PAYS_FROM
        self._report |= {"packed": self.is_packed, "saved_by_packing": round(saved, 4)}

    def _saved_by_packing(self) -> float:
        padded = packed = 0
        for samples in self.first_batches(BATCHES_LOOKED_AT):
            lengths = [sequence.n_tokens - 1 for sample in samples for sequence in sample.sequences]
            padded += len(lengths) * max(lengths)
            packed += self.layouts.packed_length(samples, share_prefix=self.share_prefix)
        return 1 - packed / padded

    def collator(self) -> Callable[[Sequence[Sample]], Any]:
        if self.is_packed:
            return partial(self.layouts.packed, pad_id=self.pad_id, share_prefix=self.share_prefix)
        return partial(self.layouts.padded, pad_id=self.pad_id, context_length=self.context_length)

    # --- inspection ------------------------------------------------------------------------------------------------

    def conversations_of(self, split: str) -> Sequence[Conversation]:
        """The conversations of `train`, `val` or `test`, including those that are too long to train on."""
        return self.records[split]

    def sample_prompts(self, n: int) -> list[list[int]]:
        """Token ids of the prompts of the first `n` validation records that leave room for an answer."""
        prompts = (self.template.prompt_ids(self.tokenizer, one) for one in self.records["val"])
        return list(islice((ids for ids in prompts if len(ids) < self.context_length), n))

    def first_rows(self, split: str, n: int) -> tuple[LMBatch, list[str]]:
        """The sequences of the first `n` samples of a split, padded, and their titles."""
        samples: Any = {"train": self.train_samples, **self.eval_samples, **self.test_samples}[split]
        return self._shown([(f"record {index}", samples[index]) for index in range(min(n, len(samples)))])

    def preview(self, n: int) -> str:
        """The first samples, and those that lost most when they were cut."""
        from llm_lightning.data.inspection import as_text

        samples: Any = self.train_samples
        order = np.arange(len(samples)) if self.mixture is None else self.mixture.chosen(0)
        rows = [(self._titled(index), samples[index]) for index in order[:n].tolist()]
        for number, n_tokens, sample in samples.most_cut(WORST):
            rows.append((f"record {number}, cut from {counted(n_tokens, 'token')}", sample))
        batch, titles = self._shown(rows)
        return as_text(self.tokenizer, batch, colour=sys.stdout.isatty(), titles=titles)

    def _titled(self, index: int) -> str:
        """The title of a training sample in a preview."""
        if self.mixture is None:
            return f"record {index}"
        return f"record {index} of {self.mixture.names[self.mixture.source_of(np.array([index]))[0]]}"

    def _shown(self, samples: Sequence[tuple[str, Any]]) -> tuple[LMBatch, list[str]]:
        titles = [self.titled(title, at) for title, sample in samples for at in range(len(sample.sequences))]
        rows = [one for _, sample in samples for one in sample.sequences]
        return collate_padded(rows, pad_id=self.pad_id, context_length=self.context_length), titles

    def describe(self) -> str:
        sizes = ", ".join(f"{self._size_of(split):,} {split}" for split in self.records)
        layout = "packed" if self.is_packed else "padded"
        return f"{self._source_name()}: {sizes} {self.samples_are}; template {self.template.name}, {layout}"

    def _size_of(self, split: str) -> int:
        """Records of a split that are trained on or measured; before they are tokenised, all."""
        of_split = self._report.get("splits", {}).get(split)
        return (
            len(self.records[split])
            if of_split is None
            else int(of_split["records" if "records" in of_split else "pairs"])
        )

    def report(self) -> dict[str, Any]:
        return self._report

    # --- details ---------------------------------------------------------------------------------------------------

    def _sources(self) -> dict[str, Source]:
        """setting that names it -> source"""
        if self._entries:
            return {f"data.mixture ({one.name})": one.hub or one.path or "" for one in self._entries}
        return {"": self._source()}

    def _source(self) -> Source:
        if self._hub is not None:
            return self._hub
        if self._path is not None:
            return self._path
        if self._name is None:
            raise ValueError("data.name and data.path are both null; give data.path=FILE with records")
        return file_of(self.named[self._name])

    def _source_name(self) -> str:
        if self._entries:
            return f"a mixture of {', '.join(one.name for one in self._entries)}"
        if self._hub is not None:
            return self._hub.name
        return f"{self._name}" if self._path is None else ", ".join(words(self._path))

    def _pool(self, sources: Mapping[str, Source]) -> Pool:
        reading = Reading(self.form, self.file_options, self._strip_eot, self.bad_records_policy)
        stores = []
        for setting, source in sources.items():
            with named_by(setting):
                stores.append(open_store(source, reading, verify=self.verify))
        return Pool(stores)

    def _say_what_was_found(self, stores: Sequence[RecordStore]) -> None:
        """Counts of what was changed, left out or found when the records were read, also if that was long ago."""
        spelt = sum((store.control_words for store in stores), Counter[str]())
        if spelt:
            remedy = "" if self._strip_eot else "; data.strip_eot=true strips them from the ends of answers"
            log.warning("Answers spell out control tokens, which are read as text: %s%s", described(spelt), remedy)
        for line in lines_of(sum((store.counts for store in stores), Counter[str]())):
            log.info("%s", line)
        self.quarantined = [one for store in stores for one in store.quarantined]
        self.say_quarantined()

    def _training_texts(self) -> Iterable[str]:
        for record in self.records["train"]:
            yield self.template.text_of(record)
            if record.rejected is not None:
                yield record.rejected

    def _encode(self) -> None:
        """Make samples of all splits."""
        fitting = Fitting(self.kind, self.limit, self.too_long, self.tokenizer, self.template)
        pools = {id(part.pool): part.pool for part in self.records.values()}
        opened = {key: self._tokens(pool) for key, pool in pools.items()}  # once: each maps its columns into memory
        tokens = {split: opened[id(part.pool)] for split, part in self.records.items()}
        lengths = np.concatenate([tokens[split].longest(part.rows) for split, part in self.records.items()])
        if self.too_long == "cut_prompt":
            check_lengths(lengths, self._report["records"], self.limit, self._max_cut, self._max_dropped)
        samples = {
            split: fitting.samples(part, tokens[split], verify=self.verify) for split, part in self.records.items()
        }
        for split, found in samples.items():
            if not len(found):
                raise ValueError(self.nothing_fits.format(split=split, limit=self.limit))
        self._report |= lost_of(samples) | {"limit": self.limit, "too_long": self.too_long}
        self._check_losses(self._report, lengths)
        for split, own in self._own.items():  # of a small set, half may be few records of all
            part = self.records[split]
            facts = lost_of({split: samples[split]}) | {"limit": self.limit, "records": len(part)}
            with named_by(own.setting):
                self._check_losses(facts, tokens[split].longest(part.rows))
        self._take(samples)

    def _check_losses(self, facts: Mapping[str, Any], lengths: np.ndarray) -> None:
        check_dropped_fraction(facts, self._max_dropped, lengths)
        check_cut_fraction(facts, self._max_cut, lengths)

    def _tokens(self, pool: Pool) -> TokenPool:
        encode = type(self.kind).encode
        stores = [tokens_of(one, self.tokenizer, self.template, encode, verify=self.verify) for one in pool.stores]
        return TokenPool(stores)

    def _take(self, samples: dict[str, Samples[Sample]]) -> None:
        """Give each split its role."""
        train = samples["train"]
        self.train_samples, self.test_samples = train, {"test": samples["test"]}
        self.eval_samples = {split: found for split, found in samples.items() if split.startswith("val")}
        self.measure_training(train)
        if self._entries:
            sizes = np.bincount(self.records["train"].pool.store_of(train.rows), minlength=len(self._entries)).tolist()
            names, weights = [one.name for one in self._entries], [one.weight for one in self._entries]
            self.mixture = Mixture(names, sizes, weights, self.seed, shuffle=self.shuffle)
            self._report["mixture"] = self.mixture.report()
            for line in self.mixture.lines(self.samples_are):
                log.info("Mixture: %s", line)

    def _leaks(self) -> dict[str, dict[str, int]]:
        return {split: leaks(self.records, split) for split in self.records if split != "train"}

    def _digest(self) -> str:
        values = [*self.template.digest_values(), *self.digest_more()]
        if self._entries:
            total = sum(one.weight for one in self._entries)
            values.append({"mixture": [[one.name, round(one.weight / total, 9)] for one in self._entries]})
        digest: str = self._remembered("digest", lambda: digest_of(self.records, values), values)
        return digest

    def _remembered(self, name: str, compute: Callable[[], Any], *spec: Any) -> Any:
        """A value that follows from the records of all splits and `spec`."""
        keys = [[split, part.key] for split, part in self.records.items()]
        return remembered(name, [keys, *spec], compute, verify=self.verify)
