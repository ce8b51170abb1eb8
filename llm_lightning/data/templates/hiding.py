"""Keeps control tokens that are spelled out in messages apart from those that a template writes.

A template is a program, so its output does not say which characters come from the messages. Before it runs, the first
character of every control token in a message is replaced by a private one: whatever control token is found in the
output, the template wrote. Lengths do not change, and the private characters are replaced back afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

_PRIVATE = range(0xE000, 0xF900)
"""Code points without a meaning (Unicode's private use area)."""


class Controls:
    """The control tokens of a tokenizer, found in a text as tokenizers do: the leftmost, and of those the longest.

    Args:
        ids: spelling -> id.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: index for text, index in ids.items() if text}
        self._pattern = _any_of(self.ids)
        # A message may also complete what the template begins, begin what it completes, or be a part in between.
        self._beginnings = {text[:n] for text in self.ids for n in range(1, len(text))}
        self._endings = {text[-n:] for text in self.ids for n in range(1, len(text))}
        self._longest = max(map(len, self.ids), default=0)

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the pieces of a text in order: control tokens with their ids, and what is between them."""
        position = 0
        for match in self._pattern.finditer(text):
            if match.start() > position:
                yield text[position : match.start()], None
            yield match[0], self.ids[match[0]]
            position = match.end()
        if position < len(text):
            yield text[position:], None

    def spelled_in(self, text: str, kept: Collection[str] = ()) -> set[int]:
        """Return the positions of a message whose characters must be hidden, so that no control token is found.

        Args:
            kept: control tokens that stay as they are.
        """
        pattern = _any_of(self.ids.keys() - set(kept)) if kept else self._pattern
        found = set()
        start = 0
        while match := pattern.search(text, start):
            found.add(match.start())
            start = match.start() + 1  # the next one may begin inside
        if text.strip() and any(text in control for control in self.ids):
            found.add(0)
        for n in range(1, min(self._longest, len(text) + 1)):
            if text[-n:] in self._beginnings:
                found.add(len(text) - n)
            if text[:n] in self._endings:
                found.add(n - 1)
        return found


class Hiding:
    """Private characters for one conversation, chosen among those that its texts do not contain."""

    def __init__(self, texts: Collection[str]) -> None:
        used = {character for text in texts for character in text}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._hidden: dict[str, str] = {}

    def hide(self, text: str, positions: Collection[int]) -> str:
        """Replace the characters at these positions by private ones."""
        characters = list(text)
        for position in positions:
            character = characters[position]
            if character not in self._hidden:
                self._hidden[character] = next(self._free)
            characters[position] = self._hidden[character]
        return "".join(characters)

    def reveal(self, text: str) -> str:
        """Undo `hide`."""
        for character, private in self._hidden.items():
            text = text.replace(private, character)
        return text


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
