"""Fill a store of frozen results, in all processes together where the weights are sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llm_lightning import progress
from llm_lightning.files.frozen_cache import FrozenCache, FrozenCacheError
from llm_lightning.tasks.in_step import all_say

if TYPE_CHECKING:
    from llm_lightning.tasks.base import TaskModule

Compute = Callable[[list[int]], Tensor]


def fill(
    store: FrozenCache,
    module: TaskModule,
    keys: Sequence[bytes],
    n_rows: Sequence[int],
    compute: Compute,
    **options: Any,
) -> None:
    """`store.ensure`. With sharded weights every process computes with, since each holds a part of them.

    Each process leads in turn and adds what its folder lacks: usually nothing after the first, unless the processes
    have different disks.

    Raises:
        FrozenCacheError, ValueError: as `store.ensure`; in all processes if in one.
    """

    def finished(indices: list[int]) -> Tensor:
        values = compute(indices)
        progress.mark()
        return values

    if not module.is_sharded:
        store.ensure(keys, n_rows, finished, **options)
        return
    strategy = module.trainer.strategy
    error: Exception | None = None
    for leader in range(module.trainer.world_size):
        if leader == module.global_rank:
            error = _lead(store, strategy, leader, keys, n_rows, finished, options)
        else:
            while (indices := strategy.broadcast(None, src=leader)) is not None:
                finished(indices)
    if not all_say(module.trainer, "stores what it computed", error is None):
        raise error or FrozenCacheError(f"another process cannot keep {options['description']}")


def _lead(
    store: FrozenCache,
    strategy: Any,
    rank: int,
    keys: Sequence[bytes],
    n_rows: Sequence[int],
    compute: Compute,
    options: dict[str, Any],
) -> Exception | None:
    """Compute with all others what is missing here; returns what went wrong."""

    def together(indices: list[int]) -> Tensor:
        strategy.broadcast(indices, src=rank)
        return compute(indices)

    try:
        store.ensure(keys, n_rows, together, **options)
    except (FrozenCacheError, ValueError) as error:
        return error
    finally:
        strategy.broadcast(None, src=rank)
    return None
