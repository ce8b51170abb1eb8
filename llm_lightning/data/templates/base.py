"""What every prompt template offers: how a conversation becomes tokens, each marked as prompt or answer.

A template makes segments, the pieces of a rendered conversation; here they become token ids. It is shared by
instruction tuning, preference tuning and generation, and it travels in the header of a checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import numpy as np

from llm_lightning.data.templates.conversation import Conversation, Segment
from llm_lightning.tokenizers.base import Tokenizer

Piece = tuple[np.ndarray, str]
"""Token ids, and the kind of their segment."""


class Template(ABC):
    """How a conversation becomes segments; the rest follows from them.

    Attributes:
        name: for messages.
    """

    name: str

    @abstractmethod
    def segments(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        """Return the whole conversation; every answer has its end.

        Raises:
            ValueError: naming the record, if the template cannot render it.
        """

    @abstractmethod
    def prompt(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        """Return everything before the last answer, as in `segments`."""

    @abstractmethod
    def text_of(self, conversation: Conversation) -> str:
        """Return the whole conversation as text, without end-of-text tokens."""

    @abstractmethod
    def question(self, conversation: Conversation) -> str:
        """Return the last question as text, without the header of its answer: the book shows this to a judge."""

    @abstractmethod
    def check(self, records: Sequence[Conversation]) -> None:
        """Raise ValueError, naming the record, if the template has no place for a part of it."""

    @abstractmethod
    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if the tokenizer lacks a token that the template needs."""

    @abstractmethod
    def end_id(self, tokenizer: Tokenizer) -> int | None:
        """Return the last id of an answer, at which generation stops; None: there is none."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain data from which `choose.from_description` rebuilds this template."""

    @abstractmethod
    def digest_values(self) -> list[Any]:
        """Return the plain values that decide on the tokens, for a digest of the data."""

    def tokens(self, tokenizer: Tokenizer, segments: Sequence[Segment]) -> Iterator[Piece]:
        """Yield the token ids of a conversation from its beginning, neighbours of one kind together.

        The id with which the tokenizer begins a text comes first, exactly once, whether or not the template writes it.
        An answer is encoded by itself, so that the tokens before it are the same in training and generation. The header
        is encoded together with the question: a token that spans both counts as question.
        """
        bos, pieces = tokenizer.bos_id, _pieces(tokenizer, segments)
        if bos is not None and not (segments and segments[0].ids[:1] == (bos,)):
            pieces = chain([(np.array([bos]), "prompt")], pieces)
        for kind, run in groupby(pieces, key=lambda piece: piece[1]):
            yield np.concatenate([ids for ids, _ in run]), kind

    def prompt_ids(self, tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
        """Return the token ids of everything before the last answer, exactly as in training."""
        pieces = self.tokens(tokenizer, self.prompt(conversation, tokenizer))
        return [token for ids, _ in pieces for token in ids.tolist()]

    def answer_ids(self, tokenizer: Tokenizer, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of the last answer and of its end, as they follow the prompt."""
        turns = (*conversation.turns[:-1], conversation.turns[-1]._replace(is_trained=True))
        segments = self.segments(conversation._replace(turns=turns), tokenizer)
        last = max(index for index, segment in enumerate(segments) if segment.kind in ("prompt", "header"))
        of_kind: dict[str, list[np.ndarray]] = {"response": [np.zeros(0, np.int64)], "end": []}
        for ids, kind in _pieces(tokenizer, segments[last + 1 :], segments[last]):
            of_kind[kind].append(ids)
        return np.concatenate(of_kind["response"]), np.concatenate(of_kind["end"])

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids at which generation stops: the end of an answer, and those of the tokenizer."""
        end = self.end_id(tokenizer)
        return tuple(dict.fromkeys([*([] if end is None else [end]), *tokenizer.stop_ids]))


def _pieces(tokenizer: Tokenizer, segments: Sequence[Segment], before: Segment | None = None) -> Iterator[Piece]:
    """Token ids and kind of each segment; text of the prompt is joined up to the next control token or answer.

    Args:
        before: the segment before them; None: they begin the text.
    """

    def encoded(text: str) -> np.ndarray:
        if before is None:
            return tokenizer.encode_array(text)
        return tokenizer.encode_inside(text, after_control=bool(before.ids))

    question = ""
    for segment in segments:
        text, kind = segment.text, segment.kind
        if kind == "prompt" and not segment.ids:
            question += text
            continue
        if kind == "header" and not segment.ids:
            ids = encoded(question + text)
            tail = _encoded_header(tokenizer, text)
            # White space at the end of a question that stands alone may be encoded in another way.
            is_apart = not question[-1:].isspace() and _ends_with(ids, tail)
            n = len(ids) - len(tail) if is_apart else len(encoded(question))
            yield from ((ids[:n], "prompt"),) if n else ()
            yield ids[n:], "header"
        else:
            if question:
                yield encoded(question), "prompt"
                before = Segment(question, "prompt")
            yield np.array(segment.ids) if segment.ids else encoded(text), kind
        if text or segment.ids:
            before = segment
        question = ""
    if question:
        yield encoded(question), "prompt"


def _ends_with(ids: np.ndarray, tail: np.ndarray) -> bool:
    return len(tail) < len(ids) and np.array_equal(ids[len(ids) - len(tail) :], tail)


@lru_cache(maxsize=64)
def _encoded_header(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A header alone. Where the ids of question and header end with it, no token spans both."""
    return tokenizer.encode_inside(text, after_control=False)
