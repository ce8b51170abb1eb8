"""Settings of earlier versions, in headers and run folders: other names of keys and classes, and removed values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

RENAMED = {"data.max_lost": "data.max_dropped"}
"""GROUP.KEY of before -> of today."""

MOVED = {
    "llm_lightning.optim.AdamWConfig": "llm_lightning.optim.adamw.AdamWConfig",
    "llm_lightning.optim.ConstantConfig": "llm_lightning.optim.schedules.ConstantConfig",
    "llm_lightning.optim.WarmupCosineConfig": "llm_lightning.optim.schedules.WarmupCosineConfig",
}
"""`_target_` of before -> of today."""

REMOVED = {
    ("task.reference", "adapter_clone"): "adapter_off",  # a copy of adapters that are 0 at the start
    ("task.loss", "length_normalised"): "average",  # another name of the same loss
}
"""(key, value) of before -> the value of today that computes the same: a run is evaluated with it, but not resumed."""


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a header by their names of today."""
    today = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        group, key = old.split(".")
        node = today.get(group)
        if isinstance(node, dict) and key in node:
            today[group] = {new.split(".")[1] if name == key else name: value for name, value in node.items()}
    for node in today.values():
        if isinstance(node, dict) and isinstance(node.get("_target_"), str):
            node["_target_"] = MOVED.get(node["_target_"], node["_target_"])
    return today
