"""Runs in one group of forked processes, one after the other: what a launcher would start afresh for each of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_run import fit_here

FORK = multiprocessing.get_context("fork")


def run_in(processes: int, runs: Sequence[Sequence[str]], folder: Path) -> None:
    """Make each run, given by its words, in `processes` processes that talk through gloo; what fails is printed."""
    if processes == 1:
        for words in runs:
            outcome = fit_here(words)
            assert outcome.code == 0, outcome.err[-3000:]
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORK.Process(target=_be_rank, args=(rank, processes, port, runs, folder)) for rank in range(processes)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(timeout=1500)
        if one.exitcode is None:
            one.kill()
    codes = [one.exitcode for one in ranks]
    said = "\n".join((folder / f"rank_{rank}.log").read_text()[-3000:] for rank, code in enumerate(codes) if code)
    assert codes == [0] * processes, said


def _be_rank(rank: int, processes: int, port: int, runs: Sequence[Sequence[str]], folder: Path) -> None:
    sys.stdout = sys.stderr = (folder / f"rank_{rank}.log").open("w", buffering=1)
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        for words in runs:
            # Again for each run: Lightning takes them away when a Trainer ends.
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE=str(processes),
                NODE_RANK="0",
                LOCAL_RANK=str(rank),
            )
            many = ["accelerator=ddp", "trainer.accelerator=cpu", f"trainer.devices={processes}"]
            outcome = fit_here([*(word for word in words if not word.startswith("accelerator=")), *many])
            print(outcome.out, outcome.err)
            assert outcome.code == 0
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # without the exit handlers of the tests
