"""Memory settings of training: narrow frozen weights, and how PyTorch and the C library treat freed memory."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn


def freeze_in_bfloat16(model: nn.Module) -> None:
    """Keep frozen matrices, and the biases beside them, in bfloat16; norms stay as they are."""
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()


def leave_fresh_memory_unfilled() -> None:
    """Switch off a side effect of deterministic algorithms: PyTorch fills all fresh memory with nan.

    The filling reveals reads of unwritten memory, and took 8% of each step in a profile on a CPU.
    `tests/tasks/test_unwritten_memory.py` trains every task with it on, and gets the same bits.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def trim_malloc() -> None:
    """Let glibc return freed memory between used blocks, such as the fp32 form of cast weights. Elsewhere: nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def disable_malloc_trim() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system. Elsewhere: nothing.

    By default every large tensor is mapped afresh and zeroed page by page at its first touch: at 124M parameters half
    a million page faults, and a third of the time, of each step on a CPU. Costs a few percent more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD in glibc's malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # as an unsigned size: never
