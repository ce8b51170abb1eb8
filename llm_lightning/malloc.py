"""How the C library treats freed memory. Elsewhere than on Linux: nothing."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # in glibc's malloc.h
_keeps_all = False


def trim_malloc() -> None:
    """Let glibc return freed memory between used blocks, such as the fp32 form of cast weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def disable_malloc_trim() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    By default every large tensor is mapped afresh and zeroed page by page at its first touch: at 124M parameters half
    a million page faults, and a third of the time, of each step on a CPU. Costs a few percent more memory.
    """
    global _keeps_all
    _keeps_all = True
    _set(_MMAP_MAX, 0)
    _set(_TRIM_THRESHOLD, -1)  # as an unsigned size: never


@contextmanager
def returning_large_blocks() -> Iterator[None]:
    """Return each freed tensor to the system at once: weights that are cast one by one leave no holes behind.

    By itself glibc maps fewer and fewer blocks on their own, the larger those were that it has freed; after the block
    it does so again, as after it has freed one of 32 MB.
    """
    if _keeps_all:
        yield
        return
    _set(_MMAP_THRESHOLD, 1 << 17)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, 1 << 25)
        _set(_TRIM_THRESHOLD, 1 << 26)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(option, value)
