"""Records of several stores as one sequence, and a part of them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from llm_lightning.data.record_store.records import FORMAT, RecordStore
from llm_lightning.data.record_store.tokens import Pieces, TokenStore
from llm_lightning.data.splits import numbered
from llm_lightning.data.templates.conversation import Conversation, from_stored
from llm_lightning.files.atomic import cache_dir, write_atomically
from llm_lightning.files.columns import key_of, sealed, unsealed

CHUNK = 1 << 16


class Pool(Sequence[Conversation]):
    """The records of some stores, end to end.

    Attributes:
        prompts, groups: see `RecordStore`.
        has_equal_answers: (n,) bool.
        starts: (stores + 1,) where each store begins, and the end.
    """

    def __init__(self, stores: Sequence[RecordStore]) -> None:
        self.stores = list(stores)
        self.starts = np.cumsum([0, *map(len, stores)])
        self._starts: list[int] = self.starts.tolist()
        self.prompts, self.groups, self.has_equal_answers = (
            _joined([getattr(one, name) for one in stores]) for name in ("prompts", "groups", "has_equal_answers")
        )

    @property
    def key(self) -> list[str]:
        """Names what is in it."""
        return [store.folder.name for store in self.stores]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        return from_stored(self.line(int(index)))

    def line(self, index: int) -> bytes:
        """A record as it is stored."""
        store = bisect_right(self._starts, index) - 1
        return self.stores[store].line(index - self._starts[store])

    def store_of(self, index: Any) -> Any:
        """The number of the store that holds a record; or of several, (n,)."""
        return np.searchsorted(self.starts, index, side="right") - 1


class TokenPool:
    """The tokens of some stores, end to end."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores = list(stores)
        self._starts: list[int] = np.cumsum([0, *map(len, stores)]).tolist()

    @property
    def key(self) -> list[str]:
        """Names what is in it."""
        return [store.key for store in self.stores]

    def pieces(self, index: int) -> Pieces:
        """Read one record."""
        store = bisect_right(self._starts, index) - 1
        return self.stores[store].pieces(index - self._starts[store])

    def longest(self, rows: np.ndarray) -> np.ndarray:
        """The tokens of the longest sequence of some records."""
        return _joined([store.longest for store in self.stores])[rows]


class Part(Sequence[Conversation]):
    """Some records of a pool, such as a split.

    Args:
        rows: (n,) int64, their numbers in the pool.
    """

    def __init__(self, pool: Pool, rows: np.ndarray) -> None:
        self.pool, self.rows = pool, rows

    @property
    def key(self) -> list[Any]:
        """Plain values that name what is in it."""
        return [self.pool.key, hashlib.sha256(np.ascontiguousarray(self.rows).tobytes()).hexdigest()]

    @property
    def prompts(self) -> np.ndarray:
        """(n, 16) uint8, see `RecordStore`."""
        return self.pool.prompts[self.rows]

    def with_different_answers(self) -> Part:
        """Without pairs of equal answers, from which nothing can be learnt."""
        are_equal = self.pool.has_equal_answers[self.rows]
        return Part(self.pool, self.rows[~are_equal]) if are_equal.any() else self

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Part(self.pool, self.rows[index])
        return self.pool[self.rows[index]]

    def __iter__(self) -> Iterator[Conversation]:
        return map(from_stored, self.lines())

    def lines(self) -> Iterator[bytes]:
        """The records as they are stored."""
        return map(self.pool.line, integers(self.rows))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def leaks(parts: dict[str, Part], split: str) -> dict[str, int]:
    """Number of prompts of a split that are also in training."""
    n_train = len(parts["train"])
    numbers = numbered(np.concatenate([parts["train"].prompts, parts[split].prompts]))
    return {"prompts": int(np.isin(numbers[n_train:], numbers[:n_train]).sum()), "of": len(parts[split])}


def integers(rows: np.ndarray) -> Iterator[int]:
    """The numbers of an array, of which few are objects at a time."""
    for start in range(0, len(rows), CHUNK):
        yield from rows[start : start + CHUNK].tolist()


def remembered(name: str, spec: Any, compute: Callable[[], Any], *, verify: bool = False) -> Any:
    """Plain values that follow from `spec`: computed once, then taken from the cache."""
    file = cache_dir() / "records" / f"{name}-{key_of([FORMAT, spec])}.json"
    if not verify and (known := unsealed(file)) is not None:
        return known
    value = compute()
    with suppress(OSError):  # a cache that cannot be written: it is computed again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, sealed(value))
    return value


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
