"""Checks of the monitored metrics before training: which direction is better, and whether anything logs them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import get_class

from llm_lightning.callbacks.monitored import better_when
from llm_lightning.data.base import BaseDataModule
from llm_lightning.experiments.run_records import Settings
from llm_lightning.nearest import nearest
from llm_lightning.tasks.base import TaskModule

PROGRESS = ("loss", "val_loss")
"""Metrics of the progress bar, which has its own names."""


def fill_modes(settings: Settings) -> None:
    """Replace every null `mode` by `min` or `max`, inferred from the metric's name; unclear ones stay null.

    A callback that monitors the run's own metric follows `monitor_mode`.

    Raises:
        ValueError: if a mode is neither `min`, `max` nor null.
    """
    monitor, mode = settings["monitor"], settings["monitor_mode"]
    if mode not in ("min", "max", None):
        raise ValueError(f"monitor_mode={mode!r} must be min, max, or null to infer it from the metric's name")
    if mode is None and monitor is not None:
        settings["monitor_mode"] = better_when(monitor)
    for _, node in _monitoring(settings):
        if "mode" in node and node["mode"] is None:
            node["mode"] = _mode_of(settings, node)


def missing_mode(settings: Settings, node: Mapping[str, Any]) -> dict[str, Any]:
    """`mode` for a callback whose settings omit it; Lightning's default is `min`, whatever the metric."""
    if node.get("monitor") is None or "mode" in node:
        return {}
    takes_mode = "mode" in inspect.signature(get_class(node["_target_"])).parameters
    return {"mode": _mode_of(settings, node)} if takes_mode else {}


def _mode_of(settings: Settings, node: Mapping[str, Any]) -> str | None:
    return settings["monitor_mode"] if node["monitor"] == settings["monitor"] else better_when(node["monitor"])


def refuse_unknown(settings: Settings, module: TaskModule, datamodule: BaseDataModule) -> None:
    """Refuse a monitored metric that nothing logs, or whose better direction is unknown.

    Code that `allow_targets` admits may log any metric.

    Raises:
        ValueError: naming the setting, the nearest right name and all others.
    """
    known = metric_names(module, datamodule)
    strict = not settings["allow_targets"]
    trainer = settings["trainer"]
    for name, node in _monitoring(settings):
        key, metric = f"callbacks.{name}", node["monitor"]
        if trainer["limit_val_batches"] == 0 and name != "checkpoints":
            raise ValueError(
                f"{key}.monitor={metric} is never measured with trainer.limit_val_batches=0; "
                f"raise it, or set {key}=null"
            )
        if node.get("check_on_train_epoch_end") and trainer["check_val_every_n_epoch"] not in (1, None):
            raise ValueError(
                f"{key}.check_on_train_epoch_end=true looks after every epoch, but validation comes every "
                f"trainer.check_val_every_n_epoch={trainer['check_val_every_n_epoch']}; leave one of them out"
            )
        if metric != settings["monitor"]:
            mode = {**node, **missing_mode(settings, node)}.get("mode")
            _refuse(f"{key}.monitor", metric, f"{key}.mode", mode, known, strict=strict)
    if settings["monitor"] is not None:
        _refuse("monitor", settings["monitor"], "monitor_mode", settings["monitor_mode"], known, strict=strict)


def metric_names(module: TaskModule, datamodule: BaseDataModule) -> list[str]:
    """Every metric that validation logs."""
    prefixes = [_prefix(stage) for stage in datamodule.eval_samples]
    return [f"{prefix}{name}" for prefix in prefixes for name in module.metric_names()]


def _prefix(stage: str) -> str:
    return "train/eval_" if stage == "train_eval" else f"{stage}/"


def _monitoring(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of every callback that monitors a metric."""
    for name, node in settings["callbacks"].items():
        if node is not None and node.get("monitor") is not None:
            yield name, node


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
    near = begun[0] if begun else nearest(metric, known, cutoff=0.5)
    return f"did you mean {near}? " if near else ""
