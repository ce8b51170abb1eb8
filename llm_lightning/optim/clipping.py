"""Scale and clip gradients in one multiplication."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from llm_lightning.models.sharding import whole


@torch.no_grad()
def scale_and_clip_gradients(parameters: Iterable[nn.Parameter], scale: float, max_norm: float | None) -> float:
    """Multiply every gradient by `scale`, then clip the global norm to `max_norm`, in one multiplication.

    Returns:
        the norm after scaling and before clipping; inf or nan where a gradient is not finite.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    total = torch.nn.utils.get_total_norm(gradients)
    norm = whole(total).item() * scale  # of sharded gradients, each process has the norm of its parts
    if max_norm is not None:
        scale *= min(1.0, max_norm / (norm + 1e-6))  # 1e-6: as torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_(gradients, scale)
    return norm
