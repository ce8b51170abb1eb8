"""Named batches, and the one place where labels are shifted.

Tensor letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.data.packing import WIDTHS, common_prefix, laid_out, rounded
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.models.gpt import Packing


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
    width = max(longest, min(rounded(longest), context_length))
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
    laid = laid_out([sample.token_ids[:-1] for sample in samples], shares, pad_id)
    labels = torch.full_like(laid.input_ids, IGNORE_INDEX)
    for row, (sample, (_, skipped)) in enumerate(zip(samples, shares, strict=True)):
        _, targets = _inputs_and_labels(sample)
        labels[0, laid.rows[row, skipped : len(targets)]] = targets[skipped:]
    return _lm_batch(laid.input_ids, labels, samples, laid.packing(_wanted(labels[0])))


def shared_prefix(samples: Sequence[MaskedSample]) -> int:
    """How many tokens all samples begin with, as far as none of their labels is to be learnt."""
    if len(samples) < 2:
        return 0
    shared = min(int(sample.is_target[1:].argmax()) for sample in samples)
    return common_prefix([sample.token_ids[:shared] for sample in samples])


def _wanted(labels: Tensor) -> Tensor:
    """The positions that have a target, and others until there are a multiple of `WIDTHS`."""
    wanted, others = (labels != IGNORE_INDEX).nonzero()[:, 0], (labels == IGNORE_INDEX).nonzero()[:, 0]
    return torch.cat([wanted, others[: rounded(max(len(wanted), 1)) - len(wanted)]])


def _inputs_and_labels(sample: MaskedSample) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(sample.token_ids.astype(np.int64))
    labels = tokens[1:].masked_fill(~torch.from_numpy(sample.is_target[1:]), IGNORE_INDEX)
    return tokens[:-1], labels


def _lm_batch(input_ids: Tensor, labels: Tensor, samples: Sequence[MaskedSample], packing: Packing | None) -> LMBatch:
    n_targets = sum(sample.n_targets for sample in samples)
    return LMBatch(input_ids, labels, n_targets, tuple(sample.sample_id for sample in samples), packing)


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
