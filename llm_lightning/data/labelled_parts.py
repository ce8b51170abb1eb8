"""Splits of labelled texts: their classes, their digest, their tokens.

Memory: of each text its UTF-8 bytes, its tokens, and some 100 bytes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_lightning.data.records.labelled import whole_number
from llm_lightning.data.records.labelled_texts import LabelledTexts
from llm_lightning.data.samples import LabelledTokens
from llm_lightning.data.text_keys import TextKeys
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted
from llm_lightning.tokenizers.base import Tokenizer

MOST_LISTED = 100
"""Classes that a message names."""


@dataclass(frozen=True)
class LabelledSet:
    """The records of one source with their class indices, (n,) int32."""

    records: LabelledTexts
    classes: np.ndarray

    @cached_property
    def keys(self) -> TextKeys:
        return TextKeys.of(self.texts())

    def texts(self) -> Iterator[str]:
        return (self.records.text(index) for index in range(len(self.records)))

    def part(self, indices: Sequence[int] | np.ndarray) -> Part:
        return Part(self, np.asarray(indices, dtype=np.int64))


@dataclass(frozen=True)
class Part:
    """The texts of one split, in order: those of `source` at `indices`, (n,) int64."""

    source: LabelledSet
    indices: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """(n,) int32"""
        return self.source.classes[self.indices]

    @property
    def keys(self) -> TextKeys:
        return self.source.keys.of_rows(self.indices)

    def texts(self) -> Iterator[str]:
        return (self.source.records.text(index) for index in self.indices.tolist())

    def counts(self, labels: Sequence[str]) -> dict[str, int]:
        """label -> its number of texts."""
        return dict(zip(labels, np.bincount(self.classes, minlength=len(labels)).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.indices)


def classes_of(records: LabelledTexts, labels: Sequence[str]) -> np.ndarray:
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


def classes_in_own_split(records: LabelledTexts, labels: Sequence[str], setting: str) -> np.ndarray:
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


def tokenized(part: Part, tokenizer: Tokenizer, limit: int, name: str) -> tuple[LabelledTokens, np.ndarray]:
    """The tokens of a split, each text cut to `limit`; and the lengths of the whole texts, (n,) int32."""
    ids, ends, lengths = bytearray(), array("q", [0]), array("i")
    bar = tqdm(part.texts(), desc=f"tokenising {name}", total=len(part), unit=" texts", disable=None, delay=1)
    for text in bar:
        whole = tokenizer.encode_document(text)
        lengths.append(len(whole))
        ids += whole[:limit].tobytes()
        ends.append(ends[-1] + min(len(whole), limit))
    tokens = np.frombuffer(ids, dtype=tokenizer.dtype)
    samples = LabelledTokens(tokens, np.frombuffer(ends, dtype=np.int64), part.classes, limit)
    return samples, np.frombuffer(lengths, dtype=np.int32)


def facts_of(lengths: np.ndarray, part: Part, labels: Sequence[str], limit: int) -> dict[str, Any]:
    """What a report says of a split; `lengths` as of `tokenized`."""
    return {
        "classes": part.counts(labels),
        "mean_tokens": int(lengths.sum(dtype=np.int64)) / len(lengths),
        "most_tokens": int(lengths.max()),
        "limit": limit,
        "cut": int((lengths > limit).sum()),
    }


def listed(words: Sequence[str]) -> str:
    more = f", ... ({len(words):,} in all)" if len(words) > MOST_LISTED else ""
    return ", ".join(words[:MOST_LISTED]) + more
