"""The runs of one task, grouped over seeds: means, intervals, the best setting, and what it can be said to beat.

    entries -> studies (one for each task and monitored metric) -> groups (equal settings, several seeds)
    -> the best of those that lost no seed -> its comparison with every other

Numbers only; pages and files are made from them elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import count
from typing import Any, NamedTuple

from llm_lightning.callbacks.monitored import better_when
from llm_lightning.experiments.report.entries import Entry
from llm_lightning.experiments.settings.changes import MAY_CHANGE
from llm_lightning.experiments.sweep.identity import EXTENDS, names_files
from llm_lightning.metrics.intervals import mean_interval
from llm_lightning.metrics.paired import Comparison, compare_all

FOLDER = "folder"
"""The setting that tells the folders of a report apart."""
SEED = "seed"
TESTED = ("test/accuracy", "test/reward_accuracy", "test/exact_match")
"""Metrics shown beside the tested counterpart of the monitored one. No perplexity: seeds are averaged, and a mean of
exponentials is none."""


class Estimate(NamedTuple):
    """A mean over seeds with its 95% t interval, infinitely wide for one seed; nan without any."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    settings: Mapping[str, Any]
    """Only those that vary."""
    entries: Sequence[Entry]
    metric: str

    @cached_property
    def values(self) -> dict[Any, float]:
        """Seed -> value of the metric that settings are judged by."""
        return self.values_of(self.metric)

    def values_of(self, metric: str) -> dict[Any, float]:
        """Seed -> value; of repeated seeds, the last run counts."""
        pairs = ((entry.seed, entry.value(metric)) for entry in self.entries)
        return {seed: value for seed, value in pairs if value is not None}

    def estimate(self, metric: str) -> Estimate:
        values = list(self.values_of(metric).values())
        return Estimate(*mean_interval(values), len(values))

    @cached_property
    def lost(self) -> list[Entry]:
        """The runs that gave no value, and whose seed no other run has."""
        return [entry for entry in self.entries if entry.value(self.metric) is None and entry.seed not in self.values]


@dataclass(frozen=True)
class Study:
    """The runs that are compared with each other."""

    task: str | None
    metric: str
    mode: str | None
    keys: Sequence[str]
    """Settings that vary."""
    groups: Sequence[Group]
    """Those that may be ranked first, the best first."""
    tested: Sequence[str]
    """Test metrics that are shown."""

    @property
    def entries(self) -> list[Entry]:
        return [entry for group in self.groups for entry in group.entries]

    @cached_property
    def full(self) -> int:
        """The number of seeds of a group that is ranked."""
        return max((len(group.values) for group in self.groups if not group.lost), default=0)

    def is_ranked(self, group: Group) -> bool:
        """Whether it lost no seed, and has as many as the others."""
        return self.mode is not None and not group.lost and 0 < len(group.values) == self.full

    @cached_property
    def best(self) -> Group | None:
        return next((group for group in self.groups if self.is_ranked(group)), None)

    @cached_property
    def is_alone(self) -> bool:
        """Whether others lack seeds, so that the best is better than none."""
        return len(self.groups) > 1 == sum(map(self.is_ranked, self.groups))

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The best group with every other, corrected over all pairs of groups; differences are other - best."""
        if self.best is None or len(self.groups) < 2:
            return []
        compared = compare_all({group.name: group.values for group in self.groups})
        best = self.best.name
        return [_turned(one) if one.b == best else one for one in compared if best in (one.a, one.b)]


def studies_of(entries: Sequence[Entry], metric: str | None = None) -> list[Study]:
    """Group the runs of each task.

    Args:
        metric: judge settings by it; by default, the one that each run monitors, at its best.

    Raises:
        ValueError: if it is a test metric, if no run has it, or if its name does not say what is better.
    """
    _refuse_metric(entries, metric)
    kinds: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        judged = metric or entry.monitor or ""
        kinds.setdefault((entry.settings.get("task._target_"), judged), []).append(entry)
    return [_study(found, judged) for (_, judged), found in kinds.items()]


def _refuse_metric(entries: Sequence[Entry], metric: str | None) -> None:
    if metric is None:
        return
    if metric.startswith("test/"):
        raise ValueError(f"--metric {metric}: the best is chosen by validation; its test metric is shown beside it")
    known = sorted({name for entry in entries for name in entry.run.metrics if name.startswith(("val/", "train/"))})
    if metric not in known:
        raise ValueError(f"--metric {metric}: no run has it; there are {', '.join(known) or 'none'}")
    if better_when(metric) is None and not any(entry.monitor == metric for entry in entries):
        raise ValueError(f"--metric {metric}: its name does not say whether it is better when small or large")


def _study(entries: Sequence[Entry], metric: str) -> Study:
    keys = varying(entries)
    mode = next((entry.mode for entry in entries if entry.monitor == metric and entry.mode), None)
    mode = mode or better_when(metric)
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        alike.setdefault(json.dumps([_identity(entry, key) for key in keys]), []).append(entry)
    groups: list[Group] = []
    for found in alike.values():
        groups.append(_group(found, keys, metric, {group.name for group in groups}))
    tested = [f"test/{metric.rpartition('/')[2]}", *TESTED]
    measured = {name for entry in entries if entry.status == "finished" for name in entry.run.metrics}
    task = next((entry.task for entry in entries if entry.summary), entries[0].task)
    study = Study(task, metric, mode, keys, groups, [name for name in dict.fromkeys(tested) if name in measured])
    return Study(task, metric, mode, keys, sorted(groups, key=lambda group: _rank(group, study)), study.tested)


def _rank(group: Group, study: Study) -> tuple[bool, float]:
    mean = group.estimate(study.metric).mean
    if mean != mean:
        return True, float("inf")
    return not study.is_ranked(group), -mean if study.mode == "max" else mean


def _group(entries: Sequence[Entry], keys: Sequence[str], metric: str, taken: Collection[str]) -> Group:
    settings = {key: _setting(entries[0], key) for key in keys}
    short = short_names(keys)
    name = ", ".join(f"{short[key]} {shown(key, value)}" for key, value in settings.items()) or "one setting"
    if name in taken:  # files of one name and other content
        name = next(other for number in count(2) if (other := f"{name} ({number})") not in taken)
    return Group(name, settings, entries, metric)


def as_typed(value: Any) -> str:
    """A value of a setting: `1e-05` rather than `0.00001`, without quotes."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def shown(key: str, value: Any) -> str:
    """A value in a table: a class by its name alone, a number with six digits."""
    if key.endswith("._target_") and isinstance(value, str):
        return value.rpartition(".")[2]
    return f"{value:.6g}" if isinstance(value, float) else as_typed(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last part, with as many before it as tell it from the others; of a class, the group's name."""
    named = {key: key.removesuffix("._target_") for key in keys}
    return {key: _short(name, list(named.values())) for key, name in named.items()}


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    ends = [parts[-length:] for length in range(1, len(parts))]
    return ".".join(next((end for end in ends if sum(k.split(".")[-len(end) :] == end for k in keys) == 1), parts))


# --- which settings vary ---------------------------------------------------------------------------------------------


def varying(entries: Sequence[Entry]) -> list[str]:
    """The settings that vary, the swept ones first, without the seed and those that follow another one.

    Names and displays count only if they are swept, files by their content.
    """
    swept = list(dict.fromkeys(key for entry in entries for key in entry.swept))
    every = dict.fromkeys([FOLDER, *swept, *(key for entry in entries for key in entry.settings)])
    added = {key for entry in entries for key in entry.added}
    chosen: list[str] = []
    first: dict[tuple[int, ...], str] = {}
    for key in every:
        if key == SEED or (key not in swept and _is_no_difference(key)):
            continue
        if len({_identity(entry, key) for entry in entries if key in added or _has(entry, key)}) < 2:
            continue
        if key in swept or any(_setting(entry, key) not in (entry.seed, None) for entry in entries):
            other = first.setdefault(_pattern(_identity(entry, key) for entry in entries), key)
            if other == key or (key in swept and other != FOLDER):  # all keys of a search differ from trial to trial
                chosen.append(key)
    return chosen


@cache
def _is_no_difference(key: str) -> bool:
    counts = names_files(key) or any(fnmatchcase(key, one) for one in EXTENDS)
    return not counts and any(fnmatchcase(key, one) for one in MAY_CHANGE)


def _pattern(texts: Iterable[str]) -> tuple[int, ...]:
    """The same for two settings that divide the runs alike: `scheduler.min_lr` follows `optimizer.lr`."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(text, len(numbers)) for text in texts)


def _setting(entry: Entry, key: str) -> Any:
    return entry.source if key == FOLDER else entry.settings.get(key)


def _has(entry: Entry, key: str) -> bool:
    """Whether a run says something of a setting: `lora=none` does of `lora.rank`.

    It does not where only the key is missing: another class has other keys, an earlier version has fewer.
    """
    above = key.rpartition(".")[0]
    return key == FOLDER or key in entry.settings or (bool(above) and bool(entry.settings) and above not in entry.nodes)


def _identity(entry: Entry, key: str) -> str:
    """What is compared of a setting: numbers as floats, so that `1` is `1.0`; files by their content, if known."""
    value = _setting(entry, key)
    if names_files(key):
        value = entry.content.get(key, value)
    number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53  # which floats tell apart
    return json.dumps(float(value) if number else value, default=str)


def _turned(one: Comparison) -> Comparison:
    return one._replace(a=one.b, b=one.a, difference=-one.difference, low=-one.high, high=-one.low)
