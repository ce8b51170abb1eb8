"""The moment at which this process last got anywhere: a batch, a checkpoint, a token. The watchdog looks at it."""

from __future__ import annotations

import time

_last = time.monotonic()


def mark(behind: float = 0.0) -> None:
    """Note that something was finished, now or `behind` seconds after the last time."""
    global _last
    _last = _last + behind if behind else time.monotonic()


def since() -> float:
    """Seconds since something was finished."""
    return time.monotonic() - _last
