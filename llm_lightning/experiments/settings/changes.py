"""Settings that may change when a run is resumed; keys and values of earlier versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from llm_lightning.experiments.settings.nodes import dotted, leaves
from llm_lightning.files.data_paths import data_paths, with_data_paths, without_paths
from llm_lightning.weights.renamed import MOVED, REMOVED, RENAMED, REPLACED

MAY_CHANGE = (
    "trainer.max_epochs",  # a resumed run may train longer; its schedule is stretched to the new length
    "trainer.max_steps",
    "trainer.max_time",
    "callbacks.early_stopping*",
    "trainer.enable_progress_bar",  # display, logs and the processes that prepare batches change no weight
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "data.num_workers",
    "logger.*",
    "callbacks.checkpoints.every_n_*",
    "callbacks.checkpoints.keep",
    "callbacks.samples*",
    "callbacks.plots*",
    "callbacks.throughput*",
    "callbacks.watchdog*",
    "plot_lr",
    "data.path",  # locations: the digests compare the content
    "init_from",
    "allow_targets",  # how the run is started, not what it computes
    "resume",
    "run_name",
)
"""Settings that may differ when a run is resumed, as patterns."""

LAYOUT = (
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy*"),
    *("trainer.accumulate_grad_batches", "data.batch_size", "data.global_batch_size"),
)
"""Settings that say who computes an update. They may differ as well where it keeps its number of samples, which only
`tasks/layout.py` can tell; jobs of a sweep that differ in them are different."""


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every difference; a missing key counts as None."""
    before, after = leaves(old), leaves(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to resume a run with settings that change its results; `MAY_CHANGE` and `LAYOUT` list the others.

    Raises:
        ValueError: naming every changed key, its old and its new value.
    """
    changed = [
        f"{key} was {before!r} and is {after!r}"
        for key, before, after in diff_configs(_without_places(old), _without_places(new))
        if not any(fnmatchcase(key, pattern) for pattern in (*MAY_CHANGE, *LAYOUT)) and not _is_new(key, old)
    ]
    if changed:
        raise ValueError(
            f"cannot resume with other settings: {'; '.join(changed)}; "
            "give the old values again, or start a new run under another run_name"
        )


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the paths of the data, whose content the digests compare; with the names of sets."""
    data = config.get("data")
    if not isinstance(data, Mapping):
        return dict(config)
    names = sorted(name for name, path in (data.get("val_sets") or {}).items() if path is not None)
    unnamed = with_data_paths(data, dict.fromkeys(data_paths(data)))
    return {**config, "data": {**unnamed, "val_sets": names or None, "mixture": without_paths(data.get("mixture"))}}


def _is_new(key: str, old: Mapping[str, Any]) -> bool:
    """Whether an earlier version lacked a setting of the data; the digest tells whether it changed anything."""
    node: Any = old
    for name in key.split("."):
        if not isinstance(node, Mapping):
            return False
        if name not in node:
            return key.startswith("data.")
        node = node[name]
    return False


def refuse_renamed(key: str) -> None:
    """Refuse an old key, naming the new one."""
    if key in REPLACED:
        raise ValueError(f"{key} was removed; write {REPLACED[key]}=VALUE, or leave it out for {REPLACED[key]}=auto")
    if key in RENAMED:
        raise ValueError(f"{key} is now called {RENAMED[key]}; write {RENAMED[key]}=VALUE")


def refuse_replaced(raw: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """Refuse a file that sets a key of earlier versions, or refers to one.

    Args:
        raw: nested settings, interpolations as written.
        where: key -> " in FILE" where a file sets it, else "".
    """
    for key, value in dotted(raw).items():
        if key in REPLACED:
            raise ValueError(f"{key}{where(key)} was removed; set {REPLACED[key]} instead, or leave it out")
        named = value[2:-1] if isinstance(value, str) and value.startswith("${") else None
        if named in REPLACED:
            raise ValueError(f"{key}={value}{where(key)}: {named} was removed; leave {key} out, or give a number")


def refuse_removed(values: Mapping[str, Any]) -> None:
    """Refuse a value or class that only earlier versions had, naming its replacement.

    Args:
        values: dotted key -> value.
    """
    for (key, value), today in REMOVED.items():
        if values.get(key) == value:
            raise ValueError(f"{key}={value} was removed; in a new run set {key}={today}, which computes the same")
    for key, value in values.items():
        if key.endswith("._target_") and isinstance(value, str) and value in MOVED:
            raise ValueError(f"{key}={value} is now called {MOVED[value]}; write {key}={MOVED[value]}")
