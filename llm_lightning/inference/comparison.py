"""Two models' answers to the same questions, measured and judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from llm_lightning.metrics.answers import chrf, exact_match, rouge_l
from llm_lightning.metrics.intervals import mean_interval, paired_share_interval, wilson_interval
from llm_lightning.metrics.judge.client import Judge, Verdict
from llm_lightning.metrics.judge.summaries import Comparison, ScoreSummary, summarise_pairs, summarise_scores

A, B = COLUMNS = ("model_response_A", "model_response_B")
NGRAM, TIMES = 3, 3


class Measure(NamedTuple):
    """A metric of both models, as text."""

    name: str
    a: str
    b: str
    difference: str
    """B - A, on the same records"""
    of: str
    """the number of records"""


def repeats_itself(response: str) -> bool:
    """Return whether a three-word phrase occurs at least three times."""
    words = response.casefold().split()
    runs = Counter(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return any(count >= TIMES for count in runs.values())


def measures_of(rows: Sequence[dict[str, Any]]) -> list[Measure]:
    """Compare two columns of answers with the correct ones, and with each other.

    Args:
        rows: records with `output` and the two `COLUMNS`.
    """
    with_answer = [row for row in rows if row["output"].strip()]
    references = [row["output"] for row in with_answer]
    compared = [[row[column] for row in with_answer] for column in COLUMNS]
    matches = [[exact_match(*pair) for pair in zip(one, references, strict=True)] for one in compared]
    responses = [[row[column] for row in rows] for column in COLUMNS]
    n_same = sum(one == other for one, other in zip(*responses, strict=True))
    same = _share(n_same, len(rows))
    lengths = [[len(one.split()) for one in column] for column in responses]
    return [
        _of_shares("exact match", *matches),
        _of_means("ROUGE-L", *(rouge_l(one, references) for one in compared), highest=1),
        _of_means("chrF", *(chrf(one, references) for one in compared), highest=1),
        Measure("identical responses", same, same, "", f"{len(rows):,}"),
        _of_means("mean length in words", *lengths, digits=1),
        _of_shares("repetition", *([repeats_itself(one) for one in column] for column in responses)),
    ]


def _of_means(
    name: str, a: Sequence[float], b: Sequence[float], *, highest: float = math.inf, digits: int = 3
) -> Measure:
    """A mean over records of values from 0 to `highest`, of A and of B."""
    differences = [other - one for one, other in zip(a, b, strict=True)]
    difference = _difference(*mean_interval(differences, -highest, highest), digits) if differences else "-"
    return Measure(name, _mean(a, highest, digits), _mean(b, highest, digits), difference, f"{len(a):,}")


def _of_shares(name: str, a: Sequence[bool], b: Sequence[bool]) -> Measure:
    """A share of records: those of A, and those of B."""
    pairs = Counter(zip(a, b, strict=True))
    counts = [pairs[pair] for pair in ((True, True), (True, False), (False, True), (False, False))]
    difference = _difference((sum(b) - sum(a)) / len(a), *paired_share_interval(*counts)) if a else "-"
    return Measure(name, _share(sum(a), len(a)), _share(sum(b), len(b)), difference, f"{len(a):,}")


def explanations(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on what the numbers mean."""
    n_without = sum(not row["output"].strip() for row in rows)
    remarks = [
        "In brackets: 95% intervals (Wilson's for shares, Student's t for means). Exact match, ROUGE-L and chrF "
        "compare with the correct answer, from 0 to 1.",
        "B - A: the difference on the same records, which is known better than the two values beside it (intervals: "
        "Newcombe's for paired shares, Student's t over the differences of the records for means). An interval that "
        "leaves out 0 is no accident of these records; each row is judged by itself.",
        "Repetition: the share of responses in which a three-word phrase occurs at least three times.",
    ]
    if n_without:
        remarks.append(f"{n_without:,} records have no correct answer and are left out of the first three rows.")
    return remarks


def _share(count: int, n: int) -> str:
    return _cell(count / n, *wilson_interval(count, n)) if n else "-"


def _mean(values: Sequence[float], highest: float = math.inf, digits: int = 3) -> str:
    return _cell(*mean_interval(values, 0, highest), digits) if values else "-"


def _difference(mean: float | None, low: float, high: float, digits: int = 3) -> str:
    if mean is None:
        return "-"
    interval = f" ({low:+.{digits}f} to {high:+.{digits}f})" if math.isfinite(high - low) else ""
    return f"{mean:+.{digits}f}{interval}"


def _cell(mean: float | None, low: float, high: float, digits: int = 3) -> str:
    if mean is None:
        return "-"
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if math.isfinite(high) else ""
    return f"{mean:.{digits}f}{interval}"


class Judged(NamedTuple):
    """The opinion of a judge."""

    measures: list[Measure]
    remarks: list[str]
    notes: list[list[str]]
    """of each record"""


def judged(judge: Judge, rows: Sequence[dict[str, Any]]) -> Judged:
    """Let a judge score both columns, and say in both orders which answer is better."""
    from llm_lightning.inference.judging import compare_responses, score_responses

    verdicts = [score_responses(judge, rows, column) for column in COLUMNS]
    pairs = compare_responses(judge, rows, B, A)  # the first one's wins are counted
    scores = [summarise_scores(one) for one in verdicts]
    summary = summarise_pairs(pairs)
    lost = (None if summary.mean is None else 1 - summary.mean, 1 - summary.high, 1 - summary.low)
    won = (summary.mean, summary.low, summary.high)
    n_scored = [f"{one.outcomes['scored']:,}" for one in scores]
    scored_of = " and ".join(dict.fromkeys(n_scored))
    score_a, score_b = (_cell(one.mean, one.low, one.high, 1) for one in scores)
    ahead = (None if summary.mean is None else 2 * summary.mean - 1, 2 * summary.low - 1, 2 * summary.high - 1)
    measures = [
        Measure("score of the judge", score_a, score_b, _score_difference(*verdicts), scored_of),
        Measure("win rate", _cell(*lost), _cell(*won), _difference(*ahead), f"{summary.outcomes['scored']:,}"),
    ]
    remarks = [
        f"Judged by {judge.model} at {judge.url}. Scores are from 0 to 100. B wins {summary.wins:,}, ties "
        f"{summary.ties:,}, loses {summary.losses:,} of {summary.n:,}, asked in both orders: a response wins if it is "
        "chosen in both, else it is a tie, half a win for each.",
    ]
    if summary.decided:
        share = summary.first_chosen / summary.decided
        remarks.append(
            f"The response shown first was chosen in {share:.0%} of the {summary.decided:,} that were not a tie."
        )
    both = sum(one.value is not None and other.value is not None for one, other in zip(*verdicts, strict=True))
    if both < len(rows):
        remarks.append(f"The difference of the scores is over the {both:,} records with both.")
    remarks += _failures({"Scores of A": scores[0], "Scores of B": scores[1], "Pairs": summary})
    return Judged(measures, remarks, [_notes(*one) for one in zip(*verdicts, pairs, strict=True)])


def _score_difference(a: Sequence[Verdict], b: Sequence[Verdict]) -> str:
    """B - A over the records that have both scores."""
    pairs = [(one.value, other.value) for one, other in zip(a, b, strict=True)]
    differences = [float(other) - float(one) for one, other in pairs if one is not None and other is not None]
    return _difference(*mean_interval(differences), 1) if differences else "-"


def _failures(summaries: dict[str, ScoreSummary | Any]) -> list[str]:
    """What the judge did not score, and how the intervals count it."""
    remarks = []
    for name, summary in summaries.items():
        missing = [f"{count:,} {kind}" for kind, count in summary.outcomes.items() if kind != "scored" and count]
        if missing:
            remarks.append(
                f"{name}: {', '.join(missing)} of {summary.n:,}; the interval counts them as worst at its lower end "
                "and as best at its upper end."
            )
    return remarks


def _notes(score_a: Verdict, score_b: Verdict, pair: Comparison) -> list[str]:
    scores = [f"score of {name} {one.outcome if one.value is None else one.value}" for name, one in
              (("A", score_a), ("B", score_b))]  # fmt: skip
    # The comparison was asked as (B, A): its "A" is our B.
    better = {"A": "B is better", "B": "A is better", "tie": "a tie"}.get(pair.winner or "", f"pair {pair.outcome}")
    return [*scores, better]
