"""Mixtures of sources: what `data.mixture` says, and which samples an epoch takes, in which order.

An epoch has as many samples as the sources together, shared out by weight. A source whose share is larger than itself
repeats, reshuffled every time; one whose share is smaller goes on in the next epoch where it stopped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_lightning.data.files.find import PathWords
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.nearest import did_you_mean

KEYS = ("name", "path", "hf_dataset", "hf_config", "hf_split", "hf_revision", "weight")
EXAMPLE = "{name: web, path: web/, weight: 0.7}"
BLOCK = 1 << 12
"""Positions of a source that are shuffled at once where a pass is shorter: a pass of 5 is not worth a generator."""


@dataclass(frozen=True)
class MixtureEntry:
    """One source of a mixture: files, or a dataset of the hub."""

    name: str
    weight: float
    path: PathWords | None
    hub: HubDataset | None


def mixture_entries(setting: Any) -> list[MixtureEntry]:
    """Check `data.mixture`: a list of {name, weight, and path or hf_dataset with hf_config, hf_split, hf_revision}.

    Raises:
        ValueError: naming the entry and its key.
    """
    if not isinstance(setting, Sequence) or isinstance(setting, str) or not setting:
        raise ValueError(f"data.mixture={setting!r} must be a list of sources, each as {EXAMPLE}")
    entries = [_entry(number, value) for number, value in enumerate(setting)]
    names = [entry.name for entry in entries]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"data.mixture: {names.count(twice[0])} sources have the name {twice[0]!r}; rename one")
    return entries


def check_source_name(name: Any, where: str) -> None:
    """Refuse a name that could not be part of a metric's name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"{where}: {name!r} is part of the names of metrics: use letters, digits, _ and -, and write a number in "
            "quotes"
        )


def _entry(number: int, value: Any) -> MixtureEntry:
    where = f"data.mixture[{number}]"
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} must be a source, as {EXAMPLE}")
    if value.get("name") is None:
        raise ValueError(f"{where} has no name; give it one, as {EXAMPLE}")
    check_source_name(value["name"], where)
    where = f"{where} ({value['name']})"
    for key in value:
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), KEYS)}use {', '.join(KEYS)}")
    path, dataset = value.get("path"), value.get("hf_dataset")
    if (path is None) == (dataset is None):
        raise ValueError(f"{where} has {'neither' if path is None else 'both'} path {_or(path)} hf_dataset; give one")
    for key in ("hf_config", "hf_split", "hf_revision"):
        if dataset is None and value.get(key) is not None:
            raise ValueError(f"{where}: {key}={value[key]} belongs to hf_dataset, and this source has a path")
    config, split, revision = (value.get(key) for key in ("hf_config", "hf_split", "hf_revision"))
    hub = None if dataset is None else HubDataset(dataset, config, split or "train", revision)
    return MixtureEntry(value["name"], _weight(where, value.get("weight")), path, hub)


def _or(path: Any) -> str:
    return "nor" if path is None else "and"


def _weight(where: str, weight: Any) -> float:
    if weight is None:
        raise ValueError(f"{where} has no weight; give its share of an epoch, such as weight: 0.5")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"{where}: weight={weight!r} must be a number above 0")
    return float(weight)


class Mixture:
    """Which samples an epoch takes from several sources: a pure function of (seed, epoch).

    The samples are numbered through, source after source. Source i is an endless sequence of passes over its samples;
    with `q` of the N samples of an epoch, epoch e takes the positions e*q .. (e+1)*q - 1 of it. So no sample of a
    source comes again before all of them came.

    Args:
        names, sizes: of the sources; sizes in samples.
        weights: shares of an epoch, relative to their sum.
        seed: of the passes and of the order of an epoch.
        shuffle: reshuffle every pass and mix the sources at random; false: every pass in the order of the source, and
            the sources interleaved evenly.

    Raises:
        ValueError: a source that would get no sample at all.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], seed: int, *, shuffle: bool = True
    ) -> None:
        self.names, self.sizes, self.seed, self.shuffle = tuple(names), tuple(sizes), seed, shuffle
        self.shares = tuple(weight / math.fsum(weights) for weight in weights)
        self.n_samples = sum(sizes)
        self.counts = largest_remainder(self.shares, self.n_samples)
        for name, share, count in zip(self.names, self.shares, self.counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"data.mixture: a share of {share:.2g} of {self.n_samples:,} samples gives {name} none; raise its "
                    "weight"
                )

    def __len__(self) -> int:
        return self.n_samples

    def chosen(self, epoch: int) -> np.ndarray:
        """The (N,) int64 indices of the samples of an epoch, in the order of their visit."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        taken = [start + self._of_source(source, epoch) for source, start in enumerate(starts)]
        return np.concatenate(taken)[self._mixed(epoch)]

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the source of each sample."""
        return np.searchsorted(np.cumsum(self.sizes), indices, side="right")

    def lines(self, what: str = "samples") -> list[str]:
        """What an epoch takes from each source."""
        return [
            f"{name}: {share:.1%} of an epoch, {count:,} of {self.n_samples:,} {what}; it has {size:,}, "
            + (f"each of which comes {count / size:.1f} times" if count > size else f"{count / size:.0%} of them")
            for name, share, count, size in zip(self.names, self.shares, self.counts, self.sizes, strict=True)
        ]

    def report(self) -> dict[str, dict[str, Any]]:
        """name -> its share, its samples, how many of them an epoch takes, and how often it takes each."""
        rows = zip(self.names, self.shares, self.sizes, self.counts, strict=True)
        return {
            name: {"share": share, "samples": size, "per_epoch": count, "passes_per_epoch": count / size}
            for name, share, size, count in rows
        }

    def _of_source(self, source: int, epoch: int) -> np.ndarray:
        """(q,) positions within a source, in the order of its passes."""
        size, count = self.sizes[source], self.counts[source]
        first, last = epoch * count, (epoch + 1) * count
        if not self.shuffle:
            return np.arange(first, last, dtype=np.int64) % size
        per_block = size * max(1, BLOCK // size)
        taken = np.empty(count, dtype=np.int64)
        for block in range(first // per_block, -(-last // per_block)):
            start = block * per_block
            begin, end = max(first, start), min(last, start + per_block)
            taken[begin - first : end - first] = self._passes(source, block)[begin - start : end - start]
        return taken

    def _passes(self, source: int, block: int) -> np.ndarray:
        """Whole passes over a source, one after the other."""
        # The counter keeps streams apart, from that of `_mixed` and of `order.bucketed_order` too: its low words count
        # the draws.
        draw = np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=[0, 0, source + 1, block]))
        size = self.sizes[source]
        n_passes = max(1, BLOCK // size)
        if n_passes == 1:
            return draw.permutation(size)
        return draw.permuted(np.tile(np.arange(size), (n_passes, 1)), axis=1).ravel()

    def _mixed(self, epoch: int) -> np.ndarray:
        """(N,) the order in which an epoch visits what it took, source after source."""
        if self.shuffle:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, 1]))
            return draw.permutation(self.n_samples)
        places = [(np.arange(count) + 0.5) / count for count in self.counts]
        return np.argsort(np.concatenate(places), kind="stable")


def largest_remainder(shares: Sequence[float], n: int) -> tuple[int, ...]:
    """Share out `n`: the whole parts of share * n, and the rest to the largest remainders."""
    exact = [share * n for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: n - sum(counts)]:
        counts[index] += 1
    return tuple(counts)
