"""Whether `compile=true` can be done here: a compiler is tried before the model is handed to it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os

import lightning as L
import torch

from llm_lightning.tasks.base import TaskModule
from llm_lightning.terminal import one_line

log = logging.getLogger(__name__)


def compile_model(module: TaskModule, trainer: L.Trainer) -> None:
    """Compile the model, or say in one line why the run goes on without."""
    device = trainer.strategy.root_device  # its own: a trial on another GPU would take memory there
    reason = why_not_compiled(str(device))
    if reason is None:
        module.compile_model()
    elif trainer.is_global_zero:
        log.warning(
            "compile=true: not compiled, because no compiler for this device (%s) works: %s", device.type, reason
        )


@functools.cache
def why_not_compiled(device: str) -> str | None:
    """Why `torch.compile` cannot make code for this device, in one line; None: it can.

    A tiny function is compiled and run. It is new each time, so that no cache answers for a compiler that is gone. It
    is tried before training: in the middle of a step a fallback would draw the random numbers of dropout twice.
    """
    number = int.from_bytes(os.urandom(6), "big") / 2**48
    try:
        with torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext():
            torch.compile(lambda x: x.sin() + number)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, its wrapper or a version of Python raises
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    """The innermost cause: PyTorch wraps it in errors with long advice to its developers."""
    while (inner := error.__cause__ or getattr(error, "inner_exception", None)) is not None and inner is not error:
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
