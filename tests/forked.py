"""A run in a fork of the test process, which has imported what takes far longer than a tiny run.

It is `python train.py ARGUMENTS` from `main` on: signals, handlers, folder and standard streams are those of a process
that a shell has started. What comes before, and the processes that such a run starts, are real in other tests.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from tiny_run import ROOT, Outcome, finish

from llm_lightning.experiments.report.watching import SweepReport
from llm_lightning.experiments.sweep import attempt
from llm_lightning.experiments.sweep.children import Orders
from llm_lightning.signals import STOPPING


class Forked:
    """What the tests use of `subprocess.Popen`. Without `stdout` and `stderr`, they are those of this process."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        pipes: bool = True,
        start_new_session: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        kept = [tempfile.TemporaryFile("w+") if pipes else None for _ in range(2)]  # noqa: SIM115 (communicate closes)
        self._files = kept
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(list(arguments), folder, kept, start_new_session, environment or {})
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        written = []
        for file in self._files:
            assert file is not None
            file.seek(0)
            written.append(file.read())
            file.close()
        return written[0], written[1]


def finish_two(arguments: Sequence[str], folder: Path) -> Outcome:
    """Wait for a run in two processes, each told its rank, as by a launcher; what the first one leaves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [Forked(arguments, folder, environment={**shared, "LOCAL_RANK": rank}) for rank in "01"]
    first, second = (finish(rank) for rank in ranks)
    assert second.code == first.code, second.err
    return first


def jobs_are_forks(patch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let the jobs of a sweep be forks of this process, which need no server; returns the words of each.

    No report is written: drawing takes longer than a tiny job.
    """
    for room in ("callbacks", "data", "experiments", "tasks"):  # once, or each fork imports them again
        for module in pkgutil.iter_modules(importlib.import_module(f"llm_lightning.{room}").__path__):
            importlib.import_module(f"llm_lightning.{room}.{module.name}")
    started: list[list[str]] = []

    def start_child(orders: Orders, *_: Any) -> Forked:
        started.append(list(orders.argv[1:]))
        return Forked(orders.argv[1:], Path(orders.folder), pipes=False)

    patch.setattr(attempt, "start_child", start_child)
    patch.setattr(SweepReport, "write", lambda report: None)
    return started


def _run(
    arguments: list[str],
    folder: Path,
    files: list[IO[str] | None],
    start_new_session: bool,
    environment: Mapping[str, str],
) -> None:
    gc.freeze()  # or each collection would touch, and so copy, all memory of the test process
    if start_new_session:
        os.setsid()
    for signum in STOPPING:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    for file, standard in zip(files, (1, 2), strict=True):
        if file is not None:
            os.dup2(file.fileno(), standard)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(standard), "w", buffering=1) for standard in (1, 2))
    root = logging.getLogger()
    root.handlers[:] = []
    root.setLevel(logging.WARNING)
    os.chdir(folder)
    os.environ.update(environment, OMP_NUM_THREADS="1")  # of the processes that it starts, too
    sys.argv[:] = [str(ROOT / "train.py"), *arguments]

    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None

    from llm_lightning.cli.main import VERBS
    from llm_lightning.experiments.launch import main

    main(ROOT / "train.py", VERBS)
