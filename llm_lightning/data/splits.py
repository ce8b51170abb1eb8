"""How records are split: equal records never appear in two splits."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

Keys = Sequence[str] | Sequence[bytes] | np.ndarray
"""Of records, equal for records that belong together."""

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
    keys: Keys, classes: Sequence[int] | np.ndarray, fractions: tuple[float, float], seed: int
) -> dict[str, np.ndarray]:
    """Split so that equal keys stay together and every class has about the wanted fractions.

    Groups are visited in random order, class by class; each goes to the split that is furthest behind. Splitting comes
    before balancing, so that each split is balanced by itself and the fractions hold for the smallest class, which
    limits the size.

    Args:
        keys: equal for records that are the same.
        classes: of each record; a group is of the class that most of its records have.
        fractions: of validation and test; a split with 0 gets nothing.

    Returns:
        split -> indices, in random order, int64.
    """
    group = numbered(keys)
    sizes = np.bincount(group) if len(group) else np.zeros(0, np.int64)
    of_group = _class_of_groups(group, np.asarray(classes), len(sizes))
    shares = dict(zip(SPLITS, (1 - sum(fractions), *fractions), strict=True))
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    visited, chosen = [], []
    for label in np.unique(of_group):
        members = np.flatnonzero(of_group == label)
        members = members[draw.permutation(len(members))]
        members = members[np.argsort(-sizes[members], kind="stable")]
        visited.append(members)
        chosen.append(_furthest_behind(sizes[members].tolist(), shares))
    order, split = np.concatenate([*visited, np.zeros(0, np.int64)]), np.concatenate([*chosen, np.zeros(0, np.int8)])
    parts = {name: _records_of(order[split == number], group, sizes) for number, name in enumerate(SPLITS)}
    return {name: part[draw.permutation(len(part))] for name, part in parts.items()}


def numbered(keys: Keys) -> np.ndarray:
    """The number of each key, (n,) int64: equal for equal keys, 0, 1, 2 ... in the order in which they first occur.

    Args:
        keys: texts or bytes; or hashes, (n, width) uint8 or (n,) bytes of one width, for which no object is made.
    """
    if not isinstance(keys, np.ndarray):
        seen: dict[str | bytes, int] = {}
        return np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(keys))
    words = keys.view(np.uint8).reshape(len(keys), -1) if len(keys) else np.zeros((0, 8), np.uint8)
    parts = np.ascontiguousarray(words).view(np.uint64).reshape(len(keys), -1)
    by_key = np.lexsort(parts.T)  # stable: the first of equal ones is the first that occurs
    is_new = np.ones(len(keys), bool)
    is_new[1:] = (parts[by_key[1:]] != parts[by_key[:-1]]).any(axis=1)
    run = np.cumsum(is_new) - 1
    first = by_key[is_new]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbers = np.empty(len(keys), np.int64)
    numbers[by_key] = rank[run]
    return numbers


def _class_of_groups(group: np.ndarray, classes: np.ndarray, n_groups: int) -> np.ndarray:
    """The most common class of each group, (n_groups,); of several, the one that occurs first."""
    if not len(classes) or (classes == classes[0]).all():
        return np.full(n_groups, classes[0] if len(classes) else 0)
    kinds, kind = np.unique(classes, return_inverse=True)
    pairs, first, counts = np.unique(group * len(kinds) + kind, return_index=True, return_counts=True)
    owner = pairs // len(kinds)
    best = np.lexsort((first, -counts, owner))
    leading = best[np.unique(owner[best], return_index=True)[1]]
    return kinds[pairs[leading] % len(kinds)]


def _furthest_behind(sizes: Sequence[int], shares: Mapping[str, float]) -> np.ndarray:
    """The number of the split that each group goes to, visited in this order; (n,) int8."""
    wanted = [(number, share) for number, share in enumerate(shares.values()) if share > 0]
    counts = [0] * len(shares)
    chosen = np.empty(len(sizes), np.int8)
    done = 0
    for index, size in enumerate(sizes):
        done += size
        most, split = (-1e300, 0.0), 0
        for number, share in wanted:
            behind = (share * done - counts[number], share)
            if behind > most:
                most, split = behind, number
        counts[split] += size
        chosen[index] = split
    return chosen


def _records_of(groups: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The records of `groups`, one group after the other."""
    by_group = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1][groups]
    lengths = sizes[groups]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return by_group[np.repeat(starts, lengths) + within]


def order_split(n: int, fractions: tuple[float, float]) -> dict[str, np.ndarray]:
    """The book's chapter 7: the first records for training, then test, then validation, unshuffled."""
    val, test = fractions
    n_train, n_test = int(round(n * (1 - val - test), 6)), int(round(n * test, 6))  # 0.85 x 1,100 must be 935
    indices = np.arange(n)
    return {"train": indices[:n_train], "val": indices[n_train + n_test :], "test": indices[n_train : n_train + n_test]}


def joined_groups(*keys: np.ndarray) -> np.ndarray:
    """One number per record, equal for records that a chain of equal keys connects; (n,) int64.

    Args:
        keys: several per record, such as the number of its group and that of its prompt; (n,) int64 each.
    """
    kinds = np.concatenate([[0], np.cumsum([key.max(initial=-1) + 1 for key in keys])])
    parent = list(range(int(kinds[-1])))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    nodes = np.stack([key + first for key, first in zip(keys, kinds[:-1], strict=True)], axis=1)
    for row in np.unique(nodes, axis=0).tolist():
        first, *others = map(root, row)
        for other in others:
            parent[root(other)] = root(first)
    of_node = np.array([root(node) for node in range(len(parent))], np.int64)
    return of_node[nodes[:, 0]]


def undersampled(part: Sequence[int] | np.ndarray, classes: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
    """As many records of every class as the smallest class has, in their order, (n,) int64."""
    part, classes = np.asarray(part, np.int64), np.asarray(classes)
    _, counts = np.unique(classes[part], return_counts=True)
    by_class = part[np.argsort(classes[part], kind="stable")]
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    is_kept = np.zeros(len(classes), bool)
    for members in np.split(by_class, np.cumsum(counts)[:-1]):
        is_kept[draw.permutation(members)[: counts.min()]] = True
    return part[is_kept[part]]


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
