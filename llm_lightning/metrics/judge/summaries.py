"""Means, win rates and their intervals over all judged records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llm_lightning.metrics.intervals import mean_interval
from llm_lightning.metrics.judge.client import OUTCOMES, SCORED, Verdict
from llm_lightning.metrics.judge.prompts import PROMPTS, TIE, ScorePrompt


@dataclass(frozen=True)
class Comparison:
    """The comparison of two responses to one task."""

    outcome: str
    """scored only if both orders are scored"""
    winner: str | None
    """`A` or `B` if chosen in both orders, else `tie`; None unless scored"""
    orders: tuple[Verdict, Verdict]
    """shown as (A, B) and as (B, A); a value names the position, not the response"""


@dataclass(frozen=True)
class Mean:
    """A mean over the scored records, with an interval for the mean over all records."""

    mean: float | None
    """of the scored records"""
    scored_low: float
    scored_high: float
    """the 95% interval (Student's t) of the scored records"""
    low: float
    high: float
    """The interval over all records: a missing value counts as the lowest possible one for `low` and the highest for
    `high`; it always contains the interval of the scored records."""


@dataclass(frozen=True)
class ScoreSummary(Mean):
    """Scores of one column."""

    n: int
    outcomes: dict[str, int]
    """records per outcome; they sum to `n`"""


@dataclass(frozen=True)
class PairSummary(Mean):
    """Comparisons of two columns; the mean is the win rate of the first column, a tie counting half."""

    n: int
    outcomes: dict[str, int]
    wins: int
    ties: int
    losses: int
    first_chosen: int
    decided: int
    """answers other than a tie; `first_chosen` of them chose the first response, half if position has no effect"""


def summarise_scores(verdicts: Sequence[Verdict], prompt: ScorePrompt = PROMPTS["book"]) -> ScoreSummary:
    """Mean, interval and outcomes."""
    values = [float(one.value) for one in verdicts if one.value is not None]
    mean = _mean(values, len(verdicts), prompt.lowest, prompt.highest)
    return ScoreSummary(**vars(mean), n=len(verdicts), outcomes=_count(one.outcome for one in verdicts))


def summarise_pairs(comparisons: Sequence[Comparison]) -> PairSummary:
    """Win rate of A with interval, outcomes, and effect of position."""
    winners = Counter(one.winner for one in comparisons)
    points = {"A": 1.0, TIE: 0.5, "B": 0.0}
    values = [points[one.winner] for one in comparisons if one.winner is not None]
    choices = Counter(verdict.value for one in comparisons for verdict in one.orders)
    return PairSummary(
        **vars(_mean(values, len(comparisons), 0, 1)),
        n=len(comparisons),
        outcomes=_count(one.outcome for one in comparisons),
        wins=winners["A"],
        ties=winners[TIE],
        losses=winners["B"],
        first_chosen=choices["A"],
        decided=choices["A"] + choices["B"],
    )


def compared(forward: Verdict, backward: Verdict) -> Comparison:
    orders = (forward, backward)
    outcome = next((one.outcome for one in orders if one.outcome != SCORED), SCORED)
    if outcome != SCORED:
        return Comparison(outcome, None, orders)
    winner = {("A", "B"): "A", ("B", "A"): "B"}.get((str(forward.value), str(backward.value)), TIE)
    return Comparison(outcome, winner, orders)


def _mean(values: Sequence[float], n: int, lowest: float, highest: float) -> Mean:
    n_missing = n - len(values)
    mean, scored_low, scored_high = mean_interval(values, lowest, highest)
    low = mean_interval([*values, *[lowest] * n_missing], lowest, highest)[1]
    high = mean_interval([*values, *[highest] * n_missing], lowest, highest)[2]
    return Mean(mean if values else None, scored_low, scored_high, min(low, scored_low), max(high, scored_high))


def _count(outcomes: Iterable[str]) -> dict[str, int]:
    counts = Counter(outcomes)
    return {outcome: counts[outcome] for outcome in OUTCOMES}
