"""The process that trains: a fork of the fork server, or a fresh one; and its lines, with its name before them."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

from llm_lightning.experiments import processes
from llm_lightning.experiments.sweep.forked import ForkedChild
from llm_lightning.experiments.sweep.stopping import mask_of_children
from llm_lightning.terminal import say, visible

POLL_SECONDS = 0.05
AGAIN_SECONDS = 5.0
"""Seconds between two signals to a child that is to stop: the first may arrive before it listens."""
PIPE_SECONDS = 5.0
"""Seconds that a pipe may stay open after its child: a grandchild may hold it."""


class Child(Protocol):
    """A process that trains."""

    def poll(self) -> int | None:
        """The exit code as `subprocess` gives it, None while it lives."""

    def send_signal(self, signum: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Orders:
    """What a child needs to know."""

    argv: Sequence[str]
    """A script and its words."""
    environment: Mapping[str, str]
    """All its environment variables."""
    folder: str
    """The working directory."""
    threads: int | None = None
    """Torch's threads; None: as many as torch takes."""
    forks: bool = False
    """Whether it may be a fork."""
    keeps: Sequence[int] = ()
    """File descriptors of locks that are held as long as the child lives, if it is a fresh process."""


def start_child(orders: Orders, output: Connection | None) -> Child:
    """Start a child; `output` gets what it prints, None: the terminal."""
    if orders.forks:
        try:
            return ForkedChild(orders.argv, orders.environment, orders.folder, output, orders.threads)
        except (OSError, EOFError) as error:
            say(f"starting a fresh process instead of a fork: {error}", file=sys.stderr)
    options: dict[str, Any] = {"env": orders.environment, "cwd": orders.folder}
    if output is not None:
        options |= {"stdout": output.fileno(), "stderr": subprocess.STDOUT}
    if os.name == "posix":
        options["pass_fds"] = orders.keeps
    with mask_of_children():
        return FreshChild(processes.start([sys.executable, *orders.argv], **options))


@dataclass
class FreshChild:
    """A child process with an interpreter of its own."""

    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def send_signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def close(self) -> None:
        pass


def wait_for(child: Child, stops: Callable[[], bool], received: Sequence[int]) -> int:
    """Wait for a child, and stop it when `stops` says so; its exit code as a shell gives it.

    Args:
        received: signals to this process; the first is handed on, but a Ctrl-C, which the child has got itself.
    """
    signalled: float | None = None
    while (code := child.poll()) is None:
        now = time.monotonic()
        if stops() and (signalled is None or now - signalled > AGAIN_SECONDS):
            first = received[0] if received and signalled is None else signal.SIGTERM
            child.send_signal(signal.SIGTERM if first == signal.SIGINT else first)
            signalled = now
        time.sleep(POLL_SECONDS)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def lines_with_name(name: str, kept: collections.deque[str]) -> Iterator[Connection]:
    """A pipe for the output of a child, printed line by line with `name` before each, and kept.

    Of a progress bar, which rewrites its line, only the end is printed.
    """
    source, output = Pipe(duplex=False)
    reader = threading.Thread(target=_pass_on, args=(source, name, kept), daemon=True)
    reader.start()
    try:
        yield output
    finally:
        output.close()
        reader.join(timeout=PIPE_SECONDS)


def _pass_on(source: Connection, name: str, kept: collections.deque[str]) -> None:
    with source, contextlib.suppress(OSError), os.fdopen(os.dup(source.fileno()), "rb") as stream:
        for raw in stream:
            text = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]
            if text.strip():
                kept.append(visible(text))
                say(f"[{name}] {text}", flush=True)
