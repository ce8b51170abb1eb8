"""The likeness of a response and its reference by exact match, ROUGE-L and chrF.

These compare words and characters, and know nothing of meaning; they need no judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

CHRF_ORDER = 6
CHRF_BETA = 2  # recall counts twice as much as precision; both are the numbers of Popovic 2015 and of sacrebleu
_WORD = re.compile(r"[^\W_]+")


def exact_match(response: str, reference: str) -> bool:
    """Say whether two texts are the same but for case, white space and one full stop at the end."""
    return _normalised(response) == _normalised(reference)


def most_frequent_answer_score(references: Sequence[str]) -> tuple[str, float]:
    """Find the reference that is given most often, and the exact match (0 to 1) of always saying it.

    What a model has to beat: of equally frequent ones, the first.

    Raises:
        ValueError: if there is none.
    """
    if not references:
        raise ValueError("no references, so none is the most frequent; give at least one")
    (answer, count), *_ = Counter(map(_normalised, references)).most_common(1)
    return next(one for one in references if _normalised(one) == answer), count / len(references)


def rouge_l(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Compute ROUGE-L of each record: F1 (0 to 1) of the longest common subsequence of words (Lin 2004).

    Words are runs of letters and digits in lower case, not stemmed, as in Google's rouge_score and torchmetrics; those
    know only a to z, here letters of every script are letters. Where a script has no spaces, chrF says more.
    """
    return [_rouge_l(_words(one), _words(other)) for one, other in zip(responses, references, strict=True)]


def chrf(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Compute chrF2 of each record (0 to 1): F2 of character 1- to 6-grams, white space left out (Popovic 2015).

    As sacrebleu computes it: only orders that both texts are long enough for count. torchmetrics counts all six, by
    which "yes" for "yes" gets 0.5 instead of 1.
    """
    return [_chrf(one, other) for one, other in zip(responses, references, strict=True)]


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _rouge_l(response: Sequence[str], reference: Sequence[str]) -> float:
    common = LCSseq.similarity(response, reference)
    return 2 * common / (len(response) + len(reference)) if common else 0.0


def _chrf(response: str, reference: str) -> float:
    said, wanted = "".join(response.split()), "".join(reference.split())
    orders = range(1, min(CHRF_ORDER, len(said), len(wanted)) + 1)
    if not orders:
        return 0.0
    matches = [(_ngrams(said, n) & _ngrams(wanted, n)).total() for n in orders]
    # First the means over the orders, then one F of them: F of each order averaged would be another measure.
    precision = sum(match / (len(said) - n + 1) for n, match in zip(orders, matches, strict=True)) / len(orders)
    recall = sum(match / (len(wanted) - n + 1) for n, match in zip(orders, matches, strict=True)) / len(orders)
    weight = CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall) if matches[0] else 0.0


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))
