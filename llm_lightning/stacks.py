"""What the threads of this process are doing. Standard library only."""

from __future__ import annotations

import sys
import threading
import traceback

_WATCHING = ("watchdog", "line", "watch-parent")
"""Names of threads that do nothing for the run."""


def stacks() -> str:
    """The Python stacks of this process, that of the main thread last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == threading.main_thread().ident)
    return "\n".join(
        f"thread {names.get(number, number)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for number, frame in frames
        if names.get(number) not in _WATCHING
    )
