"""Words as ids: the book's tokenizer (chapter 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from llm_lightning.tokenizers.base import (
    END_OF_TEXT,
    UNKNOWN,
    Tokenizer,
    last_start,
    strings_of,
    without_surrogates,
)


class WordTokenizer(Tokenizer):
    """Words and punctuation of a training text: the book's SimpleTokenizerV2 (chapter 2).

    White space is not kept, and a word that the training text lacks becomes `<|unk|>`. Unlike in the book, no text
    encodes to the two control ids: `<|endoftext|>` in a text is a word like others.
    """

    _PIECES = re.compile(r"""([,.:;?_!"()']|--|\s)""")
    _NO_SPACE_BEFORE = frozenset(""",.:;?!"()'""")
    _WHITE_SPACE = re.compile(r"\s")

    def __init__(self, words: Iterable[str]) -> None:
        self._words = list(words)
        self._vocabulary = [*self._words, END_OF_TEXT, UNKNOWN]
        self._ids = {word: i for i, word in enumerate(self._words)}  # the control ids are not in it
        self.vocab_size = len(self._vocabulary)
        self.eot_id = self.vocab_size - 2
        self.unknown_id = self.vocab_size - 1

    @classmethod
    def train(cls, texts: Iterable[str]) -> WordTokenizer:
        """Collect the sorted words of all texts."""
        words = sorted({word for text in texts for word in cls._split(text)})
        if not words:
            raise ValueError("tokenizer=word found no words in the training text; is the file empty?")
        return cls(words)

    @classmethod
    def _split(cls, text: str) -> list[str]:
        pieces = cls._PIECES.split(without_surrogates(text))
        return [word for piece in pieces if (word := piece.strip())]

    def encode_array(self, text: str) -> np.ndarray:
        ids = [self._ids.get(word, self.unknown_id) for word in self._split(text)]
        return np.array(ids, dtype=self.dtype)

    def token_bytes(self, token_id: int) -> bytes:
        word = self._vocabulary[self._checked(token_id)]
        return (word if word in self._NO_SPACE_BEFORE else " " + word).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids).removeprefix(" ")

    def split_point(self, text: str) -> int:
        return last_start(self._WHITE_SPACE, text)

    def describe(self) -> dict[str, Any]:
        return {"name": "word", "words": list(self._words)}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> WordTokenizer:
        return cls(strings_of(description, "words"))
