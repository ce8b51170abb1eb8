"""Intervals of means and proportions, against published tables."""

from __future__ import annotations

import math
import random
from itertools import product
from statistics import stdev

import pytest
import scipy.stats

from llm_lightning.metrics.intervals import mean_interval, paired_share_interval, wilson_interval


@pytest.mark.parametrize(
    ("n", "t"),
    [(2, 12.70620), (3, 4.30265), (4, 3.18245), (5, 2.77645), (11, 2.22814), (110, 1.98197), (1502, 1.96155)],
)
def test_the_interval_of_a_mean_is_students(n: int, t: float) -> None:
    values = [float(i % 7) for i in range(n)]
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(sum(values) / n)
    for half in (mean - low, high - mean):
        assert half == pytest.approx(t * stdev(values) / math.sqrt(n), rel=1e-5)


def test_the_interval_of_a_mean_at_its_limits() -> None:
    assert mean_interval([70.0], 0, 100) == (70.0, 0, 100)
    assert mean_interval([70.0]) == (70.0, -math.inf, math.inf)
    mean, *interval = mean_interval([], 1, 5)
    assert math.isnan(mean)
    assert interval == [1, 5]
    assert mean_interval([99.0, 100.0], 0, 100)[2] == 100


def test_the_interval_of_a_mean_covers_it_in_95_of_100_samples() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        _, low, high = mean_interval([rng.gauss(3, 2) for _ in range(5)])
        hits += low <= 3 <= high
    assert 0.93 < hits / 1000 < 0.97


def test_wilson() -> None:
    # Brown, Cai and DasGupta 2001; Newcombe 1998, table I (81 of 263)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_paired_shares() -> None:
    # Newcombe 1998, paired data, method 10, for 36, 12, 2, 0 of 50; turned round, it is the other way round.
    assert paired_share_interval(36, 2, 12, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert paired_share_interval(36, 12, 2, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    low, high = paired_share_interval(5, 0, 0, 5)  # nothing tells them apart, yet ten records are few
    assert low < 0 < high
    assert paired_share_interval(0, 0, 0, 0) == (-1.0, 1.0)


@pytest.mark.parametrize("chances", [(0.4, 0.2, 0.2, 0.2), (0.7, 0.05, 0.15, 0.1), (0.1, 0.1, 0.3, 0.5)])
def test_paired_shares_are_covered_as_often_as_promised(chances: tuple[float, ...]) -> None:
    """The exact probability, over all tables of 14 records."""
    n, truth, covered = 14, chances[2] - chances[1], 0.0
    for both, only_a, only_b in product(range(n + 1), repeat=3):
        counts = (both, only_a, only_b, n - both - only_a - only_b)
        if counts[3] >= 0:
            low, high = paired_share_interval(*counts)
            covered += scipy.stats.multinomial.pmf(counts, n, chances) * (low <= truth <= high)
    assert 0.93 < covered < 0.99
