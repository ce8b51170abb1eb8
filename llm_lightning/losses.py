"""Losses: pure functions of tensors. Labels arrive already shifted (see `data/batches.py`); none is shifted here.

Tensor letters: B batch, T time, C width, V vocabulary, N positions that have a target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that has no target: prompt, padding, or beyond the end of the data."""


def causal_lm_loss(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over all targets, in nats.

    The head runs only on positions that have a target.

    Args:
        hidden: (B, T, C) trunk output.
        head_weight: (V, C).
        labels: (B, T) int64, shifted, IGNORE_INDEX where there is no target.

    Returns:
        (), float32; divide by the number of targets for the mean.
    """
    keep = labels != IGNORE_INDEX
    logits = F.linear(hidden[keep], head_weight)  # (N, V)
    return F.cross_entropy(logits.float(), labels[keep], reduction="sum")
