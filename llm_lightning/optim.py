"""Optimizer and learning-rate schedule: weight-decay groups, and the rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019) and gradient clipping.

    `lr` is the peak rate; a schedule scales it. `decay` is `matrices` (no weight decay on biases and norms, as GPT-2
    and GPT-3 were trained) or `all` (PyTorch's default, and the book's).
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "matrices"
    fused: bool | str = "auto"
    max_grad_norm: float | None = 1.0
    clip_after_warmup: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr={self.lr} must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optimizer.betas={list(self.betas)} must be two numbers from 0 to below 1, such as [0.9, 0.95]"
            )
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps={self.eps} must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must not be negative")
        if self.decay not in ("matrices", "all"):
            raise ValueError(f"optimizer.decay={self.decay!r} must be matrices or all")
        if self.fused not in (True, False, "auto"):
            raise ValueError(f"optimizer.fused={self.fused!r} must be auto, true or false")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"optimizer.max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping")

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, fused: bool) -> torch.optim.AdamW:
        """AdamW over the trainable parameters; its state holds every parameter's name."""
        trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        decayed = [pair for pair in trainable if self.decay == "all" or pair[1].dim() >= 2]
        undecayed = [pair for pair in trainable if not (self.decay == "all" or pair[1].dim() >= 2)]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decayed, self.weight_decay), (undecayed, 0.0))
            if group
        ]
        if not groups:
            raise ValueError("nothing to train: every parameter is frozen")
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=fused)


@dataclass(frozen=True)
class WarmupCosineConfig:
    """Linear warmup from `initial_lr` to the peak, then half a cosine down to `min_lr` (the book's Appendix D).

    `warmup`: below 1, a fraction of all steps; otherwise a number of steps. 0 switches it off.
    """

    initial_lr: float = 1e-5
    min_lr: float = 1e-5
    warmup: float = 0.1

    def __post_init__(self) -> None:
        for name in ("initial_lr", "min_lr", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"scheduler.{name}={getattr(self, name)} must not be negative")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"scheduler.warmup={self.warmup} must be a fraction below 1 or a whole number of steps")

    def warmup_steps(self, total_steps: int) -> int:
        """Number of warmup steps in a run of `total_steps`."""
        steps = int(self.warmup) if self.warmup >= 1 else round(self.warmup * total_steps)
        if steps >= total_steps:
            raise ValueError(
                f"scheduler.warmup={self.warmup:g} is {steps} warmup steps, but the run has only {total_steps}; "
                "lower scheduler.warmup or train longer (trainer.max_epochs, trainer.max_steps)"
            )
        return steps

    def lr_at(self, step: int, peak_lr: float, total_steps: int) -> float:
        """The rate of update `step` (0-based)."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return self.initial_lr + step * (peak_lr - self.initial_lr) / warmup
        progress = min(1.0, (step - warmup) / (total_steps - warmup))
        return self.min_lr + 0.5 * (peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class ConstantConfig:
    """The same rate at every step."""

    def warmup_steps(self, total_steps: int) -> int:
        return 0

    def lr_at(self, step: int, peak_lr: float, total_steps: int) -> float:
        """The rate of update `step`: always the peak."""
        return peak_lr


ScheduleConfig = WarmupCosineConfig | ConstantConfig


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
    if hasattr(total, "full_tensor"):  # FSDP2: the norm of sharded gradients is sharded too
        total = total.full_tensor()
    norm = total.item() * scale
    if max_norm is not None:
        scale *= min(1.0, max_norm / (norm + 1e-6))  # 1e-6: as torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_(gradients, scale)
    return norm
