"""The processes of a run meet: they wait for each other, and compare what they would do."""

from __future__ import annotations

import atexit
import platform
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection

from llm_lightning.experiments.ranks import waiting
from llm_lightning.experiments.ranks.agreement import Facts, refuse_differences, refuse_other_disks, sees_folder
from llm_lightning.experiments.ranks.fresh_store import fresh_store
from llm_lightning.experiments.ranks.launcher import launched, uses_agent_store
from llm_lightning.experiments.ranks.naming import not_met
from llm_lightning.experiments.run_folder import OWNER, RunFolder


def compare_when_met(trainer: L.Trainer, run: RunFolder, facts: Callable[[], Facts]) -> None:
    """Let the processes of `trainer` compare their facts as soon as they have met, before the model is set up.

    Their errors, in `trainer.fit`, are ValueErrors: they do not meet, differ, or do not see the same run folder.
    """
    strategy = trainer.strategy
    set_up, have_met = strategy.setup_environment, False

    def setup_environment() -> None:
        nonlocal have_met
        if have_met:
            set_up()
            return
        _wait(strategy, set_up)
        have_met = True
        try:
            _compare(run, facts())
        except ValueError:
            # Lightning kills the first process at the sight of another that has ended with a code of its own.
            getattr(strategy.launcher, "procs", []).clear()
            raise

    if trainer.world_size > 1:
        strategy.setup_environment = setup_environment  # type: ignore[method-assign]


def _wait(strategy: Any, set_up: Callable[[], None]) -> None:
    here = launched()
    with waiting.for_all(here):
        try:
            if here.address is not None and here.processes is not None and uses_agent_store():
                _init_process_group(strategy, here.address, here.rank, here.processes)
            set_up()
        except dist.DistError as error:
            raise not_met(here, error) from error


def _init_process_group(strategy: Any, address: str, rank: int, processes: int) -> None:
    """Initialise the process group as Lightning would, but on a store that is new at each restart."""
    device, backend = strategy.root_device, strategy._get_process_group_backend()
    strategy.accelerator.setup_device(device)
    dist.init_process_group(
        backend,
        store=fresh_store(address, rank, processes, strategy._timeout),
        rank=rank,
        world_size=processes,
        timeout=strategy._timeout,
        device_id=device if device.type != "cpu" else None,
    )
    if backend == "nccl":
        atexit.register(_destroy_dist_connection)


def _compare(run: RunFolder, own: Facts) -> None:
    owner = run.path / OWNER
    of_ranks = _gathered({"facts": own, "host": platform.node(), "owner": owner.read_bytes() if _is_first() else b""})
    refuse_differences([one["facts"] for one in of_ranks])
    sees = _gathered(sees_folder(run.path, of_ranks[0]["owner"]))
    refuse_other_disks(run.path, sees, [one["host"] for one in of_ranks])


def _is_first() -> bool:
    return dist.get_rank() == 0


def _gathered(own: Any) -> list[Any]:
    """What each process has, by rank."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    return of_ranks
