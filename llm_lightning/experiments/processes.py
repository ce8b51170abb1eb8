"""Child processes of a pipeline or a multirun: signals reach them, and none outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.ranks.launcher import launched
from llm_lightning.signals import STOPPING, signal_at_death_of

PARENT = "LLM_LIGHTNING_PARENT"
"""Environment variable with the pid of the process that called `start`."""
KEYBOARD_SECONDS = 5.0
"""Seconds from a SIGINT until SIGTERM to a child that is still there: the terminal sends Ctrl-C to both."""
LATER_RANK_SECONDS = 30.0
"""Seconds that a later rank of distributed training, which saves nothing, outlives the first."""


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process of this package, which `end_with_parent` ends with this one; `options` go to Popen."""
    environment = {**(options.pop("env", None) or os.environ), PARENT: str(os.getpid())}
    return subprocess.Popen(command, env=environment, **options)


def end_with_parent() -> None:
    """Send SIGTERM to this process when the one that called `start` is gone: this one then saves and ends.

    A later rank of distributed training, started by Lightning, exits some time after the first, for which it may
    otherwise wait forever.
    """
    parent = os.environ.pop(PARENT, None)  # children of this process have another parent
    if parent is not None and parent.isdigit():
        if not signal_at_death_of(int(parent), signal.SIGTERM):
            _when_gone(int(parent), lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif launched().by == "parent" and launched().local_rank != 0:
        _when_gone(os.getppid(), _give_up)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for `process`; return its exit code as a shell does: 128 + N if signal N ended it.

    A stop signal to this process is forwarded. The child gets the time to save; then this process also exits with
    128 + N. A signal that this process ignores stays ignored.
    """
    received: list[int] = []

    def hand_on(signum: int, _: Any) -> None:
        received.append(signum)
        process.send_signal(signum)  # waiting here would never end: `wait` below holds a lock

    in_main_thread = threading.current_thread() is threading.main_thread()
    taken = [one for one in STOPPING if one != signal.SIGINT and signal.getsignal(one) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, hand_on) for signum in taken if in_main_thread}
    try:
        code = process.wait()
    except KeyboardInterrupt:  # a terminal sends it to both, `kill` only to this one
        try:
            process.wait(timeout=KEYBOARD_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # a child that is already saving ignores it
            process.wait()
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    if received:
        sys.exit(128 + received[0])
    return 128 - code if code < 0 else code


def is_stopped(pid: int) -> bool | None:
    """Whether a process of this machine is stopped (SIGSTOP, ^Z), not by a debugger; None if the system hides it."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def kill_with_children(pid: int, signum: int) -> None:
    """Send a signal to a process and to those that it started, such as loaders of its data."""
    listed = ""
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    for one in (*map(int, listed.split()), pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one, signum)


def _when_gone(parent: int, action: Callable[[], None]) -> None:
    """Call `action` from a thread once the process `parent` has ended."""
    if os.name == "nt":  # Windows keeps the pid of a parent that has ended
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        action()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _give_up() -> None:
    time.sleep(LATER_RANK_SECONDS)  # by then any failure has been reported
    os._exit(1)
