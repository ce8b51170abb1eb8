"""Settings of earlier versions, in headers and run folders: keys, classes and values that have changed since."""

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

REPLACED = {f"model.{name}": "optimizer.lr" for name in ("peak_lr", "finetune_lr", "preference_lr")}
"""Keys that are gone, GROUP.KEY -> the key that a new run sets instead; records have both."""

ADDED = {
    "model.norm": "layer",
    "model.layer_norm_eps": 1e-5,
    "model.position": "learned",
    "model.rope_theta": 10000.0,
    "model.rope_scaling": None,
    "model.mlp": "gelu",
    "model.ffn_width": None,
    "model.n_kv_head": None,
    "model.head_dim": None,
    "model.qk_norm": False,
    "model.out_bias": True,
    "model.mlp_bias": True,
}
"""Keys that earlier versions lacked, and what they computed: GPT-2."""

REMOVED = {
    ("task.reference", "adapter_clone"): "adapter_off",  # a copy of adapters that are 0 at the start
    ("task.loss", "length_normalised"): "average",  # another name of the same loss
}
"""(key, value) of before -> the value of today that computes the same: a run is evaluated with it, but not resumed."""


def with_keys_of_today(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run by dotted keys, with those of today; changed in place, since lists of runs are long."""
    if "model.n_layer" in settings and "model.norm" not in settings:
        for key in REPLACED:
            settings.pop(key, None)
        settings |= ADDED
    return settings


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a header by their names of today, with the keys of today."""
    today = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        group, key = old.split(".")
        node = today.get(group)
        if isinstance(node, dict) and key in node:
            today[group] = {new.split(".")[1] if name == key else name: value for name, value in node.items()}
    model = today.get("model")
    if isinstance(model, dict):
        today["model"] = {key: value for key, value in model.items() if f"model.{key}" not in REPLACED}
        added = {key.removeprefix("model."): value for key, value in ADDED.items()}
        today["model"] |= {key: value for key, value in added.items() if key not in model}
    for node in today.values():
        if isinstance(node, dict) and isinstance(node.get("_target_"), str):
            node["_target_"] = MOVED.get(node["_target_"], node["_target_"])
    return today
