"""Near-duplicate texts by the book's measure: cosine similarity of TF-IDF weights of character 1- to 3-grams.

Texts are compared in lower case and without punctuation. All pairs are compared, without sampling or hashing: the
weights are a sparse matrix, multiplied with itself block by block. On one CPU core, 52,000 texts of 64 characters took
half a minute and 0.6 GB; texts of 276 characters took a minute and a half and 1.2 GB. Unlike the book's script, results
give the index of a record in the given list, empty texts included, and equal texts are compared once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

MAX_PAIRS = 20_000_000
"""Pairs of different texts; with more, the threshold is too low to be useful, and they take gigabytes."""
BLOCK_ROWS = 128
BLOCK_ELEMENTS = 1 << 25
"""Numbers in a block, 256 MiB in float64: with very many texts, a block has fewer rows."""
AT_ONCE = 1 << 22  # weights multiplied in float64 at once

_PUNCTUATION = re.compile(r"[^\w\s]")
_SPACES = re.compile(r"\s\s+")


class Pair(NamedTuple):
    """Two similar texts, by index."""

    first: int
    second: int
    """greater than `first`"""
    similarity: float
    """at most 1"""


@dataclass(frozen=True)
class NearDuplicates:
    """Near-duplicates in a list of texts."""

    n_pairs: int
    groups: list[list[int]]
    """Each text is similar to another of its group, not to all. Ascending indices; groups sorted by their first."""
    _copies: list[list[int]] = field(repr=False)
    """indices of each distinct text"""
    _links: _Links = field(repr=False)

    def pairs(self) -> Iterator[Pair]:
        """Yield all pairs one by one: 10,000 copies of a text give 50 million."""
        starts = np.searchsorted(self._links.first, np.arange(len(self._copies) + 1))
        for text, copies in enumerate(self._copies):
            yield from (Pair(i, j, 1.0) for i, j in combinations(copies, 2))
            for link in range(starts[text], starts[text + 1]):
                others, similarity = self._copies[self._links.second[link]], float(self._links.similarity[link])
                yield from (Pair(min(i, j), max(i, j), similarity) for i, j in product(copies, others))


class _Links(NamedTuple):
    """Pairs of similar distinct texts, (n,) each, sorted by `first`, then `second`."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


class _Rows(NamedTuple):
    """A sparse (CSR) matrix: row r has `weights[starts[r]:starts[r + 1]]`, in the `columns` of the same slice."""

    starts: np.ndarray  # (n + 1,) int64
    columns: np.ndarray  # (nonzero,) int32
    weights: np.ndarray  # (nonzero,) float64; the rows have length 1, or 0
    weights32: np.ndarray  # (nonzero,) the same in float32
    n_columns: int


def find_near_duplicates(texts: Sequence[str], threshold: float = 0.9, *, progress: bool = False) -> NearDuplicates:
    """Find all pairs of texts with a similarity of at least `threshold`.

    Empty texts and, as in the book, texts of a single character are left out: many answers are "7" or "B".

    Args:
        texts: results refer to them by index.
        threshold: above 0, at most 1; at 1, texts differ only in case, punctuation, or an order that no 3-gram shows.
        progress: show a bar on a terminal.

    Raises:
        ValueError: if the threshold is out of range, or so low that there are more than `MAX_PAIRS` pairs.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
    indices_of: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        if text:
            indices_of.setdefault(_normalized(text), []).append(index)
    rows = _tf_idf(list(indices_of), np.array([len(indices) for indices in indices_of.values()]))
    is_long = np.array([len(text.strip()) > 1 for text in indices_of], dtype=bool)
    links = _links(rows, is_long, threshold, progress=progress)
    copies = [indices if long else indices[:1] for indices, long in zip(indices_of.values(), is_long, strict=True)]
    return NearDuplicates(_count(copies, links), _groups(copies, links), copies, links)


def keep_first(n_texts: int, groups: Iterable[Sequence[int]]) -> list[int]:
    """Return the indices that remain after keeping, per group, only the first text not yet removed.

    Args:
        groups: of one `NearDuplicates`, or of several in sequence.
    """
    removed: set[int] = set()
    for group in groups:
        removed.update([index for index in group if index not in removed][1:])
    return [index for index in range(n_texts) if index not in removed]


def _normalized(text: str) -> str:
    """Normalise as the book's script, then scikit-learn's analyzer."""
    return _SPACES.sub(" ", _PUNCTUATION.sub("", text.lower()))


def _grams(text: str) -> np.ndarray:
    """One uint64 per 1-, 2- and 3-gram: 21 bits per character, 0 for none."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    pairs = codes[:-1] | codes[1:] << np.uint64(21)
    return np.concatenate([codes, pairs, pairs[:-1] | codes[2:] << np.uint64(42)])


def _tf_idf(texts: Sequence[str], n_copies: np.ndarray) -> _Rows:
    """scikit-learn's TF-IDF: counts * (log((1 + texts) / (1 + texts with the gram)) + 1), rows scaled to length 1."""
    columns, weights, lengths, n_columns = _counted(texts)
    of_row = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    n_documents = np.bincount(columns, n_copies[of_row], n_columns)
    weights *= (np.log((1 + n_copies.sum()) / (1 + n_documents)) + 1)[columns]
    weights /= np.sqrt(np.bincount(of_row, weights**2, len(texts)))[of_row]
    # A gram of only one text counts in the length of its row, but in no product.
    is_shared = (np.bincount(columns, minlength=n_columns) > 1)[columns]
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_row[is_shared], minlength=len(texts)))])
    weights = weights[is_shared]
    return _Rows(starts, columns[is_shared], weights, weights.astype(np.float32), n_columns)


def _counted(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Per text, concatenated: column and count of each gram. Also grams per text, and the number of columns."""
    grams, counts = [], []
    for text in texts:
        distinct, n_occurrences = np.unique(_grams(text), return_counts=True)
        grams.append(distinct)
        counts.append(n_occurrences.astype(np.float32))
    lengths = np.array([len(distinct) for distinct in grams], dtype=np.int64)
    columns, n_columns = _numbered(grams)
    return columns, np.concatenate([np.zeros(0), *counts]), lengths, n_columns


def _numbered(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """The grams of all rows, concatenated, as int32 numbers from 0; and the number of distinct grams."""
    vocabulary = np.zeros(0, dtype=np.uint64)
    for start in range(0, len(rows), 4096):  # sorting all at once would need several times their memory
        vocabulary = np.union1d(vocabulary, np.concatenate(rows[start : start + 4096]))
    numbers = [np.searchsorted(vocabulary, row).astype(np.int32) for row in rows]
    return np.concatenate([np.zeros(0, dtype=np.int32), *numbers]), len(vocabulary)


def _links(rows: _Rows, is_long: np.ndarray, threshold: float, *, progress: bool) -> _Links:
    """Compare all rows: float32 selects candidates, float64 computes their similarity."""
    n = len(is_long)
    size = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // max(n, rows.n_columns, 1)))
    enough = threshold - 1e-9  # the product of a row with itself may be 0.9999999999999998
    parts = [_Links(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    with tqdm(total=n, desc="comparing", unit="text", leave=False, disable=None if progress else True) as bar:
        for start in range(0, n, size):
            block = _dense(rows, start, min(start + size, n))
            first, second = _candidates(rows, block, start, enough - _rounding(rows))
            is_pair = is_long[first] & is_long[second]
            first, second = first[is_pair], second[is_pair]
            similarity = _products(rows, block, first - start, second)
            near = similarity >= enough
            parts.append(_Links(first[near], second[near], np.minimum(similarity[near], 1.0)))
            if sum(len(links.first) for links in parts) > MAX_PAIRS:
                raise ValueError(f"threshold={threshold} finds more than {MAX_PAIRS:,} pairs of texts; raise it")
            bar.update(block.shape[1])
    return _Links(*map(np.concatenate, zip(*parts, strict=True)))


def _rounding(rows: _Rows) -> float:
    """A bound on the error of a product in float32: its n terms add up to 1 at most."""
    return float(4 + np.diff(rows.starts).max()) * float(np.finfo(np.float32).eps)


def _dense(rows: _Rows, start: int, stop: int) -> np.ndarray:
    """(columns, stop - start) float64: rows `start` to `stop`, dense and transposed."""
    inside = slice(rows.starts[start], rows.starts[stop])
    block = np.zeros((rows.n_columns, stop - start))
    block[rows.columns[inside], np.repeat(np.arange(stop - start), np.diff(rows.starts[start : stop + 1]))] = (
        rows.weights[inside]
    )
    return block


def _candidates(rows: _Rows, block: np.ndarray, start: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a row of the block and a later row whose product in float32 is at least `least`."""
    rest = slice(rows.starts[start], None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # torch warns that CSR is in beta; tests compare with scikit-learn
        later = torch.sparse_csr_tensor(
            torch.from_numpy((rows.starts[start:] - rows.starts[start]).astype(np.int32)),
            torch.from_numpy(rows.columns[rest]),
            torch.from_numpy(rows.weights32[rest]),
            (len(rows.starts) - 1 - start, rows.n_columns),
            check_invariants=False,
        )
    similar = later @ torch.from_numpy(block.astype(np.float32)) >= least  # (rows from start on, rows of the block)
    first, second = similar.T.contiguous().nonzero(as_tuple=True)
    is_later = second > first
    return first[is_later].numpy() + start, second[is_later].numpy() + start


def _products(rows: _Rows, block: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) float64: products of columns `first` of the block and rows `second`."""
    lengths = np.diff(rows.starts)
    at_once = max(1, AT_ONCE // int(lengths.max(initial=1)))
    parts: list[np.ndarray] = [np.zeros(0)]
    for start in range(0, len(first), at_once):
        left, right = first[start : start + at_once], second[start : start + at_once]
        n = lengths[right]
        of_pair = np.repeat(np.arange(len(n)), n)
        positions = np.arange(len(of_pair)) + np.repeat(rows.starts[right] - np.cumsum(n) + n, n)
        parts.append(
            np.bincount(
                of_pair, rows.weights[positions] * block[rows.columns[positions], left[of_pair]], minlength=len(n)
            )
        )
    return np.concatenate(parts)


def _count(copies: Sequence[Sequence[int]], links: _Links) -> int:
    """The number of pairs of records."""
    n_copies = np.array([len(indices) for indices in copies], dtype=np.int64)
    between = n_copies[links.first] * n_copies[links.second]
    return int((n_copies * (n_copies - 1) // 2).sum() + between.sum())


def _groups(copies: Sequence[Sequence[int]], links: _Links) -> list[list[int]]:
    """Connected components with at least two records."""
    parent = list(range(len(copies)))

    def root(text: int) -> int:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for first, second in zip(links.first.tolist(), links.second.tolist(), strict=True):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for text, indices in enumerate(copies):
        members.setdefault(root(text), []).extend(indices)
    return sorted(sorted(group) for group in members.values() if len(group) > 1)
