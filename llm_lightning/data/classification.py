"""Classification data: labelled texts, balanced, split so that no text appears in two splits, batched by length.

Data flow: records (text, label) -> class indices -> splits -> balancing -> token ids -> batches of similar length.
Everything that was dropped, cut or repeated is counted in `report()` and logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import ClassificationBatch, LabelledSample, collate_classification
from llm_lightning.data.files.bad_records import LISTED
from llm_lightning.data.files.find import PathWords, words
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.labelled_parts import (
    Part,
    classes_in_own_split,
    classes_of,
    facts_of,
    listed,
    remembered_facts,
)
from llm_lightning.data.labelled_split import LabelledSplit
from llm_lightning.data.own_splits import check_one_source, cut_fractions, named_by, own_splits, splits_in_order
from llm_lightning.data.record_store.labelled import LabelledStore, open_labelled, tokens_of_texts
from llm_lightning.data.records.labelled import LabelledReading, in_order
from llm_lightning.data.records.rows import Source
from llm_lightning.data.samples import LabelledTokens
from llm_lightning.files.download import Pinned, check_name, file_of
from llm_lightning.terminal import counted, inline, visible
from llm_lightning.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedSet:
    """A data set known by name."""

    file: Path | Pinned
    labels: tuple[str, ...]
    columns: tuple[str, ...] | None


NAMED = {
    "short_messages": NamedSet(Path(__file__).with_name("embedded") / "short_messages.tsv", ("ham", "spam"), None),
    # SMS Spam Collection, UCI data set 228, CC BY 4.0 (Almeida, Gomez Hidalgo and Yamakami 2011)
    "sms_spam": NamedSet(
        Pinned(
            url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
            sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
            n_bytes=None,
            filename="SMSSpamCollection.tsv",
            member="SMSSpamCollection",
            member_bytes=477_907,
        ),
        ("ham", "spam"),
        ("label", "text"),
    ),
}


class ClassificationDataModule(BaseDataModule):
    """Labelled texts in a training, a validation and a test split.

    Args:
        tokenizer: or a function that trains one on the training texts.
        context_length: longest input of the model, in tokens.
        name: `short_messages` (embedded), or `sms_spam` (downloaded).
        path: files of your own, see `find_files`; with `sms_spam`, a local copy of it.
        text_column, label_column: of your file or Hugging Face dataset.
        hf_dataset, hf_config, hf_split, hf_revision: a dataset of the hub instead.
        val_path, test_path: files with validation and test texts of your own, used whole and not balanced.
        hf_val_split, hf_test_split: splits of that dataset instead.
        val_sets: further validation sets, name -> path, each with metrics `val/<name>/...`.
        labels: names of the classes in the order of their indices; default: sorted, numbers by value.
        fold_labels: take labels that differ only in case for one.
        split: `grouped` (texts that are equal but for case, digits, white space and punctuation stay together; digits
            count where a split would otherwise lack a class) or `book` (the book's own split of sms_spam, in which
            equal texts appear in two splits).
        val_fraction, test_fraction: of the records; not used for a split with texts of its own.
        split_seed: of the split; apart from the training seed, so that a sweep over seeds has one split.
        balance: `undersample` (draw as many texts from each class as the smallest has) or `none`.
        max_length: number of tokens that a text is cut to; default: `context_length`.
        pad_to: `longest_train`, `context`, a number of tokens, or null: the longest text of a batch.
        bucket: batches of similar length; false: a plain shuffle.
    """

    samples_are = "texts"
    labels: list[str]
    pad_to: int | None
    pad_id: int

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Callable[[Iterable[str]], Tokenizer],
        context_length: int,
        name: str | None = "short_messages",
        path: PathWords | None = None,
        text_column: str = "text",
        label_column: str = "label",
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        val_path: PathWords | None = None,
        test_path: PathWords | None = None,
        hf_val_split: str | None = None,
        hf_test_split: str | None = None,
        val_sets: Mapping[str, PathWords] | None = None,
        labels: Sequence[str] | None = None,
        fold_labels: bool = False,
        split: str = "grouped",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 123,
        balance: str = "undersample",
        max_length: int | None = None,
        pad_to: int | str | None = None,
        bucket: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(bucket=bucket, **loading)
        _check_lengths(max_length, pad_to)
        check_name(name, NAMED)
        check_one_source(path=path, hf_dataset=hf_dataset)
        if path is not None and name is not None and isinstance(NAMED[name].file, Path):
            name = None  # your own file wins over the embedded set, of which nobody has a copy
        if split == "book" and name != "sms_spam":
            raise ValueError("data.split=book is the book's split of data.name=sms_spam; use data.split=grouped")
        self._make_tokenizer, self.context_length = tokenizer, context_length
        self._name, self._path = name, path
        self._columns = (text_column, label_column)
        self._hub = HubDataset(hf_dataset, hf_config, hf_split, hf_revision) if hf_dataset is not None else None
        self._own = own_splits(
            val_path=val_path, test_path=test_path, val_sets=val_sets,
            hub=self._hub, hf_val_split=hf_val_split, hf_test_split=hf_test_split,
        )  # fmt: skip
        if split == "book" and not {"val", "test"}.isdisjoint(self._own):
            named = next(self._own[one].setting for one in ("val", "test") if one in self._own)
            raise ValueError(f"data.split=book cuts off its own validation and test texts; leave out {named}")
        self._labels, self._fold_labels = labels, fold_labels
        fractions = cut_fractions(self._own, val_fraction, test_fraction)
        self._splitting = LabelledSplit(split, fractions, split_seed, balance)
        self._max_length, self._pad_to = max_length, pad_to
        self.parts: dict[str, Part] = {}
        """train, val, val/<name> ..., test"""
        self._report: dict[str, Any] = {}
        self._notes: list[str] = []

    def read(self) -> None:
        """Read, split and balance the texts, without tokenising: enough for `split_of` and `data_digest`."""
        stores = {"": self._read()}
        for split, (setting, source) in self._own.items():
            with named_by(setting):
                stores[split] = self._labelled(source)
        records = stores[""]
        self.labels = list(self._labels or self._named_labels() or in_order(records.labels))
        classes = classes_of(records, self.labels)
        rows = self._splitting.rows(records, classes, self.labels, verify=self.verify)
        self.parts = {split: Part(records, part, classes[part]) for split, part in rows.items()}
        for split, (setting, _) in self._own.items():
            own = classes_in_own_split(stores[split], self.labels, setting)
            self.parts[split] = Part(stores[split], np.arange(len(own)), own)
        self.parts = {split: self.parts[split] for split in splits_in_order(self.parts)}
        self._notes = [note for store in stores.values() for note in store.notes]
        self.quarantined = [bad for store in stores.values() for bad in store.quarantined]
        facts = remembered_facts(records, self.parts, self.labels, verify=self.verify)
        self.data_digest = facts.pop("digest")
        self._report = {
            "records": len(records),
            "records_over_several_lines": records.merged,
            "split": self._splitting.kind,
        }
        self._report |= facts
        if self.quarantined:
            first = [f"{place}: {reason}" for place, reason in self.quarantined[:LISTED]]
            self._report |= {"quarantined": len(self.quarantined), "quarantined_first": first}

    def build(self) -> None:
        self.read()
        self._tokenize()
        self.say_quarantined()
        for line in (*self._notes, *self._lines()):
            log.info(line)

    def collator(self) -> Callable[[Sequence[LabelledSample]], ClassificationBatch]:
        return partial(collate_classification, pad_id=self.pad_id, pad_to=self.pad_to, most=self.context_length)

    def class_of(self, sample: LabelledSample) -> int:
        return sample.label

    def preview(self, n: int) -> str:
        lines = []
        for index in range(min(n, len(self.train_samples))):  # type: ignore[arg-type]
            sample = self.train_samples[index]
            lines += [f"--- {inline(self.labels[sample.label])}, {len(sample.token_ids)} tokens"]
            lines += [visible(self.tokenizer.decode(sample.token_ids.tolist()))]
        return "\n".join(lines)

    def describe(self) -> str:
        sizes = ", ".join(f"{len(part):,} {split}" for split, part in self.parts.items())
        return f"{self._source()}: {sizes}; classes {listed(self.labels)}"

    def report(self) -> dict[str, Any]:
        return self._report

    def split_of(self, name: str) -> list[tuple[str, str]]:
        """The (text, label) pairs of `train`, `val`, `val/<name>` or `test`."""
        part = self.parts[name]
        return [(text, self.labels[at]) for text, at in zip(part.texts(), part.classes.tolist(), strict=True)]

    # --- reading and splitting -------------------------------------------------------------------------------------

    def _read(self) -> LabelledStore:
        """All records."""
        if self._hub is not None:
            return self._labelled(self._hub)
        named = NAMED.get(self._name or "")
        if named is None:
            if self._path is None:
                raise ValueError("data.name and data.path are both null; give data.path=FILE with records")
            return self._labelled(self._path)
        if self._path is not None and not isinstance(self._path, str):
            raise ValueError(f"data.name={self._name} is one file; data.path names a copy of it, not {self._path}")
        file = Path(self._path) if self._path else file_of(named.file)
        if self._splitting.kind == "book" and not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; check data.path")
        reading = LabelledReading(FileOptions(quotes=False), columns=named.columns)
        return self._labelled(file, reading, like_pandas=self._splitting.kind == "book")

    def _labelled(self, source: Source, reading: LabelledReading | None = None, **how: Any) -> LabelledStore:
        """The records of a source, read as the settings say unless `reading` does."""
        if reading is None:
            text, label = self._columns
            reading = LabelledReading(self.file_options, text, label, fold_labels=self._fold_labels)
        return open_labelled(source, reading, bad_records=self.bad_records_policy, verify=self.verify, **how)

    def _named_labels(self) -> tuple[str, ...] | None:
        return NAMED[self._name].labels if self._name and not self._hub else None

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _tokenize(self) -> None:
        make = self._make_tokenizer
        self.tokenizer = make if isinstance(make, Tokenizer) else make(self.parts["train"].texts())
        self.pad_id = 0 if self.tokenizer.eot_id is None else self.tokenizer.eot_id
        limit = min(self._max_length or self.context_length, self.context_length)
        samples = {split: self._samples(part, limit) for split, part in self.parts.items()}
        self.pad_to = self._padded_length(int(samples["train"].lengths.max()))
        for one in samples.values():
            one.limit = min(limit, self.pad_to or limit)
        self.train_samples, self.test_samples = samples["train"], {"test": samples["test"]}
        self.eval_samples = {split: one for split, one in samples.items() if split.startswith("val")}
        self.measure_training(samples["train"])
        facts = {split: facts_of(one, self.parts[split], self.labels) for split, one in samples.items()}
        self._report |= {"splits": facts, "pad_to": self.pad_to}

    def _samples(self, part: Part, limit: int) -> LabelledTokens:
        tokens = tokens_of_texts(part.store, self.tokenizer, verify=self.verify)
        return LabelledTokens(tokens, part.rows, part.classes, limit)

    def _measured(self, samples: Any) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(samples, Subset):
            lengths, classes = self._measured(samples.dataset)
            return lengths[samples.indices], classes[samples.indices]
        return samples.lengths, samples.labels

    def _padded_length(self, longest_train: int) -> int | None:
        if self._pad_to == "longest_train":
            return longest_train
        if self._pad_to == "context":
            return self.context_length
        assert self._pad_to is None or isinstance(self._pad_to, int)
        if self._pad_to is not None and self._pad_to > self.context_length:
            raise ValueError(
                f"data.pad_to={self._pad_to} exceeds model.context_length={self.context_length}; lower data.pad_to "
                "or raise model.context_length"
            )
        return self._pad_to

    # --- words -----------------------------------------------------------------------------------------------------

    def _source(self) -> str:
        return self._hub.name if self._hub else self._name or ", ".join(words(self._path or ""))

    def _lines(self) -> Iterable[str]:
        """What a reader should know about the data before trusting a number about it."""
        facts = self._report
        replaced = [split for split in ("val", "test") if split in self._own]
        if replaced:
            unused = " and ".join(f"data.{split}_fraction" for split in replaced)
            named = " and ".join(self._own[split].setting for split in replaced)
            yield f"Not used: {unused}; {named} names the texts"
        for split, part in facts["splits"].items():
            counts = listed([f"{count:,} {label}" for label, count in part["classes"].items()])
            whole = f" ({self._own[split].setting}, used whole)" if split in self._own else ""
            cut = f", {part['cut']} cut to {part['limit']}" if part["cut"] else ""
            yield f"{split}{whole}: {counts}; {part['mean_tokens']:.1f} tokens each, at most {part['most_tokens']}{cut}"
            if absent := [label for label, count in part["classes"].items() if not count]:
                yield f"{split} has no text of class {listed(absent)}: its figures of that class say nothing"
        if facts["records_over_several_lines"]:
            places = ", ".join(facts["records_over_several_lines"])
            yield f"Read as pandas reads it: quotation marks merge lines into one record at {places}"
        n_left = facts["records"] - sum(len(part) for split, part in self.parts.items() if split not in self._own)
        if n_left:
            yield f"{n_left:,} of {counted(facts['records'], 'record')} left out to balance the classes" + (
                "" if self._splitting.kind == "book" else "; data.balance=none keeps them"
            )
        yield (
            f"{counted(facts['records'], 'record')}: {facts['exact_duplicates']} repeat another exactly, "
            f"{facts['normalized_duplicates']} up to case, digits, white space and punctuation"
        )
        for split in ("test", *(split for split in self._own if split != "test")):
            leak = facts["leaks"][split]
            yield (
                f"{split.capitalize()} texts also in training: {leak['exact']} exactly, {leak['trimmed']} trimmed, "
                f"{leak['normalized']} normalized, of {leak['of']}"
            )


def _check_lengths(max_length: int | None, pad_to: int | str | None) -> None:
    if max_length is not None and max_length < 1:
        raise ValueError(f"data.max_length={max_length} must be at least 1")
    if isinstance(pad_to, str) and pad_to not in ("longest_train", "context"):
        raise ValueError(f"data.pad_to={pad_to!r} must be longest_train, context, a number of tokens, or null")
    if isinstance(pad_to, int) and pad_to < 1:
        raise ValueError(f"data.pad_to={pad_to} must be at least 1")
