"""Rotary position embedding (Su et al. 2021): a query or key at position p is rotated by angles proportional to p.

Component i of a head is rotated together with component i + D / 2, as in transformers' layout of weights. Tables and
rotation are in float32 at least, whatever the type of the weights: in bfloat16 the angles of far positions are wrong.

Tensor letters: B batch, T time, H heads, D head width.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**18
"""Elements that are rotated at once by each thread: 1 MB in float32."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of slow rotations beyond the context of pretraining.

    Args:
        factor: by which rotations slower than `low_freq_factor` turns per original context become slower.
        low_freq_factor, high_freq_factor: turns per original context; between the two the factor is interpolated, and
            faster rotations stay as they are.
        original_context_length: of pretraining, in tokens.

    Raises:
        ValueError: if a value is not a positive number, or the two limits are in the wrong order.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"model.rope_scaling.{field.name}={reprlib.repr(value)} must be a positive number")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


class Rotation(NamedTuple):
    """The angles of some positions, float32. Heads come before time: (..., 1, T, D)."""

    cos: Tensor
    sin: Tensor
    """Negative for the first D / 2 components of a head: y = x cos + (x with its halves swapped) sin."""


def rotation(positions: Tensor, width: int, theta: float, scaling: RopeScaling | None = None) -> Rotation:
    """The rotation at `positions` (..., T) of heads of `width` D, which is even."""
    angles = positions[..., None].float() * frequencies(width, theta, scaling, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), dim=-1).unsqueeze(-3), torch.cat((-sin, sin), dim=-1).unsqueeze(-3))


def frequencies(
    width: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles per position, (D / 2,) float32: theta^(-2 i / D), the slow ones stretched by `scaling`."""
    exponents = torch.arange(0, width, 2, device=device).float() / width
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    turns = scaling.original_context_length * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotate(heads: Tensor, by: Rotation, n: int) -> Tensor:
    """Rotate the first `n` of the heads, (B, H, T, D); the others are copied."""
    if not torch.is_grad_enabled() and heads.numel() <= BLOCK_ELEMENTS:  # in generation every call counts
        return torch.cat((_turned(heads[:, :n], by.cos, by.sin).to(heads.dtype), heads[:, n:]), dim=1)
    rotated: Tensor = _Rotate.apply(heads, by.cos, by.sin, n)
    return rotated


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so that nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.n = n
        return _rotated(heads, cos, sin, n, heads.new_empty(heads.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        b, h, t, d = gradient.shape
        by_time = gradient.new_empty((b, t, h, d)).transpose(1, 2)  # as the projection before it wants it
        return _rotated(gradient, cos, -sin, ctx.n, by_time), None, None, None


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, n: int, out: Tensor) -> Tensor:
    """Fill `out`; the wide copies are of a few positions at a time, which stay in the cache."""
    out[:, n:] = heads[:, n:]
    step = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // max(1, heads[:, :n, :1].numel()))
    blocks = (one.split(step, dim=-2) for one in (heads[:, :n], cos, sin, out[:, :n]))
    for block, cos_of, sin_of, target in zip(*blocks, strict=True):
        target.copy_(_turned(block, cos_of, sin_of))
    return out


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = heads.to(torch.promote_types(heads.dtype, cos.dtype), memory_format=torch.contiguous_format)
    return (wide * cos).add_(wide.roll(heads.size(-1) // 2, -1).mul_(sin))
