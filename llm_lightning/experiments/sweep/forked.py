"""A job as a fork of a server that has imported everything, so that it starts at once.

The server is the standard library's (`multiprocessing.forkserver`): the sweep's own process stays free of torch, and a
fork of a process that did nothing but import has no threads, handlers or settings of an earlier job. Only for jobs of
one process on the CPU, on Linux: ranks are started by Lightning with a command line, and CUDA does not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from llm_lightning.experiments.sweep.stopping import mask_of_children
from llm_lightning.signals import STOPPING

PRELOADED = "llm_lightning.experiments.sweep.preloaded"
PROJECT = Path(__file__).parents[3]


def can_fork(trainer: Mapping[str, Any], *, has_gpus: bool) -> bool:
    """Whether a job with these settings of `trainer` may be a fork."""
    accelerator, devices = str(trainer["accelerator"]), str(trainer.get("devices", "auto"))
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not has_gpus)
    is_one = devices in ("auto", "1") and str(trainer.get("num_nodes", 1)) == "1" and trainer["strategy"] == "auto"
    return sys.platform == "linux" and on_cpu and is_one


class ForkedChild:
    """A child that the fork server starts.

    Args:
        argv: a script and its words.
        environment: all its environment variables.
        folder: the working directory.
        output: gets what it prints; None: the terminal.
        threads: torch's threads; None: as many as torch takes.

    Raises:
        OSError, EOFError: if the server cannot be reached.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        folder: str,
        output: connection.Connection | None,
        threads: int | None,
    ) -> None:
        start_server()
        context: Any = multiprocessing.get_context("forkserver")
        arguments = (list(argv), dict(environment), folder, output, threads)
        self.process = context.Process(target=_run, args=arguments, name=argv[0], daemon=False)
        with _start_method("forkserver"):
            self.process.start()

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def send_signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signum)

    def close(self) -> None:
        self.process.close()


def start_server() -> None:
    """Start the server of this process, if it is not running yet."""
    forkserver.set_forkserver_preload([PRELOADED])
    with _importable(), mask_of_children():
        forkserver.ensure_running()


@contextlib.contextmanager
def _start_method(name: str) -> Iterator[None]:
    """Start processes by this method: a fork adopts its parent's, and that of a joblib worker is joblib's own."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(name, force=True)
    try:
        yield
    finally:
        if before is None or before in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method(before, force=True)


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Let the server import this package, wherever it was started."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(
    argv: list[str],
    environment: dict[str, str],
    folder: str,
    output: connection.Connection | None,
    threads: int | None,
) -> None:
    """Do in the fork what `python SCRIPT WORDS` does."""
    for signum in STOPPING:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # the data's worker processes start as in any run
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if output is not None:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        output.close()
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    random.seed()
    importlib.import_module("numpy").random.seed()
    if threads is not None:
        importlib.import_module("torch").set_num_threads(threads)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)  # as for a script
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # what multiprocessing leaves out: a fork ends by os._exit


def _end_with_parent() -> None:
    """Stop, saved, when the process that asked for this fork has died."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
