"""Llama 3's scaling of rotary positions in GGUF: not its four numbers, but a factor per frequency, `rope_freqs.weight`.

Llama.cpp divides each frequency by its factor. The factors are a function of three numbers: `factor`, and the two
limits as wavelengths, original_context_length / low_freq_factor and original_context_length / high_freq_factor. So the
four numbers are recovered up to a common multiple of the last three, which changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llm_lightning.models.rope import RopeScaling, frequencies

_TOLERANCE = 1e-5  # relative; the factors are float32, and each program rounds in its own order
_RELEASED = (1.0, 4.0, 8192)
"""`low_freq_factor`, `high_freq_factor` and `original_context_length` of all Llama 3 releases."""


def factors_of(width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The factor of each frequency, (D / 2,) float32."""
    return frequencies(width, theta) / frequencies(width, theta, scaling)


def scaling_of(factors: Tensor, width: int, theta: float) -> RopeScaling | None:
    """The scaling with these factors, (D / 2,); None if all are 1.

    Raises:
        ValueError: if they are those of another scaling.
    """
    if torch.equal(factors, torch.ones_like(factors)):
        return None
    if bool((factors >= 1).all()) and factors.shape == (width // 2,):
        for scaling in _candidates(factors, frequencies(width, theta)):
            if torch.allclose(factors_of(width, theta, scaling), factors, rtol=_TOLERANCE, atol=0):
                return scaling
    raise ValueError(
        "the factors in rope_freqs.weight are not those of Llama 3's scaling of rotary positions, the only one that is "
        "implemented"
    )


def _candidates(factors: Tensor, plain: Tensor) -> Iterator[RopeScaling]:
    """Scalings with the largest of the factors: the releases', and the one on the line through two factors between.

    Between the limits, 1 / factor is a linear function of the turns per token.
    """
    factor = float(str(factors.max().numpy()))
    yield RopeScaling(factor, *_RELEASED)
    between = (factors > 1) & (factors < factors.max())
    if between.sum() < 2:
        return
    kept = (1 / factors[between].double() - 1 / factor) / (1 - 1 / factor)
    turns = plain[between].double() / (2 * math.pi)
    slope = (kept[0] - kept[-1]) / (turns[0] - turns[-1])
    offset = kept[0] - slope * turns[0]  # kept = (original * turns - low) / (high - low), here with low = 1
    if offset < 0 < slope:
        yield RopeScaling(factor, 1.0, round(float(1 - 1 / offset), 4), round(float(-slope / offset)))
