"""Losses: pure functions of tensors. Labels arrive already shifted (see `data/batches.py`); none is shifted here.

Tensor letters: B batch, T time, C width, V vocabulary, N positions that have a target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that has no target: prompt, padding, or beyond the end of the data."""

CHUNK_POSITIONS = 1024
"""Positions whose logits exist at once: 100 MB in bfloat16 with GPT-2's vocabulary, however large the batch."""

BLOCK_TOKENS = 16384
"""Rows of the head whose gradient is computed at once: a CPU then takes a sixth less time than for all together."""


def causal_lm_loss(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over all targets, in nats.

    The head runs only on positions that have a target, `CHUNK_POSITIONS` at a time, and its gradient is taken in the
    forward pass while the logits are at hand: neither logits nor probabilities are kept or computed twice.

    Args:
        hidden: (B, T, C) trunk output.
        head_weight: (V, C).
        labels: (B, T) int64, shifted, IGNORE_INDEX where there is no target.

    Returns:
        (), float32 (float64 for float64 input); divide by the number of targets for the mean.
    """
    keep = labels != IGNORE_INDEX
    loss: Tensor = _HeadLoss.apply(hidden[keep], head_weight, labels[keep])
    return loss


class _HeadLoss(torch.autograd.Function):
    """The head and its cross-entropy as one differentiable step: (N, C), (V, C), (N,) -> ()."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        matrix = weight.to(dtype)
        loss = torch.zeros((), dtype=_exact(hidden.dtype), device=hidden.device)
        for start in range(0, max(1, len(labels)), CHUNK_POSITIONS):  # no target at all: one empty chunk, zeros
            chunk = slice(start, start + CHUNK_POSITIONS)
            inputs = hidden[chunk].to(dtype)
            logits = _aligned_logits(inputs, matrix)
            loss += _loss_to_gradient(logits, labels[chunk])
            if hidden_grad is not None:
                hidden_grad[chunk] = logits @ matrix
            if weight_grad is not None:
                for block, columns in zip(weight_grad.split(BLOCK_TOKENS), logits.split(BLOCK_TOKENS, 1), strict=True):
                    part = columns.T @ inputs
                    block.copy_(part) if start == 0 else block.add_(part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if scale.device.type == "cpu" and scale == 1:  # as in training; asking a GPU would make the CPU wait for it
            return hidden_grad, weight_grad, None
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * scale.to(weight_grad.dtype),
            None,
        )


def _aligned_logits(inputs: Tensor, matrix: Tensor) -> Tensor:
    """(N, C), (V, C) -> (N, V), each row starting on a cache line.

    GPT-2's odd 50,257 columns otherwise make the products with the logits slower on CPU and GPU.
    """
    columns = len(matrix)
    buffer = inputs.new_empty(len(inputs), -(-columns // 64) * 64)
    return torch.mm(inputs, matrix.T, out=buffer[:, :columns])


def _loss_to_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Overwrite `logits` (N, V) with the gradient of their summed cross-entropy, softmax - one-hot; return that sum.

    On the CPU 32 rows at a time, so that the float32 copy stays in the cache.
    """
    rows = 32 if logits.device.type == "cpu" else len(labels)
    loss = torch.zeros((), dtype=_exact(logits.dtype), device=logits.device)
    for block, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
        exact = block.to(loss.dtype)
        probabilities = exact.softmax(dim=-1)
        # log(sum(exp(x))) = max(x) - log(max(softmax(x))): no second exponential, and nothing that can underflow.
        log_normalizer = exact.amax(dim=-1) - probabilities.amax(dim=-1).log()
        loss += (log_normalizer - exact.gather(1, targets)[:, 0]).sum()
        block.copy_(probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0)))
    return loss


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type in which probabilities are computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)
