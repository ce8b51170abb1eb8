"""The numbers of devices and nodes that a launcher implies, for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_lightning.experiments.ranks.launcher import Launched, launched, tasks_not_started

OPEN = ("auto", "None", "-1")
"""Values of `trainer.devices` that leave the number to the machine, as text."""


def counts(trainer: Mapping[str, Any]) -> dict[str, int]:
    """`devices` and `num_nodes` of the Trainer, if the launcher decides how many processes there are; else empty.

    Args:
        trainer: the settings `trainer`.

    Raises:
        ValueError: one line, if they contradict the launcher.
    """
    refuse_tasks_not_started(trainer)
    here = launched()
    if not here.starts_all:
        return {}
    _refuse_uneven(here)
    local, nodes = here.per_node[0], len(here.per_node)
    devices, typed_nodes = trainer.get("devices"), trainer.get("num_nodes")
    if str(devices) not in OPEN and _length(devices) != local:
        raise ValueError(
            f"trainer.devices={devices}, but {here.command} started {_many(local)} on each node; "
            "set trainer.devices=auto, or start as many"
        )
    if typed_nodes is not None and int(typed_nodes) != nodes:
        raise ValueError(
            f"trainer.num_nodes={typed_nodes}, but {here.command} started processes on {nodes}; "
            "leave trainer.num_nodes out, or start as many"
        )
    return {**({"devices": local} if str(devices) in OPEN else {}), "num_nodes": nodes}


def refuse_tasks_not_started(trainer: Mapping[str, Any]) -> None:
    """Refuse a SLURM job of several tasks of which none was started, unless the run wants one process."""
    tasks = tasks_not_started()
    if not tasks or (str(trainer.get("devices")) == "1" and trainer.get("strategy") == "auto"):
        return
    raise ValueError(
        f"this SLURM job has {tasks} tasks, but only this process runs: start it with srun (srun python train.py ...), "
        "or set accelerator=cpu or accelerator=gpu for a run of one process"
    )


def _refuse_uneven(here: Launched) -> None:
    if len(set(here.per_node)) > 1:
        each = ", ".join(map(str, here.per_node))
        raise ValueError(f"{here.command} started {each} processes on the nodes; start as many on each (srun: -N)")


def _length(devices: Any) -> int:
    """Number of devices that a setting names: 2, "2", [0, 1] or "0,1"."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    text = str(devices)
    return len([part for part in text.split(",") if part]) if "," in text else int(text) if text.isdigit() else 0


def _many(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"
