"""Sixteen bytes instead of a text, to find equal ones: sets of millions of strings would not fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llm_lightning.data.splits import normalized

SIZE = 16
"""Bytes; two of 2 million different texts have the same key once in 10^26 times."""


class TextKeys(NamedTuple):
    """Keys of some texts, (n, 16) uint8 each: equal for texts that are equal in one of three ways."""

    exact: np.ndarray
    """byte for byte"""
    trimmed: np.ndarray
    """but for white space at the ends"""
    normalized: np.ndarray
    """but for case, digits, white space and punctuation"""

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextKeys:
        ways = zip(*map(keys_of, texts), strict=True)
        return cls(*(as_array(b"".join(keys)) for keys in ways))

    def of_rows(self, rows: np.ndarray) -> TextKeys:
        """The keys of some of the texts."""
        return TextKeys(*(keys[rows] for keys in self))


def keys_of(text: str) -> tuple[bytes, bytes, bytes]:
    """The three keys of a text."""
    key, inner = _key(text), text.strip()
    return key, key if inner == text else _key(inner), _key(normalized(text))


def keys_with_digits(texts: Iterable[str]) -> np.ndarray:
    """As `TextKeys.normalized`, but digits count."""
    return as_array(b"".join(_key(normalized(text, fold_digits=False)) for text in texts))


def as_array(keys: bytes) -> np.ndarray:
    """Keys end to end as (n, 16) uint8."""
    return np.frombuffer(keys, np.uint8).reshape(-1, SIZE)


def as_scalars(keys: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 as (n,) values that can be sorted and compared."""
    return np.ascontiguousarray(keys).view(f"S{SIZE}")[:, 0]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=SIZE).digest()
