"""Named batches of token sequences, and the one place where labels are shifted.

Tensor letters: B batch, T time, N tokens of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.data.packing import common_prefix, laid_out, rounded
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.models.attention import Packing


class Example(NamedTuple):
    """One sequence for next-token prediction."""

    sample_id: int
    token_ids: np.ndarray
    """(n,) the whole sequence, inputs and labels."""
    is_target: np.ndarray | None = None
    """(n,) bool: which tokens the loss is taken on; None: all. The first never is: nothing predicts it."""

    @property
    def sequences(self) -> tuple[Example]:
        """This one; a pair has two."""
        return (self,)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def label_mask(self) -> np.ndarray:
        """(n - 1,) bool: which labels are targets."""
        return np.ones(len(self.token_ids) - 1, dtype=bool) if self.is_target is None else self.is_target[1:]

    @property
    def n_targets(self) -> int:
        return int(self.label_mask.sum())


def shifted(example: Example) -> tuple[Tensor, Tensor]:
    """The one label shift: the label of input t is token t + 1, or IGNORE_INDEX where that is no target.

    Returns:
        inputs and labels, (n - 1,) int64 each.
    """
    tokens = torch.from_numpy(example.token_ids.astype(np.int64))
    return tokens[:-1], tokens[1:].masked_fill(~torch.from_numpy(example.label_mask), IGNORE_INDEX)


class LMBatch(NamedTuple):
    """Next-token prediction: `labels[b, t]` is the token that follows `input_ids[b, t]`."""

    input_ids: Tensor
    """(B, T) int64; (1, N) with `packing`."""
    labels: Tensor
    """Of the same shape, int64; IGNORE_INDEX where there is no target."""
    n_targets: int
    """Known on the CPU, so that counting never waits for the device."""
    sample_ids: tuple[int, ...]
    """Name the samples in error messages, and are compared on resume: for records, their index in the split."""
    packing: Packing | None = None
    """Where the one row of `input_ids` holds several sequences end to end."""


def collate_padded(examples: Sequence[Example], *, pad_id: int, context_length: int | None = None) -> LMBatch:
    """One row per example, padded on the right.

    With causal attention no real position sees a pad, so no mask is needed. Without examples (a process that ran out
    of data before the others) the batch is one row of pads without a target.

    Args:
        context_length: the width is rounded up to a multiple of `WIDTHS` within it; None: the longest example's.
    """
    width = max((len(example.token_ids) - 1 for example in examples), default=1)
    if context_length is not None:
        width = max(width, min(rounded(width), context_length))
    input_ids = torch.full((max(len(examples), 1), width), pad_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        end = len(example.token_ids) - 1
        input_ids[row, :end], labels[row, :end] = shifted(example)
    return _lm_batch(input_ids, labels, examples, None)


def collate_packed(examples: Sequence[Example], *, pad_id: int, share_prefix: bool = True) -> LMBatch:
    """All examples end to end in one row, so that only attention sees padding; the last few tokens fill up `WIDTHS`.

    With `share_prefix`, the tokens without a target that all examples begin with, such as the preamble of a template,
    are stored once. Losses and gradients are the same without dropout; with it, examples would share its draws.
    """
    n_shared = shared_prefix(examples) if share_prefix else 0
    shares = [(0, n_shared if row else 0) for row in range(len(examples))]  # the first example brings the shared tokens
    laid = laid_out([example.token_ids[:-1] for example in examples], shares, pad_id)
    labels = torch.full_like(laid.input_ids, IGNORE_INDEX)
    for row, (example, (_, skipped)) in enumerate(zip(examples, shares, strict=True)):
        _, targets = shifted(example)
        labels[0, laid.rows[row, skipped : len(targets)]] = targets[skipped:]
    return _lm_batch(laid.input_ids, labels, examples, laid.packing(_wanted(labels[0])))


def packed_length(examples: Sequence[Example], *, share_prefix: bool = True) -> int:
    """Number of tokens that `collate_packed` lays out."""
    saved = (len(examples) - 1) * shared_prefix(examples) if share_prefix else 0
    return sum(len(example.token_ids) - 1 for example in examples) - saved


def shared_prefix(examples: Sequence[Example]) -> int:
    """Number of tokens that all examples begin with, up to the first target of any."""
    if len(examples) < 2:
        return 0
    shared = min(int(example.label_mask.argmax()) for example in examples)
    return common_prefix([example.token_ids[:shared] for example in examples])


def _wanted(labels: Tensor) -> Tensor:
    """The positions that have a target, filled up with others to a multiple of `WIDTHS`."""
    targets, others = (labels != IGNORE_INDEX).nonzero()[:, 0], (labels == IGNORE_INDEX).nonzero()[:, 0]
    return torch.cat([targets, others[: rounded(max(len(targets), 1)) - len(targets)]])


def _lm_batch(input_ids: Tensor, labels: Tensor, examples: Sequence[Example], packing: Packing | None) -> LMBatch:
    n_targets = sum(example.n_targets for example in examples)
    return LMBatch(input_ids, labels, n_targets, tuple(example.sample_id for example in examples), packing)


class ClassificationBatch(NamedTuple):
    """Whole sequences, each with its class."""

    input_ids: Tensor
    """(B, T) int64, padded on the right."""
    lengths: Tensor
    """(B,) int64: tokens of each row that are no padding, at least 1."""
    labels: Tensor
    """(B,) int64 class index, IGNORE_INDEX for the dummy row of an empty batch."""
    n_targets: int
    """Labelled rows; known on the CPU."""
    sample_ids: tuple[int, ...]
    """Name the samples in error messages, and are compared on resume: for records, their index in the split."""


class LabelledSample(NamedTuple):
    """One text before collation."""

    sample_id: int
    token_ids: np.ndarray
    """(n,)."""
    label: int

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


def collate_classification(
    samples: Sequence[LabelledSample], *, pad_id: int, pad_to: int | None = None, most: int | None = None
) -> ClassificationBatch:
    """One row per text, padded on the right to `pad_to` tokens, else to the longest text.

    With `most`, the width of the longest is rounded up to a multiple of `WIDTHS` within it. Without samples (a process
    that ran out of data before the others) the batch is one row of pads without a label.
    """
    width = max((len(sample.token_ids) for sample in samples), default=1)
    if most is not None:
        width = min(rounded(width), most)
    input_ids = torch.full((max(len(samples), 1), pad_to or width), pad_id, dtype=torch.int64)
    lengths = torch.ones(len(input_ids), dtype=torch.int64)
    labels = torch.full_like(lengths, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        lengths[row], labels[row] = len(sample.token_ids), sample.label
        input_ids[row, : len(sample.token_ids)] = torch.from_numpy(sample.token_ids.astype(np.int64))
    return ClassificationBatch(input_ids, lengths, labels, len(samples), tuple(s.sample_id for s in samples))
