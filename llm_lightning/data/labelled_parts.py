"""Splits of labelled texts: their classes, and what a run says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_lightning.data.leaks import duplicates, leaked_texts
from llm_lightning.data.record_store.labelled import FORMAT, LabelledStore
from llm_lightning.data.records.labelled import whole_number
from llm_lightning.data.samples import LabelledTokens
from llm_lightning.data.text_keys import TextKeys
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.columns import Writer, key_of, made_once
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted

MOST_LISTED = 100
"""Classes that a message names."""


@dataclass(frozen=True)
class Part:
    """The texts of one split, in order.

    Args:
        store: the records of its source.
        rows: (n,) int64, their numbers in the store.
        classes: (n,) int32, their class indices.
    """

    store: LabelledStore
    rows: np.ndarray
    classes: np.ndarray

    @property
    def keys(self) -> TextKeys:
        return self.store.keys.of_rows(self.rows)

    def texts(self) -> Iterator[str]:
        return self.store.texts(self.rows.tolist())

    def counts(self, labels: Sequence[str]) -> dict[str, int]:
        """label -> its number of texts."""
        return dict(zip(labels, np.bincount(self.classes, minlength=len(labels)).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.rows)


def classes_of(records: LabelledStore, labels: Sequence[str]) -> np.ndarray:
    """The class indices of training records, (n,) int32: the places of their labels in `labels`.

    Raises:
        ValueError: if labels and records do not fit.
    """
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"data.labels names {twice!r} twice; name each class once")
    index = {label: number for number, label in enumerate(labels)}
    unknown = [label for label in records.labels if label not in index]
    if unknown:
        hint = did_you_mean(unknown[0], labels, "{!r}")
        n = sum(records.counts()[label] for label in unknown)
        raise ValueError(
            f"{records.first_place(unknown[0])}: unknown label {unknown[0]!r} "
            f"({counted(n, 'record')} with unknown labels); {hint}data.labels: {', '.join(labels)}"
        )
    if len(labels) < 2:
        raise ValueError(f"all {len(records)} records have the label {labels[0]!r}; there must be at least two classes")
    absent = set(labels) - set(records.labels)
    if absent:
        raise ValueError(f"no record has the label {sorted(absent)[0]!r} of data.labels; leave it out")
    return np.array([index[label] for label in records.labels], dtype=np.int32)[records.codes]


def classes_in_own_split(records: LabelledStore, labels: Sequence[str], setting: str) -> np.ndarray:
    """The class indices of records of a split of its own, (n,) int32; 1.0 is the class 1, as in one file.

    Args:
        labels: the classes of the training records.
        setting: that names the split, for messages.

    Raises:
        ValueError: if a label is not among `labels`.
    """
    index = {number: at for at, label in enumerate(labels) if (number := whole_number(label)) is not None}
    own = {label: index.get(whole_number(label) or "") for label in records.labels}
    own |= {label: at for at, label in enumerate(labels) if label in own}
    unknown = [label for label, at in own.items() if at is None]
    if unknown:
        n = sum(records.counts()[label] for label in unknown)
        raise ValueError(
            f"{records.first_place(unknown[0])}: the label {unknown[0]!r} ({counted(n, 'record')} of {setting} with "
            f"unknown labels) is not among those of the training texts: {listed(labels)}; "
            f"{_remedy(unknown[0], labels)}"
        )
    return np.array([own[label] for label in records.labels], dtype=np.int32)[records.codes]


def _remedy(label: str, labels: Sequence[str]) -> str:
    if label.casefold() in map(str.casefold, labels):
        return "set data.fold_labels=true to take labels that differ in case for one"
    return did_you_mean(label, labels, "{!r}") + "correct it, or give training texts of this class"


def remembered_facts(
    records: LabelledStore, parts: Mapping[str, Part], labels: Sequence[str], *, verify: bool = False
) -> dict[str, Any]:
    """Digest, duplicates and leaks; computed once, then taken from the cache.

    Args:
        records: the training records, of which duplicates are counted.
        verify: compare what is in the cache with its digest.
    """
    names = [
        [split, part.store.folder.name, _sha256(part.rows), _sha256(part.classes)] for split, part in parts.items()
    ]
    folder = cache_dir() / "records" / f"splits-{key_of([FORMAT, records.folder.name, names, list(labels)])}"

    def compute(writer: Writer) -> dict[str, Any]:
        return {"digest": digest_of(parts, labels), **duplicates(records.keys), "leaks": _leaks(parts, labels)}

    facts = dict(made_once(folder, compute, verify=verify).facts)
    return facts | {"leaks": {split: facts["leaks"][split] for split in parts if split != "train"}}  # in their order


def _leaks(parts: Mapping[str, Part], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """split -> its texts that are also in training."""
    train = parts["train"].keys
    evaluated = {split: part for split, part in parts.items() if split != "train"}
    return {split: leaked_texts(train, part.keys, part.classes, labels) for split, part in evaluated.items()}


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def digest_of(parts: Mapping[str, Part], labels: Sequence[str]) -> str:
    """sha256 of the JSON of [{split: [[text, class index], ...], ...}, labels], which is never whole in memory."""
    digest = hashlib.sha256(b"[{")
    for number, (split, part) in enumerate(parts.items()):
        digest.update(f"{', ' * bool(number)}{json.dumps(split)}: [".encode())
        for at, pair in enumerate(zip(part.texts(), part.classes.tolist(), strict=True)):
            digest.update(f"{', ' * bool(at)}{json.dumps(pair)}".encode())
        digest.update(b"]")
    digest.update(f"}}, {json.dumps(list(labels))}]".encode())
    return digest.hexdigest()


def facts_of(samples: LabelledTokens, part: Part, labels: Sequence[str]) -> dict[str, Any]:
    """What a report says of a split."""
    return {
        "classes": part.counts(labels),
        "mean_tokens": int(samples.whole.sum()) / len(samples),
        "most_tokens": int(samples.whole.max()),
        "limit": samples.limit,
        "cut": int((samples.whole > samples.limit).sum()),
    }


def listed(words: Sequence[str]) -> str:
    more = f", ... ({len(words):,} in all)" if len(words) > MOST_LISTED else ""
    return ", ".join(words[:MOST_LISTED]) + more
