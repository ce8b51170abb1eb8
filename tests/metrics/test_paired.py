"""Comparisons of settings over seeds: against SciPy, and on sweeps in which nothing, or much, differs."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from scipy import stats

from llm_lightning.metrics.paired import LEVEL, Comparison, compare_all
from llm_lightning.metrics.student_t import probability_within, quantile

Values = dict[str, dict[int, float]]


def drawn(generator: random.Random, means: list[float], n_seeds: int) -> Values:
    """A sweep without training: each value is its setting's mean plus noise of standard deviation 1."""
    return {
        f"setting {number}": {seed: generator.gauss(mean, 1.0) for seed in range(n_seeds)}
        for number, mean in enumerate(means)
    }


def best_with_others(values: Values) -> list[Comparison]:
    best = min(values, key=lambda name: sum(values[name].values()))
    return [one for one in compare_all(values) if best in (one.a, one.b)]


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30, 101])
def test_t_is_that_of_scipy(df: int) -> None:
    for probability in (0.5, 0.9, 0.95, 0.99, 1 - 0.05 / 66):
        assert quantile(df, probability) == pytest.approx(stats.t.ppf((1 + probability) / 2, df), rel=1e-9)
    for t in (0.0, 0.3, 2.0, 12.0):
        assert probability_within(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-13)


def test_pairs_are_those_of_scipy_with_holms_correction() -> None:
    values = drawn(random.Random(0), [0.0, 0.5, 3.0, 3.1], 4)
    compared = compare_all(values)
    tests = [stats.ttest_rel(list(values[b].values()), list(values[a].values())) for a, b in combinations(values, 2)]
    by_size = sorted(range(6), key=lambda index: tests[index].pvalue)
    steps = [min(1.0, (6 - rank) * tests[index].pvalue) for rank, index in enumerate(by_size)]
    expected = {index: max(steps[: rank + 1]) for rank, index in enumerate(by_size)}
    for index, (one, test) in enumerate(zip(compared, tests, strict=True)):
        assert one.p == pytest.approx(expected[index], rel=1e-9)
        assert (one.low, one.high) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-9)


def test_a_gap_of_the_detectable_size_is_found_and_a_smaller_one_may_not_be() -> None:
    noise = {0: 0.1, 1: -0.3, 2: 0.4, 3: 0.0}
    (pair,) = compare_all({"a": dict.fromkeys(noise, 1.0), "b": {seed: 1.0 + one for seed, one in noise.items()}})
    for share, found in ((1.001, True), (0.999, False)):
        shift = share * pair.detectable - pair.difference
        (again,) = compare_all(
            {"a": dict.fromkeys(noise, 1.0), "b": {seed: 1.0 + one + shift for seed, one in noise.items()}}
        )
        assert again.differs is found


def test_only_common_seeds_count() -> None:
    values = {"a": {1: 1.0, 2: 2.0, 3: 3.5}, "b": {2: 2.5, 3: 4.2, 4: 100.0}, "c": {9: 1.0}, "d": {1: math.nan, 2: 2.1}}
    by_pair = {(one.a, one.b): one for one in compare_all(values)}
    assert (by_pair["a", "b"].n, by_pair["a", "b"].difference) == (2, pytest.approx(0.6))
    assert by_pair["a", "c"].reason == "no common seed"
    assert by_pair["a", "d"].reason == "one common seed"


def test_one_seed_and_no_spread_are_not_judged() -> None:
    noisy = {1: 1.0, 2: 1.3}
    same = {"a": noisy, "b": {1: 1.1, 2: 1.4}, "c": dict(noisy)}
    by_pair = {(one.a, one.b): one for one in compare_all(same)}
    assert by_pair["a", "b"].reason == "the same difference for each seed: no spread to judge by"
    assert by_pair["a", "c"].reason == "equal values for each seed: no spread to judge by"
    for one in (*by_pair.values(), *compare_all({"a": {1: 1.0}, "b": {1: 2.0}})):
        assert math.isnan(one.p)
        assert not one.differs


@pytest.mark.slow
def test_six_equal_settings_are_rarely_said_to_differ() -> None:
    generator = random.Random(1234)
    sweeps = [drawn(generator, [0.0] * 6, 3) for _ in range(2000)]
    wrong = sum(any(one.differs for one in compare_all(values)) for values in sweeps)
    uncorrected = sum(
        any(stats.ttest_rel([*values[one.a].values()], [*values[one.b].values()]).pvalue <= LEVEL
            for one in best_with_others(values))
        for values in sweeps[:100]
    )  # fmt: skip
    print(f"{wrong} of 2,000 sweeps of six equal settings claim a difference; uncorrected, {uncorrected} of 100")
    assert wrong <= 0.06 * 2000
    assert uncorrected > 0.2 * 100  # what the correction is for


def test_two_settings_far_apart_are_found() -> None:
    generator = random.Random(1234)
    found = sum(compare_all(drawn(generator, [0.0, 4.0], 5))[0].differs for _ in range(2000))
    print(f"{found} of 2,000 sweeps of two settings, four standard deviations apart, find it")
    assert found >= 0.9 * 2000
