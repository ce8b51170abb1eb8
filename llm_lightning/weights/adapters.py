"""The file of an adapter, and the weights that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llm_lightning.weights.checkpoint import HEADER, CheckpointError, load, save
from llm_lightning.weights.checks.tensors import is_of_model
from llm_lightning.weights.digests import digest_of


def refuse_other_base(adapter: str | Path, expected: str | None, state: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless the base weights `state` have the digest that an adapter was trained on."""
    if expected is None:
        raise CheckpointError(
            f"{adapter} was trained together with its own weights, from none that are stored elsewhere; load it alone"
        )
    found = digest_of(state)
    if found != expected:
        raise CheckpointError(
            f"{adapter} is an adapter for other weights than these (their digest is {found[:12]}, it was trained on "
            f"{expected[:12]}); give the right ones"
        )


def save_adapter(source: str | Path, target: str | Path, lineage: Mapping[str, Any] | None = None) -> str:
    """Write only what a LoRA run has trained: the adapters and a classifier's head, some megabytes.

    `load_model(target)` adds it to the weights that `lineage.parent_name` names, and compares their digest.

    Args:
        lineage: of the run; default: of the checkpoint.

    Returns:
        the digest of the file.
    """
    state = load(source, mmap=True)
    known = dict(lineage or state[HEADER]["lineage"])
    header = state[HEADER] | {"lineage": known, "base": known["base"]}
    small = {name: tensor for name, tensor in state["state_dict"].items() if is_of_adapter(name)}
    return save(target, {HEADER: header, "state_dict": small})


def is_of_adapter(name: str) -> bool:
    return ("lora_" in name and is_of_model(name)) or name.startswith(("model.head.", "model.threshold"))
