"""Classification data: labelled texts, balanced, split so that no text appears in two splits, batched by length.

Data flow: records (text, label) -> class indices -> splits -> balancing -> token ids -> batches of similar length.
Everything that was dropped, cut or repeated is counted in `report()` and logged once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_lightning.data.base import BaseDataModule, evenly_spaced
from llm_lightning.data.batches import ClassificationBatch, LabelledSample, collate_classification
from llm_lightning.data.files.find import PathWords, words
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.leaks import duplicates, leaked_texts
from llm_lightning.data.records.labelled import LabelledText, in_order, read_labelled, read_like_pandas
from llm_lightning.data.records.rows import Source
from llm_lightning.data.samples import Rows
from llm_lightning.data.splits import book_split, grouped_split, normalized, undersampled
from llm_lightning.files.download import Pinned, check_name, file_of
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted, inline, visible
from llm_lightning.tokenizers.base import Tokenizer

MOST_LISTED = 100
"""Classes that a log line names."""

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
        labels: names of the classes in the order of their indices; default: sorted, numbers by value.
        fold_labels: take labels that differ only in case for one.
        split: `grouped` (texts that are equal but for case, digits, white space and punctuation stay together; digits
            count where a split would otherwise lack a class) or `book` (the book's own split of sms_spam, in which
            equal texts appear in two splits).
        val_fraction, test_fraction: of the records.
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
        _check_settings(split, balance, val_fraction, test_fraction, max_length, pad_to)
        check_name(name, NAMED)
        if path is not None and name is not None and isinstance(NAMED[name].file, Path):
            name = None  # your own file wins over the embedded set, of which nobody has a copy
        if split == "book" and name != "sms_spam":
            raise ValueError("data.split=book is the book's split of data.name=sms_spam; use data.split=grouped")
        self._make_tokenizer, self.context_length = tokenizer, context_length
        self._name, self._path = name, path
        self._columns = (text_column, label_column)
        self._hub = HubDataset(hf_dataset, hf_config, hf_split, hf_revision) if hf_dataset is not None else None
        self._labels, self._fold_labels = labels, fold_labels
        self._split, self._fractions = split, (val_fraction, test_fraction)
        self._split_seed, self._balance = split_seed, balance
        self._max_length, self._pad_to = max_length, pad_to
        self._texts: dict[str, list[tuple[str, int]]] = {}
        self._report: dict[str, Any] = {}

    def read(self) -> None:
        """Read, split and balance the texts, without tokenising: enough for `split_of` and `data_digest`."""
        records, merged = self._read()
        self.labels = list(self._labels or self._named_labels() or in_order({record.label for record in records}))
        classes = _class_indices(records, self.labels)
        if self._split == "book":
            parts = book_split(classes, self._fractions, self._split_seed)
        else:
            parts = self._grouped(records, classes)
        self._check_classes(parts, classes)
        if self._split == "grouped" and self._balance == "undersample":
            parts = {split: undersampled(part, classes, self._split_seed) for split, part in parts.items()}
        self._texts = {split: [(records[i].text, classes[i]) for i in part] for split, part in parts.items()}
        self.data_digest = self._digest()
        self._report = {"records": len(records), "records_over_several_lines": merged, "split": self._split}
        self._report |= duplicates([record.text for record in records]) | {
            "leaks": leaked_texts(self._texts, self.labels)
        }

    def build(self) -> None:
        self.read()
        self._tokenize()
        for line in self._lines():
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
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self._texts.items())
        return f"{self._source()}: {sizes}; classes {_listed(self.labels)}"

    def report(self) -> dict[str, Any]:
        return self._report

    def split_of(self, name: str) -> list[tuple[str, str]]:
        """The (text, label) pairs of `train`, `val` or `test`."""
        return [(text, self.labels[label]) for text, label in self._texts[name]]

    # --- reading and splitting -------------------------------------------------------------------------------------

    def _read(self) -> tuple[list[LabelledText], list[str]]:
        """All records, and the places of lines that pandas merges into one."""
        if self._hub is not None:
            return self._labelled(self._hub), []
        named = NAMED.get(self._name or "")
        if named is None:
            if self._path is None:
                raise ValueError("data.name and data.path are both null; give data.path=FILE with records")
            return self._labelled(self._path), []
        if self._path is not None and not isinstance(self._path, str):
            raise ValueError(f"data.name={self._name} is one file; data.path names a copy of it, not {self._path}")
        file = Path(self._path) if self._path else file_of(named.file)
        if self._split == "book":
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; check data.path")
            return read_like_pandas(file, named.columns or ())
        return read_labelled(file, options=FileOptions(quotes=False), columns=named.columns), []

    def _labelled(self, source: Source) -> list[LabelledText]:
        text, label = self._columns
        return read_labelled(
            source, options=self.file_options, text_column=text, label_column=label, fold_labels=self._fold_labels
        )

    def _named_labels(self) -> tuple[str, ...] | None:
        return NAMED[self._name].labels if self._name and not self._hub else None

    def _grouped(self, records: Sequence[LabelledText], classes: Sequence[int]) -> dict[str, list[int]]:
        """The grouped split; digits count where a split would otherwise lack a class."""
        folded = grouped_split(
            [normalized(record.text) for record in records], classes, self._fractions, self._split_seed
        )
        if self._first_missing(folded, classes) is None:
            return folded
        keys = [normalized(record.text, fold_digits=False) for record in records]
        parts = grouped_split(keys, classes, self._fractions, self._split_seed)
        if self._first_missing(parts, classes) is not None:
            return folded
        log.warning(
            "Texts that differ only in their digits may appear in two splits here: kept together, they would leave a "
            "split without a class"
        )
        return parts

    def _check_classes(self, parts: dict[str, list[int]], classes: Sequence[int]) -> None:
        found = self._first_missing(parts, classes)
        if found is not None:
            split, label = found
            raise ValueError(
                f"the {split} split has no text of class {label!r} ({counted(len(parts[split]), 'text')}); "
                "give more texts, or raise data.val_fraction and data.test_fraction"
            )

    def _first_missing(self, parts: dict[str, list[int]], classes: Sequence[int]) -> tuple[str, str] | None:
        """The first split that lacks a class, and the class."""
        for split, part in parts.items():
            present = {classes[index] for index in part}
            missing = (label for index, label in enumerate(self.labels) if index not in present)
            if (label := next(missing, None)) is not None:
                return split, label
        return None

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _tokenize(self) -> None:
        make = self._make_tokenizer
        self.tokenizer = make if isinstance(make, Tokenizer) else make(text for text, _ in self._texts["train"])
        self.pad_id = 0 if self.tokenizer.eot_id is None else self.tokenizer.eot_id
        whole = {
            split: [self.tokenizer.encode_document(text) for text, _ in rows] for split, rows in self._texts.items()
        }
        limit = min(self._max_length or self.context_length, self.context_length)
        self.pad_to = self._padded_length(max(min(len(ids), limit) for ids in whole["train"]))
        limit = min(limit, self.pad_to or limit)
        samples = {
            split: Rows(
                [
                    LabelledSample(index, ids[:limit], label)
                    for index, (ids, (_, label)) in enumerate(zip(whole[split], rows, strict=True))
                ]
            )
            for split, rows in self._texts.items()
        }
        self.train_samples, self.test_samples = samples["train"], {"test": samples["test"]}
        self.eval_samples = {"val": samples["val"]}
        if self.eval_batches > 0:
            self.eval_samples["train_eval"] = evenly_spaced(samples["train"], self.eval_batches * self.batch_size)
        self._report |= {
            "splits": {split: _facts(whole[split], self._texts[split], self.labels, limit) for split in whole},
            "pad_to": self.pad_to,
        }

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

    def _digest(self) -> str:
        content = {split: [[text, label] for text, label in rows] for split, rows in self._texts.items()}
        return hashlib.sha256(json.dumps([content, self.labels]).encode()).hexdigest()

    def _lines(self) -> Iterable[str]:
        """What a reader should know about the data before trusting a number about it."""
        facts = self._report
        for split, part in facts["splits"].items():
            counts = _listed([f"{count:,} {label}" for label, count in part["classes"].items()])
            cut = f", {part['cut']} cut to {part['limit']}" if part["cut"] else ""
            yield f"{split}: {counts}; {part['mean_tokens']:.1f} tokens each, at most {part['most_tokens']}{cut}"
        if facts["records_over_several_lines"]:
            places = ", ".join(facts["records_over_several_lines"])
            yield f"Read as pandas reads it: quotation marks merge lines into one record at {places}"
        yield (
            f"{counted(facts['records'], 'record')}: {facts['exact_duplicates']} repeat another exactly, "
            f"{facts['normalized_duplicates']} up to case, digits, white space and punctuation"
        )
        leak = facts["leaks"]["test"]
        yield (
            f"Test texts also in training: {leak['exact']} exactly, {leak['trimmed']} trimmed, "
            f"{leak['normalized']} normalized, of {leak['of']}"
        )


def _listed(words: Sequence[str]) -> str:
    more = f", ... ({len(words):,} in all)" if len(words) > MOST_LISTED else ""
    return ", ".join(words[:MOST_LISTED]) + more


def _facts(
    ids: Sequence[np.ndarray], rows: Sequence[tuple[str, int]], labels: Sequence[str], limit: int
) -> dict[str, Any]:
    lengths = [len(one) for one in ids]
    counts = Counter(label for _, label in rows)
    return {
        "classes": {name: counts[index] for index, name in enumerate(labels)},
        "mean_tokens": sum(lengths) / len(lengths),
        "most_tokens": max(lengths),
        "limit": limit,
        "cut": sum(length > limit for length in lengths),
    }


def _class_indices(records: Sequence[LabelledText], labels: Sequence[str]) -> list[int]:
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"data.labels names {twice!r} twice; name each class once")
    index = {label: number for number, label in enumerate(labels)}
    unknown = [record for record in records if record.label not in index]
    if unknown:
        hint = did_you_mean(unknown[0].label, labels, "{!r}")
        raise ValueError(
            f"{unknown[0].place}: unknown label {unknown[0].label!r} "
            f"({counted(len(unknown), 'record')} with unknown labels); {hint}data.labels: {', '.join(labels)}"
        )
    if len(labels) < 2:
        raise ValueError(f"all {len(records)} records have the label {labels[0]!r}; there must be at least two classes")
    absent = set(labels) - {record.label for record in records}
    if absent:
        raise ValueError(f"no record has the label {sorted(absent)[0]!r} of data.labels; leave it out")
    return [index[record.label] for record in records]


def _check_settings(
    split: str, balance: str, val: float, test: float, max_length: int | None, pad_to: int | str | None
) -> None:
    if split not in ("grouped", "book"):
        raise ValueError(f"data.split={split!r} must be grouped or book")
    if balance not in ("undersample", "none"):
        raise ValueError(f"data.balance={balance!r} must be undersample or none")
    if val <= 0 or test <= 0 or val + test >= 1:
        raise ValueError(
            f"data.val_fraction={val} and data.test_fraction={test} must be positive and sum to less than 1"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"data.max_length={max_length} must be at least 1")
    if isinstance(pad_to, str) and pad_to not in ("longest_train", "context"):
        raise ValueError(f"data.pad_to={pad_to!r} must be longest_train, context, a number of tokens, or null")
    if isinstance(pad_to, int) and pad_to < 1:
        raise ValueError(f"data.pad_to={pad_to} must be at least 1")
