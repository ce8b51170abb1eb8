"""Batches of preference pairs, padded or packed.

Tensor letters: B pairs, T time, N tokens of a packed batch, M targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.data.batches import Example, collate_padded, shifted
from llm_lightning.data.packing import common_prefix, laid_out, rounded
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.models.attention import Packing


class PairSample(NamedTuple):
    """One prompt with two answers."""

    sample_id: int
    prompt_ids: np.ndarray
    """(P,), at least one token."""
    chosen_ids: np.ndarray
    """(Rc,) the chosen answer, with its end if that is scored."""
    rejected_ids: np.ndarray
    """(Rr,) the same for the rejected answer."""
    n_header: int = 0
    """Number of last prompt tokens, fewer than P, that are scored like the answer."""

    @property
    def sequences(self) -> tuple[Example, Example]:
        """The prompt with the chosen and with the rejected answer; targets are the scored tokens."""
        return self._sequence(self.chosen_ids), self._sequence(self.rejected_ids)

    @property
    def n_tokens(self) -> int:
        """Tokens of both sequences."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def key(self) -> str:
        """Digest of all tokens and of which are scored: equal pairs have equal log-probabilities."""
        sizes = np.array([self.n_header, *map(len, (self.prompt_ids, self.chosen_ids, self.rejected_ids))])
        content = np.concatenate([sizes, self.prompt_ids, self.chosen_ids, self.rejected_ids])
        return hashlib.sha256(content.astype(np.int64).tobytes()).hexdigest()

    def _sequence(self, answer: np.ndarray) -> Example:
        ids = np.concatenate([self.prompt_ids, answer])
        return Example(self.sample_id, ids, np.arange(len(ids)) >= len(self.prompt_ids) - self.n_header)


class PreferenceBatch(NamedTuple):
    """B pairs as 2B sequences, each a prompt and an answer: chosen answers are 0 .. B-1, rejected ones B .. 2B-1.

    With `hidden = model.hidden_states(input_ids, Context.of(packing))`, row m of
    `hidden.flatten(0, 1)[output_positions]` predicts `labels[m]`, a token of sequence `branch[m]`. The M targets are
    ordered by sequence and time.
    """

    input_ids: Tensor
    """(2B, T), or (1, N) with `packing`, int64."""
    labels: Tensor
    """(M,) int64: one per entry of `output_positions`; two different tokens may follow one that answers share."""
    output_positions: Tensor
    """(M,) int64."""
    branch: Tensor
    """(M,) int64."""
    lengths: Tensor
    """(2B,) int64: targets of each sequence, at least 1."""
    n_targets: int
    """Number of pairs; known on the CPU."""
    sample_ids: tuple[int, ...]
    """Name the samples in error messages, and are compared on resume: for records, their index in the split."""
    keys: tuple[str, ...]
    """`PairSample.key` of each pair, under which results are cached."""
    packing: Packing | None = None
    """Where the one row of `input_ids` holds all sequences."""


def collate_padded_pairs(samples: Sequence[PairSample], *, pad_id: int, context_length: int) -> PreferenceBatch:
    """One row per sequence, see `collate_padded`. Without samples: one row of pads, and no pair."""
    sequences = _sequences(samples)
    rows = collate_padded(sequences, pad_id=pad_id, context_length=context_length)
    output_positions = (rows.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return _preference_batch(samples, sequences, rows.input_ids, output_positions, None)


def collate_packed_pairs(samples: Sequence[PairSample], *, pad_id: int, share_prefix: bool = True) -> PreferenceBatch:
    """All sequences end to end in one row, see `collate_packed`.

    With `share_prefix`, the common prefix of a pair (the prompt, and the tokens that both answers begin with) is stored
    once, and the common prefix of all sequences once for the whole batch. Positions continue after it, so that
    log-probabilities and gradients are the same without dropout; with it, sequences would share its draws.
    """
    sequences = _sequences(samples)
    ordered = _pair_by_pair(sequences)
    shares = _shares(ordered) if share_prefix else [(0, 0)] * len(ordered)
    laid = laid_out([one.token_ids[:-1] for one in ordered], shares, pad_id)
    rows = [*range(0, len(ordered), 2), *range(1, len(ordered), 2)]  # chosen answers first
    targets = [
        laid.rows[row][torch.from_numpy(one.label_mask.nonzero()[0])] for row, one in zip(rows, sequences, strict=True)
    ]
    positions = torch.cat([*targets, torch.zeros(0, dtype=torch.int64)])
    filled = torch.cat([positions, positions.new_zeros(rounded(max(len(positions), 1)) - len(positions))])
    return _preference_batch(samples, sequences, laid.input_ids, torch.arange(len(positions)), laid.packing(filled))


def packed_pairs_length(samples: Sequence[PairSample], *, share_prefix: bool = True) -> int:
    """Number of tokens that `collate_packed_pairs` lays out."""
    ordered = _pair_by_pair(_sequences(samples))
    shared = sum(n for _, n in _shares(ordered)) if share_prefix else 0
    return sum(len(one.token_ids) - 1 for one in ordered) - shared


def _sequences(samples: Sequence[PairSample]) -> list[Example]:
    """2B sequences: all chosen answers, then all rejected ones."""
    pairs = [sample.sequences for sample in samples]
    return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]


def _pair_by_pair(sequences: Sequence[Example]) -> list[Example]:
    n = len(sequences) // 2
    return [one for pair in zip(sequences[:n], sequences[n:], strict=True) for one in pair]


def _shares(ordered: Sequence[Example]) -> list[tuple[int, int]]:
    """For `laid_out`, pair by pair: what the chosen and the rejected sequence take from earlier ones."""
    inputs = [one.token_ids[:-1] for one in ordered]
    of_all = common_prefix(inputs) if inputs else 0
    shares: list[tuple[int, int]] = []
    for first in range(0, len(inputs), 2):
        shares += [(0, of_all if first else 0), (first, common_prefix(inputs[first : first + 2]))]
    return shares


def _preference_batch(
    samples: Sequence[PairSample],
    sequences: Sequence[Example],
    input_ids: Tensor,
    output_positions: Tensor,
    packing: Packing | None,
) -> PreferenceBatch:
    targets = [labels[labels != IGNORE_INDEX] for _, labels in map(shifted, sequences)]
    lengths = torch.tensor([len(one) for one in targets], dtype=torch.int64)
    return PreferenceBatch(
        input_ids,
        torch.cat([*targets, torch.zeros(0, dtype=torch.int64)]),
        output_positions,
        torch.arange(len(sequences)).repeat_interleave(lengths),
        lengths,
        len(samples),
        tuple(sample.sample_id for sample in samples),
        tuple(sample.key for sample in samples),
        packing,
    )
