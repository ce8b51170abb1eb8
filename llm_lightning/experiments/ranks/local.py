"""How many processes this one must start for a run, by its settings and without importing torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_lightning.experiments.ranks.launcher import launched
from llm_lightning.experiments.sweep.claims import listed, visible_gpus

OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")
"""Environment variables of further launchers that start all processes themselves, which Lightning knows."""
ELSEWHERE = ("ddp_spawn", "ddp_fork", "ddp_notebook")
"""Strategies that start processes in another way, and are refused."""


def local_ranks(config: Mapping[str, Any]) -> int:
    """Number of processes that this one must start for a run; 1 if it is the run itself, or others start them.

    Args:
        config: the run's.
    """
    trainer = config["trainer"]
    shows = bool(config["data"].get("preview") or config.get("plot_lr"))
    if shows or _started_by_others() or str(trainer.get("strategy")).startswith(ELSEWHERE):
        return 1
    accelerator, devices = str(trainer.get("accelerator")), trainer.get("devices")
    devices = list(devices) if not isinstance(devices, (str, int, type(None))) else devices
    numbers = listed(devices)
    if numbers:
        return len(numbers) if accelerator != "cpu" else 1  # on a CPU Lightning refuses lists
    if re.fullmatch(r"\d+", str(devices)):
        return max(1, int(str(devices))) if accelerator in ("auto", "cpu", "gpu", "cuda") else 1
    is_gpu = accelerator in ("auto", "gpu", "cuda") and _torch_has_cuda()
    return max(1, len(visible_gpus())) if is_gpu else 1


def _started_by_others() -> bool:
    return launched().by != "none" or any(os.environ.get(name, "1") != "1" for name in OTHERS)


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    with contextlib.suppress(OSError):
        text = Path(found.origin).with_name("version.py").read_text("utf-8")
        return re.search(r"^cuda\b.*= *['\"]\d", text, re.MULTILINE) is not None
    return False
