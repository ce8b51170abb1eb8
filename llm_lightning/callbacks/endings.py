"""Why a run ended before its last step, and whether the same command continues it.

A time limit counts from each start, and a run that it ended continues. Early stopping ends a run for good, unless the
present settings (its patience, above all) would not have stopped it. Present settings win over those in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

TIME, EARLY, OTHER = "time", "early_stopping", "other"


def stopped_by(trainer: L.Trainer, total_steps: int) -> str | None:
    """The reason why a trainer stops before its last step, one of the names above; None if it does not."""
    if not trainer.should_stop or trainer.global_step >= total_steps:
        return None
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, EarlyStopping) and c.stopping_reason != EarlyStoppingReason.NOT_STOPPED for c in callbacks):
        return EARLY
    remaining = [c.time_remaining() for c in callbacks if isinstance(c, Timer)]
    return TIME if any(left is not None and left <= 0 for left in remaining) else OTHER


def stays_stopped(checkpoint: Mapping[str, Any], callbacks: Sequence[L.Callback]) -> bool:
    """Whether the present settings would also have stopped the run of `checkpoint`, which was stopped early."""
    states = checkpoint["callbacks"]
    reason = checkpoint.get("stopped_by") or _guessed(states)
    if reason != EARLY:
        return reason == OTHER
    metrics = checkpoint["llm_lightning"].get("metrics", {})
    watching = [c for c in callbacks if isinstance(c, EarlyStopping) and c.state_key in states]
    return any(_stops(c, states[c.state_key], metrics.get(c.monitor)) for c in watching)


def forget_limits(checkpoint: Mapping[str, Any], callbacks: Sequence[L.Callback]) -> None:
    """Remove from a checkpoint the time limits and the patience, which would override the present settings."""
    states = checkpoint["callbacks"]
    for callback in callbacks:
        if isinstance(callback, Timer):
            states.pop(callback.state_key, None)
        elif isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


def start_again(callbacks: Sequence[L.Callback]) -> None:
    """Reset that early stopping has stopped, but keep how long it has waited."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            callback.stopping_reason, callback.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
            callback.stopped_epoch = 0


def _guessed(states: Mapping[str, Any]) -> str:
    """The reason of a stop in checkpoints of earlier versions, which did not store it."""
    early = [state for state in states.values() if isinstance(state, Mapping) and "wait_count" in state]
    if any(_reason(state) != EarlyStoppingReason.NOT_STOPPED for state in early):
        return EARLY
    return TIME if "Timer" in states else OTHER


def _reason(state: Mapping[str, Any]) -> EarlyStoppingReason:
    saved = EarlyStoppingReason(state.get("stopping_reason", EarlyStoppingReason.NOT_STOPPED.value))
    is_out = saved == EarlyStoppingReason.NOT_STOPPED and state["wait_count"] >= state["patience"]
    return EarlyStoppingReason.PATIENCE_EXHAUSTED if is_out else saved


def _stops(callback: EarlyStopping, state: Mapping[str, Any], last: float | None) -> bool:
    """Whether early stopping with its present settings would stop a run again; `last` is the metric at that time."""
    reason, value = _reason(state), torch.tensor(float("nan") if last is None else last)
    if reason == EarlyStoppingReason.NON_FINITE_METRIC:
        return callback.check_finite
    if reason == EarlyStoppingReason.STOPPING_THRESHOLD:
        limit = callback.stopping_threshold
        return limit is not None and bool(callback.monitor_op(value, limit))
    if reason == EarlyStoppingReason.DIVERGENCE_THRESHOLD:
        limit = callback.divergence_threshold
        return limit is not None and bool(callback.monitor_op(-value, -limit))
    return reason == EarlyStoppingReason.PATIENCE_EXHAUSTED and state["wait_count"] >= callback.patience
