"""Sequences end to end in one row; a shared prefix is stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.models.attention import Packing

WIDTHS = 8
"""Widths of batches are multiples of this: a CPU compiles and keeps kernels for each new width, and tensor cores want
multiples of 8."""


class Laid(NamedTuple):
    """Sequences end to end; for the fields see `Packing`."""

    input_ids: Tensor
    """(1, N)"""
    rows: Tensor
    places: Tensor
    positions: Tensor

    def packing(self, output_positions: Tensor) -> Packing:
        return Packing(self.rows, self.places, self.positions, output_positions)


def laid_out(sequences: Sequence[np.ndarray], shares: Sequence[tuple[int, int]], pad_id: int) -> Laid:
    """Lay sequences end to end in one row, without the first tokens that a sequence takes from an earlier one.

    Args:
        sequences: (n,) ids each; none: one pad.
        shares: for each sequence, (index of the earlier one, number of tokens taken from it).
    """
    sequences, shares = sequences or [np.array([pad_id])], shares or [(0, 0)]
    width = rounded(max(map(len, sequences)))
    total = rounded(sum(len(ids) - shared for ids, (_, shared) in zip(sequences, shares, strict=True)))
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
    return Laid(input_ids, rows, places, positions)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Number of tokens that all sequences begin with."""
    first = sequences[0]
    shared = min(map(len, sequences))
    for ids in sequences[1:]:
        differ = first[:shared] != ids[:shared]
        shared = int(differ.argmax()) if differ.any() else shared
    return shared


def rounded(length: int) -> int:
    """`length` rounded up to a multiple of `WIDTHS`."""
    return -(-length // WIDTHS) * WIDTHS


def may_share_prefix(model: Mapping[str, Any], lora: Mapping[str, Any] | None) -> bool:
    """Whether a shared prefix may be computed once: dropout would give all sequences the same draws.

    Args:
        model, lora: the fields of `GPTConfig` and `LoRAConfig`.
    """
    dropouts = [model.get(f"{place}_dropout") for place in ("embedding", "attention", "residual")]
    return not any(dropouts) and not (lora and lora.get("dropout"))
