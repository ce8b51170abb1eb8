"""Whether this machine has the kind of device that a run wants."""

from __future__ import annotations

import torch

_PRESENT = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "gpu": lambda: torch.cuda.is_available() or torch.backends.mps.is_available(),
}


def refuse_missing_device(accelerator: str) -> None:
    """Raise a ValueError unless PyTorch sees a device of the kind `trainer.accelerator`.

    Lightning's own error, later, names no remedy.
    """
    if not _PRESENT.get(accelerator, lambda: True)():
        raise ValueError(
            f"trainer.accelerator={accelerator}, but PyTorch {torch.__version__} sees no such device here; "
            "set trainer.accelerator=cpu, or accelerator=auto for the fastest that there is"
        )
