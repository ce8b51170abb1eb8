"""The moment at which this process last got anywhere: a batch, a checkpoint, a token. The watchdog looks at it."""

from __future__ import annotations

import time

_last = time.monotonic()


def mark() -> None:
    """Note that something was finished."""
    global _last
    _last = time.monotonic()


def skip(seconds: float) -> None:
    """Note that nothing could be finished for some time: the process was stopped."""
    global _last
    _last += seconds


def since() -> float:
    """Seconds since something was finished."""
    return time.monotonic() - _last
