"""Near-duplicate texts by the book's measure: the cosine of TF-IDF weights of single characters, pairs and triples.

Texts are compared in lower case and without punctuation. Every two of them are compared, nothing is sampled or
hashed: the weights are a sparse matrix whose product with itself is computed block by block. 52,000 texts of 64
characters took half a minute and 0.6 GB on one CPU core, of 276 characters a minute and a half and 1.2 GB. Unlike the
book's script: results name records by their place in the list that was given, empty texts counted, and texts that are
equal are compared once.
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
"""Of different texts; more is a threshold for which everything is alike, and gigabytes."""
BLOCK_ROWS = 128
BLOCK_ELEMENTS = 1 << 25
"""Numbers in a block, 256 MiB in float64: of very many texts, fewer rows at once."""
AT_ONCE = 1 << 22  # weights that are multiplied in float64 at once

_PUNCTUATION = re.compile(r"[^\w\s]")
_SPACES = re.compile(r"\s\s+")


class Pair(NamedTuple):
    """Two texts that are alike."""

    first: int
    second: int
    """greater than `first`"""
    similarity: float
    """at most 1"""


@dataclass(frozen=True)
class NearDuplicates:
    """What was found among texts."""

    n_pairs: int
    groups: list[list[int]]
    """Each text is like another one of its group, not like all of them. Ascending, and ordered by their first."""
    _copies: list[list[int]] = field(repr=False)
    """where each different text stands"""
    _links: _Links = field(repr=False)

    def pairs(self) -> Iterator[Pair]:
        """Yield all pairs, made one by one: a text that stands 10,000 times is in 50 million of them."""
        starts = np.searchsorted(self._links.first, np.arange(len(self._copies) + 1))
        for text, copies in enumerate(self._copies):
            yield from (Pair(i, j, 1.0) for i, j in combinations(copies, 2))
            for link in range(starts[text], starts[text + 1]):
                others, similarity = self._copies[self._links.second[link]], float(self._links.similarity[link])
                yield from (Pair(min(i, j), max(i, j), similarity) for i, j in product(copies, others))


class _Links(NamedTuple):
    """Different texts that are alike, (n,) each, ascending by `first` and `second`."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


class _Rows(NamedTuple):
    """A sparse matrix: row r has `weights[starts[r]:starts[r + 1]]` in the columns of the same places."""

    starts: np.ndarray  # (n + 1,) int64
    columns: np.ndarray  # (nonzero,) int32
    weights: np.ndarray  # (nonzero,) float64; the rows have length 1, or 0
    weights32: np.ndarray  # (nonzero,) the same in float32
    n_columns: int


def find_near_duplicates(texts: Sequence[str], threshold: float = 0.9, *, progress: bool = False) -> NearDuplicates:
    """Find all texts whose similarity is `threshold` or more.

    Empty texts are left out, and so are those of a single character, as in the book: many an answer is "7" or "B".

    Args:
        texts: records are named by their index here.
        threshold: 0 to 1; at 1 texts are the same, but for case, punctuation, and an order that no triple shows.
        progress: show a bar on a terminal.

    Raises:
        ValueError: if the threshold is no such number, or so low that there are more than `MAX_PAIRS` pairs.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
    places: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        if text:
            places.setdefault(_normalized(text), []).append(index)
    rows = _tf_idf(list(places), np.array([len(indices) for indices in places.values()]))
    is_long = np.array([len(text.strip()) > 1 for text in places], dtype=bool)
    links = _links(rows, is_long, threshold, progress=progress)
    copies = [indices if long else indices[:1] for indices, long in zip(places.values(), is_long, strict=True)]
    return NearDuplicates(_count(copies, links), _groups(copies, links), copies, links)


def keep_first(n_texts: int, groups: Iterable[Sequence[int]]) -> list[int]:
    """Return the indices that remain when of each group only the first that is still there is kept.

    Args:
        groups: of one `NearDuplicates`, or of several one after the other.
    """
    removed: set[int] = set()
    for group in groups:
        removed.update([index for index in group if index not in removed][1:])
    return [index for index in range(n_texts) if index not in removed]


def _normalized(text: str) -> str:
    """As the book's script and then scikit-learn's analyzer do."""
    return _SPACES.sub(" ", _PUNCTUATION.sub("", text.lower()))


def _grams(text: str) -> np.ndarray:
    """One uint64 per single character, pair and triple: 21 bits each, 0 for none."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    pairs = codes[:-1] | codes[1:] << np.uint64(21)
    return np.concatenate([codes, pairs, pairs[:-1] | codes[2:] << np.uint64(42)])


def _tf_idf(texts: Sequence[str], n_copies: np.ndarray) -> _Rows:
    """Counts times log((1 + documents) / (1 + documents with it)) + 1, rows scaled to length 1: scikit-learn's."""
    columns, weights, lengths, n_columns = _counted(texts)
    of_row = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    n_documents = np.bincount(columns, n_copies[of_row], n_columns)
    weights *= (np.log((1 + n_copies.sum()) / (1 + n_documents)) + 1)[columns]
    weights /= np.sqrt(np.bincount(of_row, weights**2, len(texts)))[of_row]
    # What only one text has counts in its length, but in no product.
    is_shared = (np.bincount(columns, minlength=n_columns) > 1)[columns]
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_row[is_shared], minlength=len(texts)))])
    weights = weights[is_shared]
    return _Rows(starts, columns[is_shared], weights, weights.astype(np.float32), n_columns)


def _counted(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Number of the gram and how often it stands there, for all texts one after the other; their lengths; all grams."""
    grams, counts = [], []
    for text in texts:
        found, n_found = np.unique(_grams(text), return_counts=True)
        grams.append(found)
        counts.append(n_found.astype(np.float32))
    lengths = np.array([len(found) for found in grams], dtype=np.int64)
    columns, n_columns = _numbered(grams)
    return columns, np.concatenate([np.zeros(0), *counts]), lengths, n_columns


def _numbered(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """The grams of all rows in one array of int32, numbered from 0; and how many different ones there are."""
    vocabulary = np.zeros(0, dtype=np.uint64)
    for start in range(0, len(rows), 4096):  # one sort of all of them would need several times their memory
        vocabulary = np.union1d(vocabulary, np.concatenate(rows[start : start + 4096]))
    numbers = [np.searchsorted(vocabulary, row).astype(np.int32) for row in rows]
    return np.concatenate([np.zeros(0, dtype=np.int32), *numbers]), len(vocabulary)


def _links(rows: _Rows, is_long: np.ndarray, threshold: float, *, progress: bool) -> _Links:
    """Compare all rows: float32 finds the pairs and a few more, float64 says how alike they are."""
    n = len(is_long)
    size = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // max(n, rows.n_columns, 1)))
    enough = threshold - 1e-9  # the product of a row with itself may be 0.9999999999999998
    found = [_Links(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    with tqdm(total=n, desc="comparing", unit="text", leave=False, disable=None if progress else True) as bar:
        for start in range(0, n, size):
            block = _dense(rows, start, min(start + size, n))
            first, second = _candidates(rows, block, start, enough - _rounding(rows))
            is_pair = is_long[first] & is_long[second]
            first, second = first[is_pair], second[is_pair]
            similarity = _products(rows, block, first - start, second)
            near = similarity >= enough
            found.append(_Links(first[near], second[near], np.minimum(similarity[near], 1.0)))
            if sum(len(links.first) for links in found) > MAX_PAIRS:
                raise ValueError(f"threshold={threshold} finds more than {MAX_PAIRS:,} pairs of texts; raise it")
            bar.update(block.shape[1])
    return _Links(*map(np.concatenate, zip(*found, strict=True)))


def _rounding(rows: _Rows) -> float:
    """A bound on how far a product in float32 is off: n terms add up to 1 at most."""
    return float(4 + np.diff(rows.starts).max()) * float(np.finfo(np.float32).eps)


def _dense(rows: _Rows, start: int, stop: int) -> np.ndarray:
    """(columns, stop - start) float64: some rows as columns."""
    inside = slice(rows.starts[start], rows.starts[stop])
    block = np.zeros((rows.n_columns, stop - start))
    block[rows.columns[inside], np.repeat(np.arange(stop - start), np.diff(rows.starts[start : stop + 1]))] = (
        rows.weights[inside]
    )
    return block


def _candidates(rows: _Rows, block: np.ndarray, start: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the block, and rows after each of them, whose product is `least` or more in float32."""
    rest = slice(rows.starts[start], None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # CSR is called beta; the tests compare it with scikit-learn
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
    """(n,) float64: columns `first` of the block times rows `second`."""
    lengths = np.diff(rows.starts)
    at_once = max(1, AT_ONCE // int(lengths.max(initial=1)))
    parts: list[np.ndarray] = [np.zeros(0)]
    for start in range(0, len(first), at_once):
        left, right = first[start : start + at_once], second[start : start + at_once]
        n = lengths[right]
        of_pair = np.repeat(np.arange(len(n)), n)
        places = np.arange(len(of_pair)) + np.repeat(rows.starts[right] - np.cumsum(n) + n, n)
        parts.append(
            np.bincount(of_pair, rows.weights[places] * block[rows.columns[places], left[of_pair]], minlength=len(n))
        )
    return np.concatenate(parts)


def _count(copies: Sequence[Sequence[int]], links: _Links) -> int:
    """Pairs of records."""
    n_copies = np.array([len(indices) for indices in copies], dtype=np.int64)
    between = n_copies[links.first] * n_copies[links.second]
    return int((n_copies * (n_copies - 1) // 2).sum() + between.sum())


def _groups(copies: Sequence[Sequence[int]], links: _Links) -> list[list[int]]:
    """Connected components of two records and more."""
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
