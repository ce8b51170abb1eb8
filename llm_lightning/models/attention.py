"""Everything about attention but its weights: the context of a forward pass, key-value cache, packing, kernels.

Tensor letters: B batch, T time (new positions), S all positions attended to, H query heads, KV key and value heads,
D head width; of packed rows N tokens, G sequences, M tokens whose hidden states are returned.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_lightning.models.rope import Rotation


class KVCache:
    """Keys and values of the positions seen so far, allocated once.

    `keys[layer]` and `values[layer]` are (B, KV, capacity, D); the first `length` positions are filled.

    Args:
        n_layer: number of layers.
        shape: (B, KV, capacity, D).
    """

    def __init__(
        self, n_layer: int, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        # Zeros: a kernel may read beyond the last position that it was given, and nan times zero is nan.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.capacity = shape[2]
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, KV, T, D) keys and values; return all of them, (B, KV, S, D)."""
        end = self.length + key.size(2)
        assert end <= self.capacity, f"{end} positions exceed the cache's capacity of {self.capacity}"
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, (new B,) int64."""
        self.keys = [self._kept(key, rows) for key in self.keys]
        self.values = [self._kept(value, rows) for value in self.values]

    def _kept(self, old: Tensor, rows: Tensor) -> Tensor:
        new = old.new_zeros((len(rows), *old.shape[1:]))
        new[:, :, : self.length] = old[rows, :, : self.length]  # the rest is zero in both
        return new


class Packing(NamedTuple):
    """Sequences laid end to end in one row of N tokens, without padding between them.

    Linear layers and norms process the N tokens; attention gives every sequence a row of its own, G rows of T places.
    No sequence sees another one, the result equals that of padded rows, and no mask is needed. A prefix that several
    sequences share is stored once among the N tokens and indexed by several rows.
    """

    rows: Tensor
    """(G, T) int64: which of the N tokens is at each place of each sequence; places past its end are ignored."""
    places: Tensor
    """(N,) int64: the flat index into the (G, T) places at which each token's result is read back."""
    positions: Tensor
    """(N,) int64: the position of each token in its sequence, from 0."""
    output_positions: Tensor
    """(M,) int64: the tokens whose hidden states are returned."""

    def spread(self, x: Tensor) -> Tensor:
        """(1, N, C) -> (G, T, C): each sequence in a row of its own."""
        rows: Tensor = _SpreadRows.apply(x[0], self.rows.flatten())
        return rows.unflatten(0, self.rows.shape)

    def gather(self, x: Tensor, output_positions: Tensor | None = None) -> Tensor:
        """(G, T, C) -> (1, N, C), or of the tokens at `output_positions` alone (1, M, C): the inverse of `spread`."""
        places = self.places if output_positions is None else self.places[output_positions]
        return x.flatten(0, 1).index_select(0, places).unsqueeze(0)


class _SpreadRows(torch.autograd.Function):
    """index_select of rows, whose gradient is summed in float32 where a row is taken more than once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        summed = torch.zeros(ctx.n_rows, gradient.size(1), dtype=dtype, device=gradient.device)
        return summed.index_add_(0, index, gradient.to(dtype)).to(gradient.dtype), None


class Context(NamedTuple):
    """Everything about a batch but its tokens, in one argument from the model down to its attention layers."""

    mask: Tensor | None = None
    """bool, broadcast to (B, H, T, S), True = may attend; None: causal, which hides right padding too."""
    positions: Tensor | None = None
    """(B, T) or (T,) int64; None: 0..T-1, or the positions that follow the cache."""
    cache: KVCache | None = None
    """Keys and values of earlier positions; extended in place."""
    packing: Packing | None = None
    """The (1, N) ids are several sequences end to end."""
    output_positions: Tensor | None = None
    """The positions whose hidden states are returned: (B,), one of each row, with a mask (B, 1, 1, T); or (M,) of
    packed tokens. None: all. The last block computes its MLP for these alone."""

    rotation: Rotation | None = None
    """Of rotary positions; the model computes it once for all of its blocks."""

    @classmethod
    def of(cls, packing: Packing | None) -> Context:
        """The context of a batch that may be packed."""
        if packing is None:
            return CAUSAL
        return cls(positions=packing.positions, packing=packing, output_positions=packing.output_positions)

    def select(self, x: Tensor) -> Tensor:
        """(B, T, C) -> x at the output positions: all of it, (B, 1, C), or with packing (1, M, C)."""
        if self.output_positions is None:
            return x
        if self.packing is not None:
            return x.index_select(1, self.output_positions)
        return x[torch.arange(len(x), device=x.device), self.output_positions].unsqueeze(1)


CAUSAL = Context()
"""Unpacked sequences from their start; each position attends to itself and earlier ones."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by the faster of two kernels.

    Args:
        query: (B, H, T, D), the last T of the S positions; key, value: (B, KV, S, D), each head for H / KV query heads.
        mask: bool, broadcast to (B, 1, T, S), True = may attend; None: causal.
        dropout: of the attention weights.

    Returns:
        (B, H, T, D).
    """
    # A single new position may attend to everything before it: no mask. Several new positions behind a filled cache
    # need an explicit one, because SDPA's is_causal aligns the triangle to the top left corner.
    is_causal = mask is None and query.size(2) > 1
    explicit = explicit_is_faster(query)
    if is_causal and (explicit or key.size(2) > query.size(2)):
        mask, is_causal = causal_mask(query.size(2), key.size(2), query.device), False
    if explicit:
        return attend_explicitly(query, key, value, mask, dropout)[0]
    is_grouped = query.size(1) != key.size(1)
    if is_grouped and query.size(2) == 1:
        # One new position: the query heads of a group attend to the same keys, as positions of one head would.
        folded = query.unflatten(1, (key.size(1), -1)).squeeze(3)  # (B, KV, H / KV, D)
        return F.scaled_dot_product_attention(folded, key, value, mask, dropout).flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, enable_gqa=is_grouped)


def attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`attend` written out; without a mask every position attends to every other one (it is not causal).

    Returns:
        (B, H, T, D) and the attention weights (B, H, T, S) before dropout.
    """
    # The query heads of a group are further rows beside their keys: nothing is repeated.
    rows = (query * query.size(-1) ** -0.5).unflatten(1, (key.size(1), -1)).flatten(2, 3)  # (B, KV, H / KV T, D)
    scores = (rows @ key.transpose(-2, -1)).view(*query.shape[:3], -1)  # (B, H, T, S)
    if mask is not None:
        # Added rather than filled in: one small tensor for all heads, and nothing kept for the backward pass.
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    mixing = F.dropout(weights, dropout) if dropout else weights
    mixed = mixing.unflatten(1, (key.size(1), -1)).flatten(2, 3) @ value  # (B, KV, H / KV T, D)
    return mixed.view(query.shape), weights


def explicit_is_faster(query: Tensor) -> bool:
    """Whether `attend_explicitly` beats SDPA: in bf16 on a CPU it takes half of the time at T=256, a quarter at T=128.

    Beyond 512 positions the gain is small, and the weights that are kept for the backward pass grow with T squared.
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and 1 < query.size(2) <= 512


def causal_mask(new: int, total: int, device: torch.device | str) -> Tensor:
    """Bool (new, total): the last `new` of `total` positions, each attends to itself and earlier ones."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
