"""The learning rate as a pure function of the step: `scheduler=NAME` is one of these classes.

`lr_at(step, peak_lr, total_steps)` is the rate of update `step`, counted from 0. A run that is made longer on resume
computes the rest of its rates from its new length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LONGER = "train longer (trainer.max_epochs, trainer.max_steps)"


class ScheduleConfig:
    """A schedule: the rate of each step, and how many steps are warmup."""

    def check(self, total_steps: int) -> None:
        """Refuse a schedule that does not fit into a run of `total_steps`.

        Raises:
            ValueError: naming the setting to change.
        """
        self.warmup_steps(total_steps)

    def warmup_steps(self, total_steps: int) -> int:
        """Number of warmup steps in a run of `total_steps`."""
        return 0

    def lr_at(self, step: int, peak_lr: float, total_steps: int) -> float:
        """The rate of update `step` (0-based)."""
        raise NotImplementedError

    def note_on_restart(self) -> str:
        """What to add where a resumed run says that its rate is not the one that the checkpoint had planned."""
        return ""


@dataclass(frozen=True)
class ConstantConfig(ScheduleConfig):
    """The same rate at every step."""

    def lr_at(self, step: int, peak_lr: float, total_steps: int) -> float:
        return peak_lr


@dataclass(frozen=True)
class WarmupConfig(ScheduleConfig):
    """A linear warmup from `initial_lr` to the peak, and what follows it.

    `warmup`: below 1, a fraction of all steps; otherwise a number of steps. 0 switches it off.
    """

    initial_lr: float = 1e-5
    warmup: float = 0.1

    def __post_init__(self) -> None:
        _check("initial_lr", self.initial_lr)
        _check_steps("warmup", self.warmup)

    def warmup_steps(self, total_steps: int) -> int:
        steps = _steps(self.warmup, total_steps)
        if steps >= total_steps:
            raise ValueError(
                f"scheduler.warmup={self.warmup:g} is {steps} warmup steps, but the run has only {total_steps}; "
                f"lower scheduler.warmup or {LONGER}"
            )
        return steps

    def lr_at(self, step: int, peak_lr: float, total_steps: int) -> float:
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return self.initial_lr + step * (peak_lr - self.initial_lr) / warmup
        return self.after_warmup(step, peak_lr, total_steps)

    def after_warmup(self, step: int, peak_lr: float, total_steps: int) -> float:
        """The rate of update `step`, which is not of the warmup; also after the last step."""
        raise NotImplementedError

    def progress(self, step: int, total_steps: int) -> float:
        """The share of the steps after the warmup that come before `step`: 0 to 1."""
        warmup = self.warmup_steps(total_steps)
        return min(1.0, (step - warmup) / (total_steps - warmup))


@dataclass(frozen=True)
class WarmupCosineConfig(WarmupConfig):
    """Half a cosine from the peak down to `min_lr` (the book's Appendix D)."""

    min_lr: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("min_lr", self.min_lr)

    def after_warmup(self, step: int, peak_lr: float, total_steps: int) -> float:
        progress = self.progress(step, total_steps)
        return self.min_lr + 0.5 * (peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearConfig(WarmupConfig):
    """A straight line from the peak to `min_lr`, which it would reach one step after the last."""

    min_lr: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("min_lr", self.min_lr)

    def after_warmup(self, step: int, peak_lr: float, total_steps: int) -> float:
        return peak_lr + (self.min_lr - peak_lr) * self.progress(step, total_steps)


@dataclass(frozen=True)
class WSDConfig(WarmupConfig):
    """Warmup, stable, decay (Hu et al. 2024, "MiniCPM"): the peak until the last `decay` steps, then down to `min_lr`.

    Until the decay begins no rate depends on the length of the run, if `warmup` is a number of steps.

    `decay`: below 1, a fraction of all steps; otherwise a number of steps. 0 switches it off. `decay_shape` is `linear`
    or `1-sqrt` (Hägele et al. 2024), which falls fast at first.
    """

    min_lr: float = 0.0
    decay: float = 0.2
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("min_lr", self.min_lr)
        _check_steps("decay", self.decay)
        if self.decay_shape not in ("linear", "1-sqrt"):
            raise ValueError(f"scheduler.decay_shape={self.decay_shape!r} must be linear or 1-sqrt")

    def check(self, total_steps: int) -> None:
        warmup, decay = self.warmup_steps(total_steps), self.decay_steps(total_steps)
        if warmup + decay > total_steps:
            raise ValueError(
                f"scheduler.warmup={self.warmup:g} and scheduler.decay={self.decay:g} are {warmup} + {decay} steps, "
                f"but the run has only {total_steps}; lower one of them or {LONGER}"
            )

    def note_on_restart(self) -> str:
        return (
            "; to end as one long run would, make a run longer before its decay begins, with scheduler.warmup as a "
            "number of steps"
        )

    def decay_steps(self, total_steps: int) -> int:
        """Number of decay steps in a run of `total_steps`."""
        return _steps(self.decay, total_steps)

    def after_warmup(self, step: int, peak_lr: float, total_steps: int) -> float:
        decay = self.decay_steps(total_steps)
        done = step - (total_steps - decay)
        if done <= 0:
            return peak_lr
        progress = min(1.0, done / decay) if decay else 0.0
        remaining = 1 - math.sqrt(progress) if self.decay_shape == "1-sqrt" else 1 - progress
        return self.min_lr + (peak_lr - self.min_lr) * remaining


@dataclass(frozen=True)
class InverseSqrtConfig(WarmupConfig):
    """After the warmup, the peak times sqrt(warmup steps / step) (Vaswani et al. 2017, section 5.3).

    No rate depends on the length of the run, if `warmup` is a number of steps.
    """

    def check(self, total_steps: int) -> None:
        if self.warmup_steps(total_steps) < 1:
            raise ValueError(
                f"scheduler.warmup={self.warmup:g} is no step of {total_steps}, and scheduler=inverse_sqrt needs one: "
                "its rate is the peak times sqrt(warmup steps / step)"
            )

    def after_warmup(self, step: int, peak_lr: float, total_steps: int) -> float:
        return peak_lr * math.sqrt(self.warmup_steps(total_steps) / step)


def _check(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"scheduler.{name}={value} must not be negative")


def _check_steps(name: str, value: float) -> None:
    _check(name, value)
    if value >= 1 and value != int(value):
        raise ValueError(f"scheduler.{name}={value} must be a fraction below 1 or a whole number of steps")


def _steps(value: float, total_steps: int) -> int:
    """A fraction of all steps, or a number of steps, as a number of steps."""
    return int(value) if value >= 1 else round(value * total_steps)
