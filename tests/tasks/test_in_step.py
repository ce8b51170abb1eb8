"""What processes decide together, and what they say when they are at different points."""

from __future__ import annotations

import multiprocessing
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_lightning.tasks.in_step import all_say, any_says


def beside(rank: int, port: int, outcomes: Any) -> None:
    """One of two processes: what each of four questions ends with."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM}[reduce_op])
        return tensor

    trainer: Any = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
    )
    found: list[Any] = [any_says(trainer, "saves", answer) for answer in (False, rank == 1, True)]
    found += [all_say(trainer, "saves", answer) for answer in (False, rank == 1, True)]
    try:
        found.append(any_says(trainer, "saves" if rank == 0 else "begins a step", False))
    except ValueError as error:
        found.append(str(error))
    outcomes.put((rank, found))
    dist.destroy_process_group()


def test_two_processes_agree_or_notice_that_they_are_out_of_step() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    outcomes = fork.Queue()
    processes = [fork.Process(target=beside, args=(rank, port, outcomes)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(outcomes.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    for rank, point in enumerate(("saves", "begins a step")):
        assert found[rank][:6] == [False, True, True, False, False, True]
        assert f"out of step: this process {point}, another one does something else" in found[rank][6]


@pytest.mark.parametrize("answer", [False, True])
def test_one_process_decides_alone(answer: bool) -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    assert any_says(trainer, "saves", answer) is all_say(trainer, "saves", answer) is answer
