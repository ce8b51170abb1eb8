"""Settings compared over the seeds that they share, corrected for the number of comparisons.

The best of many settings was chosen by the data: with twelve settings that are equally good and three seeds, it
"differs" at 95% from some other one in more than half of all sweeps. So every claim is corrected (Holm 1979) over all
pairs of settings, also those that nobody looks at.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from statistics import fmean, stdev
from typing import NamedTuple

from llm_lightning.metrics.student_t import probability_within, quantile

LEVEL = 0.05
"""Probability of one or more wrong claims among all pairs, where no setting differs from another."""
ROUNDING = 1e-12
"""A spread below this share of the values is rounding, and none."""


class Comparison(NamedTuple):
    """Two settings, paired over the seeds that both have."""

    a: str
    b: str
    n: int
    """Common seeds."""
    difference: float
    """Mean of b - a over them; nan without any."""
    low: float
    high: float
    """Ends of the 95% t interval of this pair alone."""
    p: float
    """Two-sided, of the paired t test, corrected; nan if not judged."""
    detectable: float
    """Mean difference, in either direction, from which on this pair is found, whatever the others give; nan if not
    judged."""
    reason: str | None
    """Why the pair is not judged."""

    @property
    def differs(self) -> bool:
        """Whether the settings differ, by all that is known."""
        return self.p <= LEVEL


def compare_all(values: Mapping[str, Mapping[Hashable, float]]) -> list[Comparison]:
    """Compare all pairs of settings by paired t tests, with Holm's correction.

    Args:
        values: setting -> seed -> value.

    Returns:
        the pairs in the order of the settings. Pairs that cannot be judged count in the correction, too.
    """
    pairs = list(combinations(values, 2))
    compared = [_compare(a, b, values, len(pairs)) for a, b in pairs]
    corrected = _holm([one.p for one in compared])
    return [one._replace(p=p) for one, p in zip(compared, corrected, strict=True)]


def _compare(a: str, b: str, values: Mapping[str, Mapping[Hashable, float]], n_pairs: int) -> Comparison:
    """A pair with its own p, not corrected yet."""
    mine, other = values[a], values[b]
    common = [seed for seed in mine if seed in other and math.isfinite(mine[seed]) and math.isfinite(other[seed])]
    differences = [other[seed] - mine[seed] for seed in common]
    n = len(differences)
    mean = fmean(differences) if n else math.nan
    unjudged = Comparison(a, b, n, mean, -math.inf, math.inf, math.nan, math.nan, None)
    if n < 2:
        return unjudged._replace(reason="one common seed" if n else "no common seed")
    spread = stdev(differences)
    rounding = ROUNDING * max(max(abs(mine[seed]), abs(other[seed])) for seed in common)
    if spread <= rounding:
        what = "equal values" if abs(mean) <= rounding else "the same difference"
        return unjudged._replace(low=mean, high=mean, reason=f"{what} for each seed: no spread to judge by")
    error = spread / math.sqrt(n)
    half = quantile(n - 1) * error
    return unjudged._replace(
        low=mean - half,
        high=mean + half,
        p=1 - probability_within(abs(mean) / error, n - 1),
        detectable=quantile(n - 1, 1 - LEVEL / n_pairs) * error,
    )


def _holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): the k-th smallest of m times m - k + 1, and no smaller than the one before."""
    m, largest = len(p_values), 0.0
    adjusted = [math.nan] * m
    judged = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    for rank, index in enumerate(sorted(judged, key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
