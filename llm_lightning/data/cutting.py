"""Cut a conversation that exceeds the context: whole messages first, then sentences, the system message last.

    earlier turns, the oldest first -> the input, from its beginning -> the question, up to its last sentence -> the
    system message -> what is left of the question

The last answer is never cut here. Within a text the cut is before a sentence; before a word where no sentence fits;
before a character where no word does. What remains is a conversation that a template renders like any other: results
of tools stay with the question whose answer called them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llm_lightning.data.templates.conversation import Conversation

_CLOSING = "[\"'\u201d\u2019)\\]\u300d\u300f\uff09]*"
_SENTENCE = re.compile(rf"(?<=[.!?]){_CLOSING}\s+|(?<=[\u3002\uff01\uff1f])(?![\u3002\uff01\uff1f]){_CLOSING}\s*|\n+")
_WORD = re.compile(r"\s+")

Fits = Callable[[Conversation], bool]


def shortened(record: Conversation, fits: Fits) -> Conversation | None:
    """The longest remainder of a conversation that fits; None if not even its last answer does."""
    turns = record.turns
    begins = [number for number, turn in enumerate(turns) if number == 0 or not turn.before]
    kept = _first(begins[1:], lambda n: fits(record._replace(turns=turns[n:])))
    if kept is not None:
        return record._replace(turns=turns[kept:])
    record = record._replace(turns=turns[begins[-1] :])
    return (
        _cut(record, _with_input, record.turns[0].input, fits, may_be_empty=True)
        or _cut(_with_input(record, ""), _with_instruction, record.turns[0].instruction, fits)
        or _without_system(_with_input(record, ""), fits)
    )


def _without_system(record: Conversation, fits: Fits) -> Conversation | None:
    instruction = record.turns[0].instruction
    last = _with_instruction(record, instruction[_starts(_SENTENCE, instruction)[-1] :])
    return _cut(last, _with_system, record.system or "", fits, may_be_empty=True) or _cut(
        last._replace(system=None), _with_instruction, last.turns[0].instruction, fits, ways=("word", "character")
    )


def _cut(
    record: Conversation,
    put: Callable[[Conversation, str], Conversation],
    text: str,
    fits: Fits,
    *,
    may_be_empty: bool = False,
    ways: Sequence[str] = ("sentence",),
) -> Conversation | None:
    """The record with the longest end of a text that fits, at least its last sentence; None if none does."""
    if may_be_empty and not text:
        return None
    if may_be_empty:
        ways = ("sentence", "word", "character")
    for way in ways:
        starts = range(1, len(text)) if way == "character" else _starts(_SENTENCE if way == "sentence" else _WORD, text)
        start = _first(starts, lambda at: fits(put(record, text[at:])))
        if start is not None:
            return put(record, text[start:])
    return put(record, "") if may_be_empty and fits(put(record, "")) else None


def _starts(border: re.Pattern[str], text: str) -> list[int]:
    """Where sentences or words begin; the first at 0."""
    return [0, *(found.end() for found in border.finditer(text) if found.end() < len(text))]


def _first(numbers: Sequence[int], is_enough: Callable[[int], bool]) -> int | None:
    """The first of ascending numbers that is enough, as all that follow are."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(numbers[middle]) else (middle + 1, high)
    return numbers[low] if low < len(numbers) else None


def _with_input(record: Conversation, text: str) -> Conversation:
    return record._replace(turns=(record.turns[0]._replace(input=text), *record.turns[1:]))


def _with_instruction(record: Conversation, text: str) -> Conversation:
    return record._replace(turns=(record.turns[0]._replace(instruction=text), *record.turns[1:]))


def _with_system(record: Conversation, text: str) -> Conversation:
    return record._replace(system=text or None)
