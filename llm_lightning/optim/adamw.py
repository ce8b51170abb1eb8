"""AdamW (Loshchilov and Hutter 2019): `optimizer=adamw`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llm_lightning.optim.base import Named, OptimizerConfig, is_fused, trainable


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW and gradient clipping; see `OptimizerConfig`."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adamw(self.betas, self.eps, self.weight_decay, self.fused)

    def build(
        self,
        named_parameters: Iterable[Named],
        *,
        is_scaled: bool = False,
        is_sharded: bool = False,
        qkv_rows: tuple[int, int, int] | None = None,
    ) -> torch.optim.AdamW:
        decayed, undecayed = self.by_decay(trainable(named_parameters))
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decayed, self.weight_decay), (undecayed, 0.0))
            if group
        ]
        fused = is_fused(self.fused, is_scaled=is_scaled, is_sharded=is_sharded)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=fused)


def check_adamw(betas: tuple[float, float], eps: float, weight_decay: float, fused: bool | str) -> None:
    """Refuse values out of range."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas={list(betas)} must be two numbers from 0 to below 1, such as [0.9, 0.95]")
    if eps <= 0:
        raise ValueError(f"optimizer.eps={eps} must be positive")
    if weight_decay < 0:
        raise ValueError(f"optimizer.weight_decay={weight_decay} must not be negative")
    if fused not in (True, False, "auto"):
        raise ValueError(f"optimizer.fused={fused!r} must be auto, true or false")
