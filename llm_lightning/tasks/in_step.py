"""Yes or no for all processes of a run together, and the discovery that they are no longer at the same point.

Collective operations pair by their order alone. Where one process trains on while another saves, because data or a
callback ended its training, gloo adds the numbers of the one to those of the other if they have the same size.
"""

from __future__ import annotations

import zlib

import lightning as L
import torch

_BITS = 16
"""Of an answer, for the count of those who say yes; the point stands above them."""


def any_says(trainer: L.Trainer, point: str, answer: bool) -> bool:
    """Whether any process says yes; a collective call.

    Args:
        point: what the process is about to do, after "this process"; the same in all.

    Raises:
        ValueError: the processes are at different points.
    """
    return _yes(trainer, point, answer) > 0


def all_say(trainer: L.Trainer, point: str, answer: bool) -> bool:
    """Whether every process says yes; otherwise as `any_says`."""
    return _yes(trainer, point, answer) == trainer.world_size


def _yes(trainer: L.Trainer, point: str, answer: bool) -> int:
    """How many say yes."""
    size = trainer.world_size
    if size == 1:
        return int(answer)
    here = zlib.crc32(point.encode()) << _BITS
    mine = torch.tensor(here + answer, device=trainer.strategy.root_device)
    total = int(trainer.strategy.reduce(mine, reduce_op="sum"))
    n_yes = total - size * here
    if not 0 <= n_yes <= size:
        raise ValueError(
            f"the processes of this run are out of step: this process {point}, another one does something else; "
            "batches, hooks and callbacks must be equally many in all of them, and so must what ends a training"
        )
    return n_yes
