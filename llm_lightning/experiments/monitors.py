"""Metrics that the settings name: which are better when large, and whether anything logs them; before training."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, open_dict

from llm_lightning.callbacks.monitored import better_when
from llm_lightning.data.base import BaseDataModule
from llm_lightning.tasks.base import TaskModule

PROGRESS = ("loss", "val_loss")
"""Logged for the progress bar, under names of its own."""


def fill_modes(cfg: DictConfig, settings: dict[str, Any]) -> None:
    """Replace every `mode` that is null by `min` or `max`, as its metric says it; null stays where it does not.

    A callback that watches the run's own metric follows `monitor_mode`. A callback of Lightning's, whose own default
    is `min` for whatever it watches, is given its mode, too.

    Args:
        cfg, settings: the configuration, composed and resolved; both are filled.

    Raises:
        ValueError: if a mode is neither `min`, `max` nor null.
    """
    if cfg.monitor_mode not in ("min", "max", None):
        raise ValueError(f"monitor_mode={cfg.monitor_mode!r} must be min, max, or null: as the metric says")
    if cfg.monitor_mode is None and cfg.monitor is not None:
        cfg.monitor_mode = settings["monitor_mode"] = better_when(cfg.monitor)
    for name, node in _watching(cfg):
        mode = cfg.monitor_mode if node.monitor == cfg.monitor else better_when(node.monitor)
        if "mode" in node and node.mode is None:
            node.mode = settings["callbacks"][name]["mode"] = mode
        elif "mode" not in node and "mode" in inspect.signature(get_class(node._target_)).parameters:
            with open_dict(node):
                node.mode = mode


def refuse_unknown(cfg: DictConfig, module: TaskModule, datamodule: BaseDataModule) -> None:
    """Refuse a monitored metric that nothing will log, or of which it is not known when it is better.

    Code that `allow_targets` lets in may log what it likes.

    Raises:
        ValueError: naming the setting, the nearest right name and all others.
    """
    known = metric_names(module, datamodule)
    for name, node in _watching(cfg):
        key = f"callbacks.{name}"
        if cfg.trainer.limit_val_batches == 0 and name != "checkpoints":
            raise ValueError(
                f"{key}.monitor={node.monitor} is never measured with trainer.limit_val_batches=0; "
                f"raise it, or set {key}=null"
            )
        if node.get("check_on_train_epoch_end") and cfg.trainer.check_val_every_n_epoch not in (1, None):
            raise ValueError(
                f"{key}.check_on_train_epoch_end=true looks after every epoch, but validation comes every "
                f"trainer.check_val_every_n_epoch={cfg.trainer.check_val_every_n_epoch}; leave the one out"
            )
        if node.monitor != cfg.monitor:
            _refuse(
                f"{key}.monitor", node.monitor, f"{key}.mode", node.get("mode"), known, strict=not cfg.allow_targets
            )
    if cfg.monitor is not None:
        _refuse("monitor", cfg.monitor, "monitor_mode", cfg.monitor_mode, known, strict=not cfg.allow_targets)


def metric_names(module: TaskModule, datamodule: BaseDataModule) -> list[str]:
    """Every metric that validation logs."""
    prefixes = [_prefix(stage) for stage in datamodule.eval_samples]
    return [f"{prefix}{name}" for prefix in prefixes for name in module.metric_names()]


def _prefix(stage: str) -> str:
    return "train/eval_" if stage == "train_eval" else f"{stage}/"


def _watching(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """The callbacks that watch a metric, by their names."""
    for name, node in cfg.callbacks.items():
        if node is not None and node.get("monitor") is not None:
            yield str(name), node


def _refuse(key: str, metric: str, mode_key: str, mode: str | None, known: list[str], *, strict: bool) -> None:
    if strict and metric not in known and metric not in PROGRESS:
        if metric.startswith("val/") and not any(name.startswith("val/") for name in known):
            raise ValueError(f"{key}={metric}, but there is no validation text; set {key}=train/eval_loss")
        shown = [name for name in known if not name.endswith(("_low", "_high"))]
        raise ValueError(f"{key}={metric}: nothing logs it; {_hint(metric, shown)}There are {', '.join(shown)}")
    if mode is None:
        raise ValueError(
            f"{key}={metric}: its name does not say whether it is better when small or large; add {mode_key}=min or "
            f"{mode_key}=max"
        )


def _hint(metric: str, known: list[str]) -> str:
    begun = sorted((name for name in known if name.startswith(metric)), key=len)
    nearest = begun or difflib.get_close_matches(metric, known, 1, cutoff=0.5)
    return f"did you mean {nearest[0]}? " if nearest else ""
