"""Texts in which the patterns of tokenizers meet every class of characters."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

from llm_lightning.tokenizers.base import END_OF_TEXT

CORPUS = "\n".join(topics.values())[:150_000]
CLASSES = [" ", "\t", "\n", "a", "s", "'", ".", "/", "1", "中", "。", "\u0301"]
"""One character for each way in which the patterns treat characters."""
FRAGMENTS = [
    *CLASSES, "\r\n", "\r", "\0", "  ", "\n\n ", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85", "\u200b", "\ufeff",
    "\ufffd", "the", " the", "Hello", "don't", "we'LL", "it's", "'re", "42", "3.14", "1234567", "x_y", "--", "...",
    "!?", "://", "naïve", "Größe", "слово", "日本語", "テキスト", "한국어", "، عربي", "ไทย", "हिन्दी", "ǅ", "Ⅷ", "²",
    "e\u0301", "😀", "👩\u200d👧", "🇩🇪", "\U0010ffff", END_OF_TEXT, "<|unk|>", "<|im_start|>", "<|", "|>", "Ġ",
]  # fmt: skip


def random_text(rng: random.Random, longest: int = 12) -> str:
    """Fragments that meet each other in unusual ways, and arbitrary code points among them."""
    parts = rng.choices(FRAGMENTS, k=rng.randrange(longest))
    return "".join(part if rng.random() < 0.9 else chr(rng.randrange(0xD800)) for part in parts)
