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

from llm_lightning.data.batches import MaskedSample, collate_padded
from llm_lightning.data.packing import common_prefix, laid_out, rounded
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.models.gpt import Packing


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

    With `hidden = model.hidden_states(input_ids, packing=packing)`, row m of `hidden.flatten(0, 1)[wanted]` predicts
    `labels[m]`, a token of sequence `branch[m]`. M targets, ordered by sequence and time, alike in both layouts.
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
    laid = laid_out([one.token_ids[:-1] for one in ordered], shares, pad_id)
    rows = [*range(0, len(ordered), 2), *range(1, len(ordered), 2)]  # chosen answers first
    targets = [laid.rows[row][torch.from_numpy(ordered[row].is_target[1:].nonzero()[0])] for row in rows]
    wanted = torch.cat([*targets, torch.zeros(0, dtype=torch.int64)])
    filled = torch.cat([wanted, wanted.new_zeros(rounded(max(len(wanted), 1)) - len(wanted))])
    return _preference_batch(samples, laid.input_ids, torch.arange(len(wanted)), laid.packing(filled))


def packed_length(samples: Sequence[PairSample], *, share_prefix: bool = True) -> int:
    """How many tokens `collate_packed_pairs` lays out."""
    shared = sum(n for _, n in _shares(samples)) if share_prefix else 0
    return sum(len(sequence.token_ids) - 1 for sequence in _sequences(samples)) - shared


def _shares(samples: Sequence[PairSample]) -> list[tuple[int, int]]:
    """For `laid_out`, pair by pair, each a chosen answer and then a rejected one."""
    pairs = [(sample.chosen.token_ids[:-1], sample.rejected.token_ids[:-1]) for sample in samples]
    of_all = common_prefix([ids for pair in pairs for ids in pair]) if pairs else 0
    shares: list[tuple[int, int]] = []
    for pair in pairs:
        first = len(shares)
        shares += [(0, of_all if first else 0), (first, common_prefix(pair))]
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
