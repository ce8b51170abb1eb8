"""Runs as forks of a process that has imported everything, which takes longer than a tiny run. See `WarmStart`.

As a script it reads a line for each run, forks it in a session of its own, and prints its pid and then its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class WarmStart:
    """Starts one run after the other; a context manager, at whose end the process is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> WarmStart:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / "warm_start.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate(timeout=60)

    def start(self, arguments: list[str], log: Path) -> int:
        """Start `python train.py ARGUMENTS`, which writes to `log`; returns its pid, also its process group."""
        assert self._process.stdin is not None
        print(json.dumps([arguments, str(log)]), file=self._process.stdin, flush=True)
        return self._read()

    def exit_code(self) -> int:
        """Wait for the end of the run that was started last."""
        return self._read()

    def _read(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self.folder / "warm_start.log").read_text()[-3000:]
        return int(line)


def _serve() -> tuple[list[str], str] | None:
    """Start what the lines ask for. In a forked process it returns what that one is to run."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return tuple(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(arguments: list[str], log: str) -> None:
    """Be a process that a shell has started."""
    os.setsid()
    for signum in STOPPING:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing: Any = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, standard)
    sys.argv[:] = ["train.py", *arguments]


if __name__ == "__main__":
    sys.argv[0] = str(ROOT / "train.py")
    import torch.utils.tensorboard  # noqa: F401

    import llm_lightning.experiments.run
    import llm_lightning.tasks.dpo
    import llm_lightning.tasks.pretraining  # noqa: F401
    from llm_lightning.experiments.launch import main

    wanted = _serve()
    if wanted is not None:
        _become(*wanted)
        main(ROOT / "train.py")
