"""Similarity of a response to its reference, both without thinking: exact match, ROUGE-L and chrF.

They compare words and characters, not meaning, and need no judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

THINKING_BEGINS, THINKING_ENDS = "<think>", "</think>"
CHRF_ORDER = 6
CHRF_BETA = 2  # recall counts twice as much as precision; order and beta as in Popovic 2015 and sacrebleu
_WORD = re.compile(r"[^\W_]+")


def exact_match(response: str, reference: str) -> bool:
    """Whether two texts are equal, ignoring thinking, case, white space and one final full stop."""
    return _normalised(without_thinking(response)) == _normalised(answer_of(reference))


def without_thinking(response: str) -> str:
    """Return what follows `<think>...</think>`; of thinking that never ended, nothing.

    Some templates write the first of the two themselves, so that a response has only the other.
    """
    if THINKING_ENDS in response:
        return response.rpartition(THINKING_ENDS)[2].lstrip()
    return "" if response.lstrip().startswith(THINKING_BEGINS) else response


def answer_of(reference: str) -> str:
    """Return what follows the thinking in a reference, which data for models that think has."""
    return without_thinking(reference) if THINKING_ENDS in reference else reference


def most_frequent_answer_score(references: Sequence[str]) -> tuple[str, float]:
    """The most frequent reference, and the exact match (0 to 1) of always giving it: a baseline for a model.

    Of equally frequent references, the first.

    Raises:
        ValueError: if there are no references.
    """
    if not references:
        raise ValueError("no references, so none is the most frequent; give at least one")
    answers = [*map(answer_of, references)]
    (answer, count), *_ = Counter(map(_normalised, answers)).most_common(1)
    return next(one for one in answers if _normalised(one) == answer), count / len(answers)


def rouge_l(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L of each record: F1 (0 to 1) of the longest common subsequence of words (Lin 2004).

    Words are runs of letters and digits in lower case, not stemmed, as in Google's rouge_score and torchmetrics, but
    with letters of every script, not only a to z. For scripts without spaces, chrF is more informative.
    """
    pairs = zip(map(without_thinking, responses), map(answer_of, references), strict=True)
    return [_rouge_l(_words(one), _words(other)) for one, other in pairs]


def chrf(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF2 of each record (0 to 1): F2 of character 1- to 6-grams without white space (Popovic 2015).

    As in sacrebleu, only orders count for which both texts are long enough. torchmetrics counts all six and so gives
    0.5 instead of 1 for "yes" and "yes".
    """
    pairs = zip(map(without_thinking, responses), map(answer_of, references), strict=True)
    return [_chrf(one, other) for one, other in pairs]


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _rouge_l(response: Sequence[str], reference: Sequence[str]) -> float:
    common = LCSseq.similarity(response, reference)
    return 2 * common / (len(response) + len(reference)) if common else 0.0


def _chrf(response: str, reference: str) -> float:
    produced, wanted = "".join(response.split()), "".join(reference.split())
    orders = range(1, min(CHRF_ORDER, len(produced), len(wanted)) + 1)
    if not orders:
        return 0.0
    matches = [(_ngrams(produced, n) & _ngrams(wanted, n)).total() for n in orders]
    # F of the means over the orders; the mean of F over the orders would be another measure.
    precision = sum(match / (len(produced) - n + 1) for n, match in zip(orders, matches, strict=True)) / len(orders)
    recall = sum(match / (len(wanted) - n + 1) for n, match in zip(orders, matches, strict=True)) / len(orders)
    weight = CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall) if matches[0] else 0.0


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))
