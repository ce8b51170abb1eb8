"""Named batches, and the one place where labels are shifted.

Tensor letters: B batch, T time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.models.attention import Packing

WIDTHS = 8
"""Batches are as wide as a multiple of it: for each new width a CPU's kernels are compiled and kept, and tensor cores
want multiples of 8."""


class LMBatch(NamedTuple):
    """Next-token prediction: `labels[b, t]` is the token that follows `input_ids[b, t]`."""

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64, IGNORE_INDEX where there is no target."""
    n_targets: int
    """Known on the CPU so that counting never waits for the device."""
    sample_ids: tuple[int, ...]
    """Which samples these are, for error messages."""
    packing: Packing | None = None
    """Where the one row of `input_ids` holds several sequences end to end."""


class Sample(NamedTuple):
    """One row before collation."""

    sample_id: int
    token_ids: np.ndarray
    """(n,) the whole sequence; its first n-1 tokens are inputs, its last n-1 are labels."""


def collate_lm(samples: Sequence[Sample], *, pad_id: int) -> LMBatch:
    """Pad on the right to the longest sample and shift: the labels of a row are its tokens from the second on.

    With causal attention no real position sees a pad, so no mask is needed. Without samples (a process that ran out
    of data before the others) the batch is one pad token without a target.
    """
    length = max((len(sample.token_ids) - 1 for sample in samples), default=1)
    input_ids = torch.full((max(len(samples), 1), length), pad_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.token_ids.astype(np.int64))
        input_ids[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1] = tokens[1:]
    n_targets = sum(len(sample.token_ids) - 1 for sample in samples)
    return LMBatch(input_ids, labels, n_targets, tuple(sample.sample_id for sample in samples))


class MaskedSample(NamedTuple):
    """One sequence of which some tokens are to be learnt."""

    sample_id: int
    token_ids: np.ndarray
    """(n,) the whole sequence, inputs and labels."""
    is_target: np.ndarray
    """(n,) bool: whether the model learns to write this token. The first cannot be."""

    @property
    def n_targets(self) -> int:
        return int(self.is_target[1:].sum())


def collate_padded(samples: Sequence[MaskedSample], *, pad_id: int, context_length: int) -> LMBatch:
    """One row per sample, padded on the right to the longest, rounded up to `WIDTHS`; see `collate_lm`."""
    longest = max((len(sample.token_ids) - 1 for sample in samples), default=1)
    width = max(longest, min(_rounded(longest), context_length))
    input_ids = torch.full((max(len(samples), 1), width), pad_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        end = len(sample.token_ids) - 1
        input_ids[row, :end], labels[row, :end] = _inputs_and_labels(sample)
    return _lm_batch(input_ids, labels, samples, None)


def collate_packed(samples: Sequence[MaskedSample], *, pad_id: int, share_prefix: bool = True) -> LMBatch:
    """All samples end to end in one row, so that only attention sees padding; the last few tokens fill up `WIDTHS`.

    With `share_prefix`, the tokens with which all samples begin and of which none is learnt, such as the preamble of a
    template, stand there once. Losses and gradients are the same; with dropout they would share its draws.
    """
    n_shared = shared_prefix(samples) if share_prefix else 0
    shares = [(0, n_shared if row else 0) for row in range(len(samples))]  # the first sample brings the shared tokens
    laid = _laid_out([sample.token_ids[:-1] for sample in samples], shares, pad_id)
    labels = torch.full_like(laid.input_ids, IGNORE_INDEX)
    for row, (sample, (_, skipped)) in enumerate(zip(samples, shares, strict=True)):
        _, targets = _inputs_and_labels(sample)
        labels[0, laid.rows[row, skipped : len(targets)]] = targets[skipped:]
    return _lm_batch(laid.input_ids, labels, samples, laid.packing(_wanted(labels[0])))


class _Laid(NamedTuple):
    """Sequences end to end; see `Packing`."""

    input_ids: Tensor
    """(1, N)"""
    rows: Tensor
    places: Tensor
    positions: Tensor

    def packing(self, wanted: Tensor) -> Packing:
        return Packing(self.rows, self.places, self.positions, wanted)


def _laid_out(sequences: Sequence[np.ndarray], shares: Sequence[tuple[int, int]], pad_id: int) -> _Laid:
    """Lay sequences end to end, without the tokens that an earlier one has brought.

    Args:
        shares: of each sequence: from which earlier one it takes how many of its first tokens.
    """
    sequences, shares = sequences or [np.array([pad_id])], shares or [(0, 0)]
    width = _rounded(max(map(len, sequences)))
    total = _rounded(sum(len(ids) - shared for ids, (_, shared) in zip(sequences, shares, strict=True)))
    input_ids = torch.full((1, total), pad_id, dtype=torch.int64)
    rows = torch.zeros((len(sequences), width), dtype=torch.int64)
    places, positions = torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.int64)
    start = 0
    for row, (ids, (source, shared)) in enumerate(zip(sequences, shares, strict=True)):
        time = torch.arange(shared, len(ids))
        piece = slice(start, start + len(time))
        rows[row, :shared] = rows[source, :shared]
        rows[row, shared : len(ids)] = start + time - shared
        places[piece], positions[piece] = row * width + time, time
        input_ids[0, piece] = torch.from_numpy(ids[shared:].astype(np.int64))
        start += len(time)
    return _Laid(input_ids, rows, places, positions)


def shared_prefix(samples: Sequence[MaskedSample]) -> int:
    """How many tokens all samples begin with, as far as none of their labels is to be learnt."""
    if len(samples) < 2:
        return 0
    shared = min(int(sample.is_target[1:].argmax()) for sample in samples)
    return _common([sample.token_ids[:shared] for sample in samples])


def _common(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all sequences begin with."""
    first = sequences[0]
    shared = min(map(len, sequences))
    for ids in sequences[1:]:
        differ = first[:shared] != ids[:shared]
        shared = int(differ.argmax()) if differ.any() else shared
    return shared


def _wanted(labels: Tensor) -> Tensor:
    """The positions that have a target, and others until there are a multiple of `WIDTHS`."""
    wanted, others = (labels != IGNORE_INDEX).nonzero()[:, 0], (labels == IGNORE_INDEX).nonzero()[:, 0]
    return torch.cat([wanted, others[: _rounded(max(len(wanted), 1)) - len(wanted)]])


def _inputs_and_labels(sample: MaskedSample) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(sample.token_ids.astype(np.int64))
    labels = tokens[1:].masked_fill(~torch.from_numpy(sample.is_target[1:]), IGNORE_INDEX)
    return tokens[:-1], labels


def _lm_batch(input_ids: Tensor, labels: Tensor, samples: Sequence[MaskedSample], packing: Packing | None) -> LMBatch:
    n_targets = sum(sample.n_targets for sample in samples)
    return LMBatch(input_ids, labels, n_targets, tuple(sample.sample_id for sample in samples), packing)


def _rounded(length: int) -> int:
    return -(-length // WIDTHS) * WIDTHS


class ClassificationBatch(NamedTuple):
    """Whole sequences and the class of each."""

    input_ids: Tensor
    """(B, T) int64, padded on the right."""
    lengths: Tensor
    """(B,) int64, real tokens of each row, at least 1."""
    labels: Tensor
    """(B,) int64 class index, IGNORE_INDEX for the dummy row of an empty batch."""
    n_targets: int
    """Labelled rows, known on the CPU."""
    sample_ids: tuple[int, ...]
    """Which samples these are, for error messages."""


class LabelledSample(NamedTuple):
    """One text before collation."""

    sample_id: int
    token_ids: np.ndarray
    """(n,)."""
    label: int


def collate_classification(
    samples: Sequence[LabelledSample], *, pad_id: int, pad_to: int | None = None, most: int | None = None
) -> ClassificationBatch:
    """Pad on the right to `pad_to` tokens, or to the longest sample, with `most` to one of few widths up to that.

    Without samples (a process that ran out of data before the others) the batch is one pad without a label.
    """
    width = max((len(sample.token_ids) for sample in samples), default=1)
    if most is not None:
        width = min(-(-width // WIDTHS) * WIDTHS, most)
    input_ids = torch.full((max(len(samples), 1), pad_to or width), pad_id, dtype=torch.int64)
    lengths = torch.ones(len(input_ids), dtype=torch.int64)
    labels = torch.full_like(lengths, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        lengths[row], labels[row] = len(sample.token_ids), sample.label
        input_ids[row, : len(sample.token_ids)] = torch.from_numpy(sample.token_ids.astype(np.int64))
    return ClassificationBatch(input_ids, lengths, labels, len(samples), tuple(s.sample_id for s in samples))


class PairSample(NamedTuple):
    """One prompt with two answers."""

    sample_id: int
    prompt_ids: np.ndarray
    """(P,), at least one token."""
    chosen_ids: np.ndarray
    """(Rc,) the answer and, where it is scored, its end."""
    rejected_ids: np.ndarray
    """(Rr,) the same of the other answer."""
    n_header: int = 0
    """So many of the last tokens of the prompt, fewer than P, are scored like the answer."""

    @property
    def chosen(self) -> MaskedSample:
        """The prompt and the chosen answer, what is scored as targets."""
        return self._sequence(self.chosen_ids)

    @property
    def rejected(self) -> MaskedSample:
        """The same with the rejected answer."""
        return self._sequence(self.rejected_ids)

    @property
    def key(self) -> str:
        """Digest of all tokens and of what is scored: equal pairs have equal log-probabilities."""
        sizes = np.array([self.n_header, *map(len, (self.prompt_ids, self.chosen_ids, self.rejected_ids))])
        content = np.concatenate([sizes, self.prompt_ids, self.chosen_ids, self.rejected_ids])
        return hashlib.sha256(content.astype(np.int64).tobytes()).hexdigest()

    def _sequence(self, answer: np.ndarray) -> MaskedSample:
        ids = np.concatenate([self.prompt_ids, answer])
        return MaskedSample(self.sample_id, ids, np.arange(len(ids)) >= len(self.prompt_ids) - self.n_header)


class PreferenceBatch(NamedTuple):
    """B pairs as 2B sequences: the chosen answers 0 .. B-1, the rejected ones B .. 2B-1, each behind its prompt.

    With `hidden = model.hidden_states(input_ids, Context.of(packing))`, row m of `hidden.flatten(0, 1)[wanted]`
    predicts `labels[m]`, a token of sequence `branch[m]`. The M targets are ordered by sequence and time.
    """

    input_ids: Tensor
    """(2B, T), or (1, N) with `packing`, int64."""
    labels: Tensor
    """(M,) int64: beside `wanted`, since one token may be followed by two different ones."""
    wanted: Tensor
    """(M,) int64."""
    branch: Tensor
    """(M,) int64."""
    lengths: Tensor
    """(2B,) int64, targets of each sequence, at least 1."""
    n_targets: int
    """Pairs, known on the CPU."""
    sample_ids: tuple[int, ...]
    """Which samples these are, for error messages."""
    keys: tuple[str, ...]
    """What was computed of a pair once can be found under its key."""
    packing: Packing | None = None
    """Where the one row of `input_ids` holds all sequences."""


def collate_padded_pairs(samples: Sequence[PairSample], *, pad_id: int, context_length: int) -> PreferenceBatch:
    """One row per sequence, see `collate_padded`. Without samples: one pad, and no pair."""
    rows = collate_padded(_sequences(samples), pad_id=pad_id, context_length=context_length)
    wanted = (rows.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return _preference_batch(samples, rows.input_ids, wanted, None)


def collate_packed_pairs(samples: Sequence[PairSample], *, pad_id: int, share_prefix: bool = True) -> PreferenceBatch:
    """All sequences end to end in one row, see `collate_packed`.

    With `share_prefix`, what both sequences of a pair begin with (the prompt, and the tokens that both answers begin
    with) stands there once, and what all sequences begin with once for all. Positions go on behind it, so that log-
    probabilities and gradients are the same; with dropout they would share its draws.
    """
    ordered = [sequence for sample in samples for sequence in (sample.chosen, sample.rejected)]
    shares = _shares(samples) if share_prefix else [(0, 0)] * len(ordered)
    laid = _laid_out([one.token_ids[:-1] for one in ordered], shares, pad_id)
    rows = [*range(0, len(ordered), 2), *range(1, len(ordered), 2)]  # chosen answers first
    targets = [laid.rows[row][torch.from_numpy(ordered[row].is_target[1:].nonzero()[0])] for row in rows]
    wanted = torch.cat([*targets, torch.zeros(0, dtype=torch.int64)])
    filled = torch.cat([wanted, wanted.new_zeros(_rounded(max(len(wanted), 1)) - len(wanted))])
    return _preference_batch(samples, laid.input_ids, torch.arange(len(wanted)), laid.packing(filled))


def packed_length(samples: Sequence[PairSample], *, share_prefix: bool = True) -> int:
    """How many tokens `collate_packed_pairs` lays out."""
    shared = sum(n for _, n in _shares(samples)) if share_prefix else 0
    return sum(len(sequence.token_ids) - 1 for sequence in _sequences(samples)) - shared


def _shares(samples: Sequence[PairSample]) -> list[tuple[int, int]]:
    """For `_laid_out`, pair by pair, each a chosen answer and then a rejected one."""
    pairs = [(sample.chosen.token_ids[:-1], sample.rejected.token_ids[:-1]) for sample in samples]
    of_all = _common([ids for pair in pairs for ids in pair]) if pairs else 0
    shares: list[tuple[int, int]] = []
    for pair in pairs:
        first = len(shares)
        shares += [(0, of_all if first else 0), (first, _common(pair))]
    return shares


def _sequences(samples: Sequence[PairSample]) -> list[MaskedSample]:
    return [sample.chosen for sample in samples] + [sample.rejected for sample in samples]


def _preference_batch(
    samples: Sequence[PairSample], input_ids: Tensor, wanted: Tensor, packing: Packing | None
) -> PreferenceBatch:
    sequences = _sequences(samples)
    lengths = torch.tensor([one.n_targets for one in sequences], dtype=torch.int64)
    labels = np.concatenate([np.zeros(0, np.int64), *(one.token_ids[1:][one.is_target[1:]] for one in sequences)])
    return PreferenceBatch(
        input_ids,
        torch.from_numpy(labels.astype(np.int64)),
        wanted,
        torch.arange(len(sequences)).repeat_interleave(lengths),
        lengths,
        len(samples),
        tuple(sample.sample_id for sample in samples),
        tuple(sample.key for sample in samples),
        packing,
    )
