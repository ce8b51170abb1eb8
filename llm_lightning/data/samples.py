"""Datasets for the loaders. Without Lightning: a loader process that is not forked imports this file at its start."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset

from llm_lightning.data.batches import Example, LabelledSample
from llm_lightning.files.columns import Columns, as_reference, from_reference

One = TypeVar("One")


class Rows(Dataset, Generic[One]):
    """Samples in a list."""

    def __init__(self, rows: list[One]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> One:
        return self.rows[index]


class Joined(Dataset):
    """Several data sets of examples, one after the other; their samples are numbered through."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        which = bisect_right(self.ends, index)
        start = self.ends[which - 1] if which else 0
        example: Example = self.parts[which][index - start]
        return example._replace(sample_id=index)


class LabelledTokens(Dataset):
    """Texts with a class each; their tokens are read when they are asked for.

    Args:
        columns: `ids`, the tokens of many texts end to end, and `ends`, where each text ends.
        rows: (n,) int64, the numbers of the texts in `columns`.
        labels: (n,) int, class indices.
        limit: number of tokens that a text is cut to.

    Attributes:
        whole: (n,) int64, number of tokens of each text before it is cut.
    """

    def __init__(self, columns: Columns, rows: np.ndarray, labels: np.ndarray, limit: int) -> None:
        self.columns, self.labels, self.limit = columns, labels, limit
        ends = columns.mapped("ends")
        self._ends = ends[rows]
        self.whole = self._ends - np.where(rows > 0, ends[rows - 1], 0)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: number of tokens of each text."""
        return np.minimum(self.whole, self.limit)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledSample:
        dtype = self.columns.dtype("ids")
        n, start = int(self.whole[index]), int(self._ends[index] - self.whole[index])
        data = self.columns.read("ids", start * dtype.itemsize, (start + min(n, self.limit)) * dtype.itemsize)
        return LabelledSample(index, np.frombuffer(data, dtype), int(self.labels[index]))


class Windows(Dataset):
    """Windows of `length` inputs over a flat array of tokens, one every `stride` tokens.

    Args:
        tokens: (n,) ids.
        length: inputs per window; a window has one token more, its last label.
        stride: distance between the starts of two windows; below `length` they overlap.
        last: `keep` adds a shorter window for the targets that no full window reaches; `drop` leaves them out, as the
            book does.
    """

    def __init__(self, tokens: np.ndarray, length: int, stride: int, *, last: str = "keep") -> None:
        if last not in ("keep", "drop"):
            raise ValueError(f"data.last_window={last!r} must be keep or drop")
        if stride < 1:
            raise ValueError(f"data.stride={stride} must be at least 1")
        self.tokens, self.length, self.stride = tokens, length, stride
        full = len(range(0, len(tokens) - length, stride))
        targets_reached = (full - 1) * stride + length if full else 0
        # A stride wider than a window may jump over the rest.
        has_rest = max(targets_reached, full * stride) < len(tokens) - 1
        self.n_windows = full + (last == "keep" and has_rest)

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> Example:
        start = index * self.stride
        return Example(index, np.asarray(self.tokens[start : start + self.length + 1]))

    def __getstate__(self) -> dict[str, Any]:
        """A memory map as its path: a loader process that is not forked would otherwise be sent all of its content."""
        return {**self.__dict__, "tokens": as_reference(self.tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokens = from_reference(self.tokens)
