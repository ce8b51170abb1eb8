"""Metrics of single answers: by hand, against torchmetrics where it is right, and sacrebleu's and scipy's numbers."""

from __future__ import annotations

import random

import pytest
from sacrebleu.metrics import CHRF
from torchmetrics.functional.text import rouge_score

from llm_lightning.metrics.answers import chrf, exact_match, most_frequent_answer_score, rouge_l

WORDS = ["the", "a", "cat", "sat", "on", "mat", "42", "Yes", "no,", "capital", "of", "France.", "-", "it's"]


@pytest.mark.parametrize(
    ("response", "reference", "same"),
    [
        ("Paris", "paris", True),
        ("  Paris \n", "Paris.", True),
        ("New\n York", "New  York", True),
        ("STRASSE", "straße", True),
        ("Paris .", "Paris", True),
        ("Paris..", "Paris", False),
        ("Paris!", "Paris", False),
        ("3.14", "314", False),
        ("The capital is Paris.", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_exact_match(response: str, reference: str, same: bool) -> None:
    assert exact_match(response, reference) is same
    assert exact_match(reference, response) is same


THOUGHT = "<think>\nFrance, so London? No.\n</think>\n\nParis"


@pytest.mark.parametrize("response", [THOUGHT, "Paris", "so Paris.</think>Paris"])
@pytest.mark.parametrize("reference", [THOUGHT, "Paris"])
def test_thinking_counts_neither_in_a_response_nor_in_a_reference(response: str, reference: str) -> None:
    assert exact_match(response, reference)
    assert rouge_l([response], [reference]) == chrf([response], [reference]) == [1]
    assert not exact_match("<think>Paris", reference), "it never ended"
    assert most_frequent_answer_score([reference, "Rome", "paris"]) == ("Paris", pytest.approx(2 / 3))


def test_the_most_frequent_answer() -> None:
    assert most_frequent_answer_score(["No.", "Yes.", "maybe", "yes", " YES "]) == ("Yes.", 0.6)
    assert most_frequent_answer_score(["b", "a"]) == ("b", 0.5)
    with pytest.raises(ValueError, match="no references"):
        most_frequent_answer_score([])


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("the cat sat on the mat", "The cat is on the mat.", 2 * 5 / (6 + 6)),  # the cat on the mat
        ("a b c d", "d c b a", 2 * 1 / 8),
        ("a b c", "a x b y c", 2 * 3 / 8),
        ("Paris", "The capital is Paris.", 2 * 1 / 5),
        ("Москва", "москва", 1.0),
        ("", "Paris", 0.0),
        ("!", "!", 0.0),
    ],
)
def test_rouge_l_by_hand(response: str, reference: str, expected: float) -> None:
    assert rouge_l([response], [reference]) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("abc", "abd", (2 / 3 + 1 / 2 + 0) / 3),  # precision = recall
        ("ab", "abc", 5 * 1 * (7 / 12) / (4 * 1 + 7 / 12)),  # orders 1 and 2: precision 1, recall (2/3 + 1/2) / 2
        ("yes", "yes", 1.0),
        ("a b\tc", "abc", 1.0),
        ("Yes", "yes", (2 / 3 + 1 / 2 + 0) / 3),
        ("x", "yyy", 0.0),
        ("", "yes", 0.0),
        # sacrebleu 2.6.0, CHRF().sentence_score
        ("the cat sat on the mat", "the cat is on the mat", 0.645779420625287),
        ("Paris", "Paris.", 0.7537154989384288),
        ("The capital is Paris.", "Paris", 0.5250542863176819),
        ("Zürich \u2013 schön", "Zürich: schön", 0.58471019721015),
    ],
)
def test_chrf_by_hand_and_as_sacrebleu(response: str, reference: str, expected: float) -> None:
    assert chrf([response], [reference]) == [pytest.approx(expected, abs=1e-12)]


def test_as_torchmetrics_and_sacrebleu_on_random_texts() -> None:
    rng = random.Random(0)
    for _ in range(40):
        one, other = (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2))
        theirs = rouge_score([one], [[other]], rouge_keys="rougeL")["rougeL_fmeasure"].item()
        assert rouge_l([one], [other]) == [pytest.approx(theirs, abs=1e-6)]
        theirs = CHRF().sentence_score(one, [other]).score / 100
        assert chrf([one], [other]) == [pytest.approx(theirs, abs=1e-12)]


def test_records_are_measured_one_by_one() -> None:
    assert rouge_l(["a b", "c"], ["a b", "d"]) == [1.0, 0.0]
    assert chrf(["ab", "c"], ["ab", "d"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="longer"):
        rouge_l(["a"], ["a", "b"])
