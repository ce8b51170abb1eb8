"""How training, validation and test texts are cut from the records of one source, and balanced."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_lightning.data.record_store.labelled import FORMAT, LabelledStore
from llm_lightning.data.splits import book_split, grouped_split, undersampled
from llm_lightning.data.text_keys import keys_with_digits
from llm_lightning.files.columns import Writer, key_of, made_once
from llm_lightning.terminal import counted

log = logging.getLogger(__name__)

Rows = dict[str, np.ndarray]
"""split -> the numbers of its records, in order, (n,) int64"""


@dataclass(frozen=True)
class LabelledSplit:
    """See `ClassificationDataModule`.

    Args:
        kind: `grouped` or `book`.
        fractions: of validation and test; a split with 0 is not cut off.
        balance: `undersample` or `none`.

    Raises:
        ValueError: if `kind` or `balance` is none of these.
    """

    kind: str
    fractions: tuple[float, float]
    seed: int
    balance: str

    def __post_init__(self) -> None:
        if self.kind not in ("grouped", "book"):
            raise ValueError(f"data.split={self.kind!r} must be grouped or book")
        if self.balance not in ("undersample", "none"):
            raise ValueError(f"data.balance={self.balance!r} must be undersample or none")

    def rows(self, records: LabelledStore, classes: np.ndarray, labels: Sequence[str], *, verify: bool = False) -> Rows:
        """The records of each split; computed once, then taken from the cache.

        Args:
            classes: (n,) the index in `labels` of each record's label.
            verify: compare what is in the cache with its digest.

        Raises:
            ValueError: if a split lacks a class.
        """
        how = [FORMAT, list(labels), self.kind, self.fractions, self.seed, self.balance]

        def write(writer: Writer) -> dict[str, Any]:
            parts, digits_count = self._computed(records, classes, labels)
            for split, part in parts.items():
                writer.column(split, np.int64).extend(np.asarray(part, np.int64).tobytes())
            return {"splits": list(parts), "digits_count": digits_count}

        folder = records.folder.with_name(f"{records.folder.name}-split-{key_of(how)}")
        columns = made_once(folder, write, verify=verify)
        if columns.facts["digits_count"]:
            log.warning(
                "Texts that differ only in their digits may appear in two splits here: kept together, they would leave "
                "a split without a class"
            )
        return {split: columns.mapped(split) for split in columns.facts["splits"]}

    def _computed(
        self, records: LabelledStore, classes: np.ndarray, labels: Sequence[str]
    ) -> tuple[Mapping[str, Any], bool]:
        """The splits, and whether digits count in them: where a split would otherwise lack a class."""
        if self.kind == "book":
            of_book = book_split(classes.tolist(), self.fractions, self.seed)
            _check(of_book, classes, labels)
            return of_book, False
        parts, digits_count = self._grouped(records.keys.normalized, classes), False
        if _first_missing(parts, classes, labels) is not None:
            with_digits = self._grouped(keys_with_digits(records.texts()), classes)
            digits_count = _first_missing(with_digits, classes, labels) is None
            parts = with_digits if digits_count else parts
        _check(parts, classes, labels)
        if self.balance == "undersample":
            parts = {split: undersampled(part, classes, self.seed) for split, part in parts.items()}
        return parts, digits_count

    def _grouped(self, keys: np.ndarray, classes: np.ndarray) -> Rows:
        parts = grouped_split(keys, classes, self.fractions, self.seed)
        is_cut = {"train": True, "val": self.fractions[0] > 0, "test": self.fractions[1] > 0}
        return {split: part for split, part in parts.items() if is_cut[split]}


def _check(parts: Mapping[str, Any], classes: np.ndarray, labels: Sequence[str]) -> None:
    found = _first_missing(parts, classes, labels)
    if found is not None:
        split, label = found
        raise ValueError(
            f"the {split} split has no text of class {label!r} ({counted(len(parts[split]), 'text')}); "
            "give more texts, or raise data.val_fraction and data.test_fraction"
        )


def _first_missing(parts: Mapping[str, Any], classes: np.ndarray, labels: Sequence[str]) -> tuple[str, str] | None:
    """The first split that lacks a class, and the class."""
    for split, part in parts.items():
        present = set(np.unique(classes[np.asarray(part, np.int64)]).tolist())
        missing = (label for index, label in enumerate(labels) if index not in present)
        if (label := next(missing, None)) is not None:
            return split, label
    return None
