"""Sixteen bytes instead of a text, to find equal ones: sets of millions of strings would not fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llm_lightning.data.splits import normalized

SIZE = 16
"""Bytes; two different texts among 2 million have the same key with a probability of 1 in 10 ** 26."""


def text_key(text: str) -> bytes:
    """Equal for equal texts alone (BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=SIZE).digest()


class TextKeys(NamedTuple):
    """Keys of the same texts, (n,) S16 each: equal for texts that are equal in one of three ways."""

    exact: np.ndarray
    """byte for byte"""
    trimmed: np.ndarray
    """but for white space at the ends"""
    normalized: np.ndarray
    """but for case, digits, white space and punctuation"""

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextKeys:
        exact, trimmed, folded = bytearray(), bytearray(), bytearray()
        for text in tqdm(texts, desc="comparing", unit=" texts", disable=None, delay=1):
            key, inner = text_key(text), text.strip()
            exact += key
            trimmed += key if inner == text else text_key(inner)
            folded += text_key(normalized(text))
        return cls(*(np.frombuffer(keys, dtype=f"S{SIZE}") for keys in (exact, trimmed, folded)))

    def of_rows(self, indices: np.ndarray) -> TextKeys:
        """The keys of some of the texts."""
        return TextKeys(*(keys[indices] for keys in self))


def keys_with_digits(texts: Iterable[str]) -> np.ndarray:
    """As `TextKeys.normalized`, but digits count."""
    keys = b"".join(text_key(normalized(text, fold_digits=False)) for text in texts)
    return np.frombuffer(keys, dtype=f"S{SIZE}")
