"""The split of a corpus into training and validation text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_lightning.data.corpus.readers import Document
from llm_lightning.data.corpus.sources import Source
from llm_lightning.terminal import counted

FEW_DOCUMENTS = 20  # split=auto cuts fewer than these by character: whole documents would miss val_fraction by far


@dataclass(frozen=True)
class Split:
    """The split of a source into training and validation text."""

    source: Source
    kind: str
    """document or character"""
    val_fraction: float

    @classmethod
    def of(cls, source: Source, kind: str, val_fraction: float) -> Split:
        """Check the setting against the data; `auto` becomes `document` from 20 documents on, else `character`.

        Raises:
            ValueError: an unknown kind, a fraction outside [0, 1), or a part that would be empty.
        """
        if kind not in ("auto", "document", "character"):
            raise ValueError(f"data.split={kind} is unknown; use auto, document or character")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must be at least 0 and less than 1")
        if kind == "auto":
            kind = "document" if source.survey().n_documents >= FEW_DOCUMENTS else "character"
        split = cls(source, kind, val_fraction)
        split._refuse_empty_parts()
        return split

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yield ("train" or "val", document) in the order of the source."""
        return self._by_character() if self.kind == "character" else self._by_document()

    def describe(self) -> dict[str, Any]:
        """Return what the parts depend on, as plain values."""
        return {"source": self.source.digest(), "split": self.kind, "val_fraction": self.val_fraction}

    def contents(self, part: str, *, partly: bool = False) -> np.ndarray:
        """The keys of the contents of the documents that are not empty and lie in a part: (n,) uint64.

        Args:
            partly: also of the one of which only a piece lies in it.
        """
        survey = self.source.survey()
        lengths = np.asarray(survey.lengths).astype(np.int64)
        if self.kind == "character":
            ends = lengths.cumsum()
            begins, border = ends - lengths, self._n_train_chars()
            if part == "train":
                inside = begins < border if partly else ends <= border
            else:
                inside = ends > border if partly else begins >= border
        else:
            held_out = np.isin(np.asarray(survey.keys), np.array(self._val_keys(), dtype=np.uint64))
            inside = held_out if part == "val" else ~held_out
        return np.asarray(survey.contents)[inside & (lengths > 0)]

    def _by_character(self) -> Iterator[tuple[str, Document]]:
        """Cut the concatenated text once, as the book does (chapter 5.1.3)."""
        left = self._n_train_chars()
        for document, length in zip(self.source.documents(), self.source.survey().lengths, strict=False):
            if left >= length:
                yield "train", document
            elif left <= 0:
                yield "val", document
            else:
                yield "train", Document(document.name, _Span(document.chunks, 0, left))
                yield "val", Document(document.name, _Span(document.chunks, left, length))
            left -= length

    def _by_document(self) -> Iterator[tuple[str, Document]]:
        keys, chosen = self.source.survey().keys, self._val_keys()
        for document, key in zip(self.source.documents(), keys, strict=False):
            at = bisect_left(chosen, key)
            yield "val" if at < len(chosen) and chosen[at] == key else "train", document

    def _n_train_chars(self) -> int:
        return int((1 - self.val_fraction) * self.source.survey().n_chars)

    def _val_keys(self) -> list[int]:
        """Return the sorted keys of the validation documents.

        Documents are taken in the order of their keys, which is random but a function of the content, as long as they
        fit into the fraction: it is met closely for documents of any size, and equal documents stay together.
        """
        survey = self.source.survey()
        keys, which = np.unique(np.asarray(survey.keys), return_inverse=True)
        sizes = np.bincount(which, weights=np.asarray(survey.lengths)).astype(np.int64)
        chosen, room = [], int(self.val_fraction * survey.n_chars)
        for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
            if 0 < size <= room:
                chosen.append(key)
                room -= size
        return chosen

    def _refuse_empty_parts(self) -> None:
        survey = self.source.survey()
        if self.kind == "character":
            n_train = self._n_train_chars()
            empty = not n_train or (self.val_fraction > 0 and n_train == survey.n_chars)
        else:
            empty = self.val_fraction > 0 and not self._val_keys()
        if empty:
            raise ValueError(
                f"data.split={self.kind} with data.val_fraction={self.val_fraction} leaves a part empty: "
                f"{self.source.label} has {counted(survey.n_documents, 'document')} with "
                f"{counted(survey.n_chars, 'character')}; "
                f"change data.val_fraction, {'use data.split=character, ' * (self.kind == 'document')}"
                "or set data.val_fraction=0 for no validation"
            )


@dataclass(frozen=True)
class _Span:
    """Characters [start, stop) of a document."""

    chunks: Iterable[str]
    start: int
    stop: int

    def __iter__(self) -> Iterator[str]:
        position = 0
        for chunk in self.chunks:
            if text := chunk[max(self.start - position, 0) : max(self.stop - position, 0)]:
                yield text
            position += len(chunk)
