"""What every tokenizer offers.

All of them keep four promises. A special token spelled out in a text is plain text: it never becomes a control id
and never raises; to mark the end of a text, insert `eot_id`. Encoding never raises: a surrogate code point, which
UTF-8 cannot express, counts as U+FFFD. Decoding returns the text (but `word` drops white space and unknown words, and
a model's own tokenizer may normalize accents or lack bytes).
`describe()` holds everything that `from_description` needs, so that a checkpoint carries its tokenizer.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(ABC):
    """The interface of every tokenizer.

    Attributes:
        vocab_size: number of ids, control ids included; ids are 0 to vocab_size - 1.
        eot_id: the id between documents, and at the end of an answer whose template writes no other; or None.
        bos_id: the id with which every text begins, or None; `encode` does not add it.
    """

    vocab_size: int
    eot_id: int | None
    bos_id: int | None = None

    @property
    def controls(self) -> Mapping[str, int]:
        """The id of every added token, special or not, by its spelling: what templates write and no text becomes."""
        return {} if self.eot_id is None else {END_OF_TEXT: self.eot_id}

    @property
    def control_flags(self) -> Mapping[str, frozenset[str]]:
        """Of the controls that have any: `lstrip`, `rstrip` (white space before or behind it belongs to it), and
        `single_word` (beside a letter it is plain text)."""
        return {}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Generation stops at each of these ids."""
        return () if self.eot_id is None else (self.eot_id,)

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Encode to (T,) ids of `dtype`; tiktoken's core does it without holding the GIL."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that this id adds to a text; they may be part of a character.

        Raises:
            ValueError: if the id is outside the vocabulary.
        """

    @abstractmethod
    def split_point(self, text: str) -> int:
        """Return the last index known to be a safe cut, or 0.

        Safe at i: whatever `more` follows, `text[:i]` and `text[i:] + more` encode to the ids that they have together,
        so a huge document can be read and encoded piece by piece.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain, JSON-able data from which `from_description` rebuilds this tokenizer."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: dict[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer that `describe()` described.

        Raises:
            ValueError: if the description is damaged.
            OSError: if the files of an encoding cannot be read or downloaded.
        """

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest unsigned type that holds every id of this vocabulary."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """Encode to a list of ids; special tokens in the text are plain text."""
        return self.encode_array(text).tolist()

    def encode_inside(self, text: str, *, after_control: bool) -> np.ndarray:
        """Encode what follows a control token, or other text: Llama 2's kind begins only some texts with a space."""
        return self.encode_array(text)

    def encode_document(self, text: str) -> np.ndarray:
        """Encode a text from its beginning on: (T,) ids of `dtype`, `bos_id` before them where there is one."""
        begin = np.array([] if self.bos_id is None else [self.bos_id], dtype=self.dtype)
        return np.concatenate([begin, self.encode_array(text)])

    def decode(self, ids: Iterable[int]) -> str:
        """Decode; bytes that are not UTF-8, such as half a character, become U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def ids_without_token(self, n_rows: int) -> list[int]:
        """Return the ids below `n_rows` without a token, which a model must never generate.

        Heads are often padded, such as GPT-2's 50,257 rows to nanoGPT's 50,304; and some encodings have gaps.
        """
        return list(range(self.vocab_size, n_rows))

    def fingerprint(self) -> str:
        """Return the sha256 of the description: equal for equal tokenizers."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_description, (self.describe(),)

    def _checked(self, token_id: int) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise ValueError(f"token id {token_id!r} is not an integer") from None
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"token id {index} is outside the vocabulary of {self.vocab_size} (0 to "
                f"{self.vocab_size - 1}); were the ids made with another tokenizer?"
            )
        return index


class StreamDecoder:
    """Decode ids one at a time, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Return the characters that this id completes, often one word, sometimes none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD for a character that never ended, else nothing."""
        return self._utf8.decode(b"", final=True)


def strings_of(description: dict[str, Any], key: str) -> list[str]:
    values = description.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"the description of tokenizer {description['name']} has no list of strings {key!r}")
    return values


def without_surrogates(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def last_start(pattern: re.Pattern[str], text: str) -> int:
    """Return where the last match starts, or 0; searches a growing tail, so that a long text costs no more."""
    size = 256
    while True:
        start = max(len(text) - size, 0)
        matches = [match.start() for match in pattern.finditer(text, start)]
        if matches or start == 0:
            return matches[-1] if matches else 0
        size *= 16
