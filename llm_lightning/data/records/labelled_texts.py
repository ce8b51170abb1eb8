"""Labelled texts in flat buffers: millions of short strings would take many times the memory of their bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np


class LabelledText(NamedTuple):
    """One record."""

    text: str
    label: str
    place: str
    """file:line"""


class LabelledTexts(Sequence[LabelledText]):
    """Records in their order; each is made when it is asked for."""

    def __init__(self, records: Iterable[LabelledText] = ()) -> None:
        self.labels: list[str] = []
        """The different labels, in the order in which they first occur."""
        self._texts, self._ends = bytearray(), array("q", [0])
        self._codes, self._code_of = array("i"), dict[str, int]()
        self._numbers, self._files, self._file_of = array("q"), array("i"), dict[str, int]()
        for record in records:
            self.append(*record)

    def append(self, text: str, label: str, place: str) -> None:
        """Add a record; its place ends with a number."""
        self._texts += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._texts))
        if label not in self._code_of:
            self._code_of[label] = len(self.labels)
            self.labels.append(label)
        self._codes.append(self._code_of[label])
        file = place.rstrip("0123456789")
        self._files.append(self._file_of.setdefault(file, len(self._file_of)))
        self._numbers.append(int(place[len(file) :]))

    @property
    def codes(self) -> np.ndarray:
        """(n,) int32: the index in `labels` of each record's label."""
        return np.frombuffer(self._codes, dtype=np.int32)

    def counts(self) -> dict[str, int]:
        """label -> its number of records."""
        return dict(zip(self.labels, np.bincount(self.codes, minlength=len(self.labels)).tolist(), strict=True))

    def rename(self, new: dict[str, str]) -> None:
        """Give labels other names; those that get the same name become one."""
        names = [new.get(label, label) for label in self.labels]
        self.labels = list(dict.fromkeys(names))
        self._code_of = {label: code for code, label in enumerate(self.labels)}
        codes = np.array([self._code_of[name] for name in names], dtype=np.int32)[self.codes]
        self._codes = array("i", codes.tobytes())

    def text(self, index: int) -> str:
        return self._texts[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def first_place(self, label: str) -> str:
        """The place of the first record with a label."""
        return self[int(np.argmax(self.codes == self._code_of[label]))].place

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, index: int) -> LabelledText: ...
    @overload
    def __getitem__(self, index: slice) -> list[LabelledText]: ...
    def __getitem__(self, index: int | slice) -> LabelledText | list[LabelledText]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        at = range(len(self))[index]
        place = f"{list(self._file_of)[self._files[at]]}{self._numbers[at]}"
        return LabelledText(self.text(at), self.labels[self._codes[at]], place)

    def __iter__(self) -> Iterator[LabelledText]:
        files = list(self._file_of)
        for at, (code, file, number) in enumerate(zip(self._codes, self._files, self._numbers, strict=True)):
            yield LabelledText(self.text(at), self.labels[code], f"{files[file]}{number}")
