"""How records are split: equal records never appear in two splits."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test")
MOST_MARKS = 256
"""Longest run of accents and other combining marks that is compared; no script has more than a few."""


def normalized(text: str, *, fold_digits: bool = True) -> str:
    """The form in which texts are compared: case-folded letters, and digits, all alike; else the signs of the text."""
    folded = unicodedata.normalize("NFKC", _with_few_marks(text)).casefold()
    if fold_digits:
        folded = re.sub(r"\d", "0", folded)
    words = " ".join(re.sub(r"[^\w\s]|_", " ", folded).split())
    return words or " ".join(folded.split())


def _with_few_marks(text: str) -> str:
    """A text with at most `MOST_MARKS` in a row: sorting them takes time quadratic in their number."""
    if len(text) <= MOST_MARKS or text.isascii():
        return text
    kept, n_marks = [], 0
    for char in text:
        n_marks = n_marks + 1 if unicodedata.combining(char) else 0
        if n_marks <= MOST_MARKS:
            kept.append(char)
    return "".join(kept)


def grouped_split(
    keys: Sequence[str], classes: Sequence[int], fractions: tuple[float, float], seed: int
) -> dict[str, list[int]]:
    """Split so that equal keys stay together and every class has about the wanted fractions.

    Groups are visited in random order, class by class; each goes to the split that is furthest behind. Splitting comes
    before balancing, so that each split is balanced by itself and the fractions hold for the smallest class, which
    limits the size.

    Args:
        keys: equal for records that are the same.
        fractions: of validation and test.

    Returns:
        split -> indices, in random order.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    shares = dict(zip(SPLITS, (1 - sum(fractions), *fractions), strict=True))
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for group in groups.values():
        by_class[Counter(classes[index] for index in group).most_common(1)[0][0]].append(group)
    for label in sorted(by_class):
        members = [by_class[label][index] for index in draw.permutation(len(by_class[label]))]
        counts = dict.fromkeys(SPLITS, 0)
        for number, group in enumerate(sorted(members, key=len, reverse=True), start=1):
            done = sum(counts.values()) + len(group)
            split = max(SPLITS, key=lambda name: (shares[name] * done - counts[name], shares[name], -number))
            counts[split] += len(group)
            parts[split] += group
    return {split: [part[index] for index in draw.permutation(len(part))] for split, part in parts.items()}


def order_split(n: int, fractions: tuple[float, float]) -> dict[str, list[int]]:
    """The book's chapter 7: the first records for training, then test, then validation, unshuffled."""
    val, test = fractions
    n_train, n_test = int(round(n * (1 - val - test), 6)), int(round(n * test, 6))  # 0.85 x 1,100 must be 935
    indices = list(range(n))
    return {"train": indices[:n_train], "val": indices[n_train + n_test :], "test": indices[n_train : n_train + n_test]}


def joined_groups(*keys: Sequence[str]) -> list[str]:
    """One key per record, equal for records that a chain of equal keys connects.

    Args:
        keys: several keys per record, such as its group and its prompt.
    """
    parent: dict[tuple[int, str], tuple[int, str]] = {}

    def root(node: tuple[int, str]) -> tuple[int, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for row in zip(*keys, strict=True):
        first, *others = [root((kind, key)) for kind, key in enumerate(row)]
        for other in others:
            parent[root(other)] = root(first)
    return ["{} {}".format(*root((0, key))) for key in keys[0]]


def undersampled(part: Sequence[int], classes: Sequence[int], seed: int) -> list[int]:
    """As many records of every class as the smallest class has, in their order."""
    members: dict[int, list[int]] = defaultdict(list)
    for index in part:
        members[classes[index]].append(index)
    least = min(map(len, members.values()))
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    kept = {i for label in sorted(members) for i in draw.permutation(members[label])[:least].tolist()}
    return [index for index in part if index in kept]


def book_split(classes: Sequence[int], fractions: tuple[float, float], seed: int) -> dict[str, list[int]]:
    """The book's chapter 6: undersample class 0 to the size of class 1, shuffle, cut; pandas draws the numbers."""
    import pandas

    frame = pandas.DataFrame({"label": list(classes)})
    spam = frame[frame.label == 1]
    balanced = pandas.concat([frame[frame.label == 0].sample(len(spam), random_state=seed), spam])
    shuffled = balanced.sample(frac=1, random_state=seed).index.tolist()
    n_train, n_val = int(len(shuffled) * (1 - sum(fractions))), int(len(shuffled) * fractions[0])
    return {
        "train": shuffled[:n_train],
        "val": shuffled[n_train : n_train + n_val],
        "test": shuffled[n_train + n_val :],
    }
