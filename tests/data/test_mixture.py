"""Mixtures: shares by counting, passes, purity, processes; what the setting may say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.mixture import BLOCK, Mixture, largest_remainder, mixture_entries
from llm_lightning.data.order import BatchOrder
from llm_lightning.data.samples import Rows

SIZES, WEIGHTS = (3000, 500, 40), (0.7, 0.2, 0.1)


def mixture(seed: int = 1, **options: Any) -> Mixture:
    return Mixture(("long", "middle", "short"), SIZES, WEIGHTS, seed, **options)


def positions(one: Mixture, source: int, n_epochs: int) -> list[int]:
    """What a source gave, epoch after epoch, within an epoch in the order of its passes."""
    return [index for epoch in range(n_epochs) for index in one._of_source(source, epoch).tolist()]


def test_shares_of_an_epoch_by_counting() -> None:
    chosen = mixture().chosen(0)
    assert chosen.shape == (3540,)
    assert chosen.dtype == np.int64
    counts = Counter("long" if i < 3000 else "middle" if i < 3500 else "short" for i in chosen.tolist())
    assert counts == {"long": 2478, "middle": 708, "short": 354}  # 0.7, 0.2 and 0.1 of 3,540
    for name, weight in zip(("long", "middle", "short"), WEIGHTS, strict=True):
        for part in np.split(chosen, 2):  # mixed: about the same shares in each half
            inside = sum(name == ("long" if i < 3000 else "middle" if i < 3500 else "short") for i in part.tolist())
            assert abs(inside / len(part) - weight) < 0.05


@pytest.mark.parametrize(
    ("shares", "n", "counts"),
    [
        ((0.7, 0.2, 0.1), 10, (7, 2, 1)),
        ((0.5, 0.25, 0.25), 7, (3, 2, 2)),  # 3.5, 1.75, 1.75
        ((1 / 3, 1 / 3, 1 / 3), 10, (4, 3, 3)),
        ((0.29, 0.71), 100, (29, 71)),  # 0.29 * 100 is 28.999999999999996
    ],
)
def test_largest_remainder_by_hand(shares: tuple[float, ...], n: int, counts: tuple[int, ...]) -> None:
    assert largest_remainder(shares, n) == counts


def test_a_long_source_is_seen_whole_before_any_of_it_repeats() -> None:
    taken = positions(mixture(), 0, 9)  # 9 * 2,478 = 7 passes and 1,302
    for start in range(0, 21_000, 3000):
        assert sorted(taken[start : start + 3000]) == list(range(3000))
    assert len(set(taken[21_000:])) == 1302
    assert taken[:3000] != taken[3000:6000]
    seen_by_epoch_0 = set(mixture().chosen(0).tolist())
    of_epoch_1 = [index for index in mixture().chosen(1).tolist() if index < 3000]
    assert len(set(of_epoch_1) - seen_by_epoch_0) == 3000 - 2478


def test_a_short_source_repeats_reshuffled() -> None:
    taken = positions(mixture(), 2, 4)
    passes = [tuple(taken[start : start + 40]) for start in range(0, len(taken) - 39, 40)]
    assert len(passes) == 35
    assert all(sorted(one) == list(range(40)) for one in passes)
    assert len(set(passes)) == 35
    counts = Counter(mixture().chosen(0).tolist())
    assert {counts[3500 + i] for i in range(40)} == {8, 9}  # 354 / 40 = 8.85


@pytest.mark.parametrize("size", [1, 2, BLOCK // 2, BLOCK - 1, BLOCK, BLOCK + 1])
def test_passes_at_the_border_of_a_block(size: int) -> None:
    one = Mixture(("a", "b"), (size, 3 * BLOCK), (0.5, 0.5), 0)
    taken = positions(one, 0, 3)
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    one = mixture()
    orders = [one.chosen(epoch) for epoch in (0, 1, 2)]
    for epoch in (2, 0, 1):
        assert np.array_equal(mixture().chosen(epoch), orders[epoch])
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], mixture(seed=2).chosen(0))


def test_without_shuffle_sources_are_interleaved_in_their_own_order() -> None:
    one = Mixture(("a", "b"), (6, 2), (0.5, 0.5), 0, shuffle=False)
    assert one.chosen(0).tolist() == [0, 6, 1, 7, 2, 6, 3, 7]
    assert one.chosen(1).tolist() == [4, 6, 5, 7, 0, 6, 1, 7]


class Data(BaseDataModule):
    """Numbers as samples, with a mixture."""

    def __init__(self, **options: Any) -> None:
        super().__init__(seed=1, **options)
        self.mixture = mixture(shuffle=self.shuffle)
        self.train_samples = Rows([Number(index) for index in range(sum(SIZES))])
        self.eval_samples = {}

    def build(self) -> None: ...

    def preview(self, n: int) -> str:
        return ""

    def describe(self) -> str:
        return ""


class Number:
    def __init__(self, index: int) -> None:
        self.n_tokens = 1 + index % 50


def batches(data: Data, rank: int, world_size: int, epoch: int) -> list[list[int]]:
    order = data.order_of(data.train_samples, is_training=True)
    batch_order = BatchOrder(3540, data.batch_size, shuffle=True, order=order, rank=rank, world_size=world_size)
    batch_order.set_epoch(epoch)
    return list(batch_order)


@pytest.mark.parametrize("options", [{}, {"bucket": True}, {"shuffle": False}])
def test_two_processes_share_what_one_would_see(options: dict[str, Any]) -> None:
    one = batches(Data(batch_size=8, **options), 0, 1, 3)
    two = [batches(Data(batch_size=4, **options), rank, 2, 3) for rank in range(2)]
    assert [first + second for first, second in zip(*two, strict=True)] == one
    expected = mixture(shuffle=options.get("shuffle", True)).chosen(3)
    assert sorted(index for batch in one for index in batch) == sorted(expected.tolist())


@pytest.mark.parametrize("bucket", [False, True])
def test_a_resumed_order_goes_on_where_it_was(bucket: bool) -> None:
    whole = batches(Data(batch_size=8, bucket=bucket), 0, 1, 2)
    data = Data(batch_size=8, bucket=bucket)
    data.resume(2, 100)
    order = data._train_batches()
    order.resume(2, 100)
    assert list(order) == whole[100:]
    assert data.expected_samples(2, 300) == tuple(whole[300])
    assert data.batches_per_epoch(1) == 443  # 3,540 / 8


def test_buckets_hold_samples_of_similar_length() -> None:
    def spread(data: Data) -> float:
        return float(np.mean([np.ptp([index % 50 for index in batch]) for batch in batches(data, 0, 1, 0)]))

    assert spread(Data(batch_size=8, bucket=True)) < spread(Data(batch_size=8)) / 3


def test_what_the_first_batches_took_of_each_source() -> None:
    data = Data(batch_size=8)
    seen = Counter(i for batch in batches(data, 0, 1, 1)[:50] for i in batch)
    taken = data.taken_per_source(1, 25, 2)
    assert taken["short"] == sum(n for i, n in seen.items() if i >= 3500)
    assert taken["middle"] == sum(n for i, n in seen.items() if 3000 <= i < 3500)
    assert sum(taken.values()) == 400
    assert Data.taken_per_source(data, 1, 443, 1) == {"long": 2478, "middle": 708, "short": 354}


def test_lines_and_report() -> None:
    assert mixture().lines("windows")[0] == (
        "long: 70.0% of an epoch, 2,478 of 3,540 windows; it has 3,000, 83% of them"
    )
    assert mixture().lines()[2].endswith("354 of 3,540 samples; it has 40, each of which comes 8.8 times")
    assert mixture().report()["middle"] == {"share": 0.2, "samples": 500, "per_epoch": 708, "passes_per_epoch": 1.416}


@pytest.mark.slow
def test_two_million_samples_in_seconds_and_bounded_memory() -> None:
    import time
    import tracemalloc

    large = Mixture(("a", "b", "c"), (1_999_000, 990, 10), WEIGHTS, 0)
    started = time.monotonic()
    tracemalloc.start()
    large.chosen(5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 5
    assert peak < 6 * 8 * 2_000_000


# --- the setting ---------------------------------------------------------------------------------------------------


def test_entries() -> None:
    web, code = mixture_entries(
        [
            {"name": "web", "path": ["a", "b"], "weight": 7},
            {"name": "code", "hf_dataset": "x/y", "hf_split": "train[:50%]", "weight": 0.5},
        ]
    )
    assert (web.name, web.weight, web.path, web.hub) == ("web", 7.0, ["a", "b"], None)
    assert (code.path, code.hub) == (None, ("x/y", None, "train[:50%]", None))


GOOD = {"name": "a", "path": "a.txt", "weight": 1}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("a.txt", r"data\.mixture='a\.txt' must be a list of sources"),
        ([], r"data\.mixture=\[\] must be a list"),
        (["a.txt"], r"data\.mixture\[0\]='a\.txt' must be a source, as \{name: web"),
        ([{"path": "a", "weight": 1}], r"data\.mixture\[0\] has no name"),
        ([{**GOOD, "name": "a/b"}], r"data\.mixture\[0\]: 'a/b' is part of the names of metrics: use letters"),
        ([GOOD, GOOD], r"2 sources have the name 'a'"),
        ([{**GOOD, "wieght": 2}], r"data\.mixture\[0\] \(a\): unknown key 'wieght'; did you mean weight\?"),
        ([GOOD, {**GOOD, "name": "b", "weight": 0}], r"data\.mixture\[1\] \(b\): weight=0 must be a number above 0"),
        ([{**GOOD, "weight": "much"}], r"weight='much' must be a number"),
        ([{**GOOD, "weight": float("nan")}], r"weight=nan must be"),
        ([{"name": "a", "path": "a"}], r"\(a\) has no weight"),
        ([{"name": "a", "weight": 1}], r"\(a\) has neither path nor hf_dataset"),
        ([{**GOOD, "hf_dataset": "x"}], r"\(a\) has both path and hf_dataset"),
        ([{**GOOD, "hf_split": "test"}], r"\(a\): hf_split=test belongs to hf_dataset"),
    ],
)
def test_refused_settings(setting: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixture_entries(setting)


def test_a_source_that_would_give_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a share of 0\.001 of 100 samples gives b none; raise its weight"):
        Mixture(("a", "b"), (50, 50), (0.999, 0.001), 0)
