"""Whether this machine has the kind of device that a run wants."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PRESENT: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "gpu": lambda: torch.cuda.is_available() or torch.backends.mps.is_available(),
}


def refuse_missing_device(accelerator: str) -> None:
    """Raise a ValueError unless PyTorch sees a device of the kind `trainer.accelerator`.

    Lightning's own error, later, names no remedy.
    """
    if accelerator in _PRESENT and not _PRESENT[accelerator]():
        raise ValueError(
            f"trainer.accelerator={accelerator}, but PyTorch {torch.__version__} sees no such device here; "
            "set trainer.accelerator=cpu, or accelerator=auto for the fastest that there is"
        )
