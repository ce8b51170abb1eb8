"""Bytes as ids: no training, no files, no unknown text."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer, without_surrogates


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of the text, and 256 for the end of text."""

    vocab_size = 257
    eot_id = 256

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(without_surrogates(text).encode(), dtype=np.uint8).astype(self.dtype)

    def token_bytes(self, token_id: int) -> bytes:
        index = self._checked(token_id)
        return END_OF_TEXT.encode() if index == self.eot_id else bytes([index])

    def split_point(self, text: str) -> int:
        return len(text)

    def describe(self) -> dict[str, Any]:
        return {"name": "byte"}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ByteTokenizer:
        return cls()
