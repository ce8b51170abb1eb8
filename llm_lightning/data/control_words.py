"""Control tokens that data spell out, such as `<|endoftext|>`: they are read as text, counted, and warned of.

Files that were written for another program have them between documents or at the end of answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from llm_lightning.tokenizers.base import END_OF_TEXT

WORDS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>")
_LONGEST = max(map(len, WORDS)) - 1


class WordCount:
    """Counts control words in a text that comes in chunks."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._tail = ""

    def add(self, chunk: str) -> None:
        """Count the words that end in `chunk`."""
        text = self._tail + chunk
        for word in WORDS:
            if n := text.count(word) - self._tail.count(word):
                self.found[word] += n
        self._tail = text[-_LONGEST:]

    def end(self) -> None:
        """Begin another text."""
        self._tail = ""


def documents_between(chunks: Iterable[str], word: str) -> Iterator[str]:
    """The texts between the occurrences of `word`, without empty ones."""
    parts: list[str] = []
    tail = ""  # may be the beginning of the word
    for chunk in chunks:
        *whole, last = (tail + chunk).split(word)
        for piece in whole:
            parts.append(piece)
            yield from filter(str.strip, ["".join(parts)])
            parts = []
        cut = max(0, len(last) - len(word) + 1)
        parts.append(last[:cut])
        tail = last[cut:]
    yield from filter(str.strip, ["".join([*parts, tail])])


def without_end(answer: str) -> str:
    """An answer without control words, and white space before them, at its end."""
    while (stripped := answer.rstrip()).endswith(WORDS):
        answer = next(stripped.removesuffix(word) for word in WORDS if stripped.endswith(word)).rstrip()
    return answer


def described(found: Counter[str]) -> str:
    """`<|endoftext|> 59 times`"""
    return ", ".join(f"{word} {n:,} time{'s'[: n > 1]}" for word, n in found.most_common())
