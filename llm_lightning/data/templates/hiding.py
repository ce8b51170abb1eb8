"""Keeps control tokens that are spelled out in messages apart from those that a template writes.

A template is a program, so its output does not say which characters come from the messages. Before it runs, the first
character of every control token in a message is replaced by a private one: whatever control token is found in the
output, the template wrote. Lengths do not change, and the private characters are replaced back afterwards.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

_PRIVATE = range(0xE000, 0xF900)
"""Code points without a meaning (Unicode's private use area)."""


class Controls:
    """The control tokens of a tokenizer, found in a text as tokenizers do: the leftmost, and of those the longest.

    Args:
        ids: spelling -> id.
        flags: spelling -> `Tokenizer.control_flags`.
    """

    def __init__(self, ids: Mapping[str, int], flags: Mapping[str, Collection[str]]) -> None:
        self.ids = {text: index for text, index in ids.items() if text}
        self._pattern = _any_of(self.ids)
        written = [_written(text, flags.get(text, ())) for text in _longest_first(self.ids)]
        self._written = re.compile("|".join(written) or "(?!)")
        # A message may also complete what the template begins, begin what it completes, or be a part in between.
        self._beginnings = {text[:n] for text in self.ids for n in range(1, len(text))}
        self._endings = {text[-n:] for text in self.ids for n in range(1, len(text))}
        self._longest = max(map(len, self.ids), default=0)

    def split(self, text: str, stops: Sequence[int]) -> Iterator[list[tuple[str, int | None]]]:
        """Yield the pieces of each part of a text, up to the first stop, from there to the second, and so on.

        A piece is a control token with its id, or what is between two. White space that belongs to a control token is
        left out, whichever part it is in.
        """
        pieces = deque(self._pieces(text))
        for stop in stops:
            part = []
            while pieces and pieces[0][0] < stop:
                start, end, index = pieces.popleft()
                if index is None and end > stop:
                    pieces.appendleft((stop, end, None))
                    end = stop
                part.append((text[start:end], index))
            yield part

    def _pieces(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, id) in order; the id is None between control tokens."""
        position = 0
        for match in self._written.finditer(text):
            start, end = match.span(match.lastindex or 0)
            if match.start() > position:
                yield position, match.start(), None
            yield start, end, self.ids[text[start:end]]
            position = match.end()
        if position < len(text):
            yield position, len(text), None

    def whole_in(self, text: str, kept: Collection[str] = ()) -> set[int]:
        """Return the positions where control tokens begin in a text, except the `kept` ones."""
        pattern = _any_of(self.ids.keys() - set(kept)) if kept else self._pattern
        found = set()
        start = 0
        while match := pattern.search(text, start):
            found.add(match.start())
            start = match.start() + 1  # the next one may begin inside
        return found

    def spelled_in(self, text: str, kept: Collection[str] = ()) -> set[int]:
        """Return the positions of a message whose characters must be hidden, so that no control token is found.

        Args:
            kept: control tokens that stay as they are.
        """
        found = self.whole_in(text, kept)
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
    return re.compile("|".join(map(re.escape, _longest_first(texts))) or "(?!)")


def _longest_first(texts: Collection[str]) -> list[str]:
    return sorted(texts, key=len, reverse=True)


def _written(text: str, flags: Collection[str]) -> str:
    """The expression of a control token with what belongs to it; the token itself is its group."""
    edge = (r"(?<!\w)", r"(?!\w)") if "single_word" in flags else ("", "")
    left, right = (r"\s*" if flag in flags else "" for flag in ("lstrip", "rstrip"))
    return f"{left}{edge[0]}({re.escape(text)}){edge[1]}{right}"
