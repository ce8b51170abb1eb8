"""Processes that a pipeline or a multirun starts: signals reach them, and none outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_lightning.signals import STOPPING, signal_at_death_of

PARENT = "LLM_LIGHTNING_PARENT"
"""The variable in which a process that is started here finds the pid of the one that started it."""
KEYBOARD_SECONDS = 5.0
"""After a SIGINT, until a child that ends without being told is told: the terminal sends Ctrl-C to both."""
LATER_RANK_SECONDS = 30.0
"""How long a later process of distributed training, which saves nothing, outlives the first one."""


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process of this package, which `end_with_parent` lets end with this one; `options` are Popen's."""
    environment = {**(options.pop("env", None) or os.environ), PARENT: str(os.getpid())}
    return subprocess.Popen(command, env=environment, **options)


def end_with_parent() -> None:
    """Get SIGTERM when the process that started this one here is gone: then this one saves itself and ends.

    A later process of distributed training, started by Lightning, ends by itself some time after the first one: it
    may wait for it for ever.
    """
    parent = os.environ.pop(PARENT, None)  # it is not the parent of what this process starts
    if parent is not None and parent.isdigit():
        if not signal_at_death_of(int(parent), signal.SIGTERM):
            _when_gone(int(parent), lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        _when_gone(os.getppid(), _give_up)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of `process`, as a shell says it: 128 + N where signal N ended it.

    A signal that tells this process to stop is handed on. The other one is given the time to save itself, then this
    one ends, with 128 + N too. A signal that this process ignores stays ignored.
    """
    received: list[int] = []

    def hand_on(signum: int, _: Any) -> None:
        received.append(signum)
        process.send_signal(signum)  # to wait for it in here would wait for ever: `wait` below holds a lock

    in_main_thread = threading.current_thread() is threading.main_thread()
    taken = [one for one in STOPPING if one != signal.SIGINT and signal.getsignal(one) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, hand_on) for signum in taken if in_main_thread}
    try:
        code = process.wait()
    except KeyboardInterrupt:  # a terminal sends it to both, `kill` to this one alone
        try:
            process.wait(timeout=KEYBOARD_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # one that is saving itself already ignores it
            process.wait()
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    if received:
        sys.exit(128 + received[0])
    return 128 - code if code < 0 else code


def _when_gone(parent: int, action: Callable[[], None]) -> None:
    """Call `action` from a thread once the process `parent` has ended."""
    if os.name == "nt":  # there a process keeps the number of a parent that has ended
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        action()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _give_up() -> None:
    time.sleep(LATER_RANK_SECONDS)  # what is to be said of a failure is said by then
    os._exit(1)
