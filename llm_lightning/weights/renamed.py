"""Settings that have another name today than in headers and run folders of earlier versions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

RENAMED = {"data.max_lost": "data.max_dropped"}
"""GROUP.KEY of before -> of today."""


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a header by their names of today."""
    today = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        group, key = old.split(".")
        node = today.get(group)
        if isinstance(node, dict) and key in node:
            today[group] = {new.split(".")[1] if name == key else name: value for name, value in node.items()}
    return today
