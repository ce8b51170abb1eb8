"""FSDP2 as a strategy of Lightning, with the checkpoints of every other strategy: `accelerator=fsdp`.

Lightning's ModelParallelStrategy numbers the optimizer's states by the order of all parameters, reads the numbers of
other strategies as its own, and loads a checkpoint without our checks. Here a file is what one process would write, so
that any strategy continues from it.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy

from llm_lightning.models.sharding import copy_parts, gathered, optimizer_parts
from llm_lightning.weights import checkpoint as checkpoints


class ShardedStrategy(ModelParallelStrategy):
    """Every process holds a part of weights, gradients and optimizer; `TaskModule.configure_model` shards the model.

    A save gathers one tensor at a time, and only the first process keeps it. To load, each process maps the file and
    copies its parts.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        # Weights that were gathered in inference mode could not be used by a later backward pass.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict(keep_vars=True), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return gathered(plain.state_dict(), keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        opened = getattr(self.checkpoint_io, "opened", None)
        return checkpoints.load_to_resume(self.broadcast(checkpoint_path), mmap=True, opened=opened)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        copy_parts(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        pairs = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        parts = [optimizer_parts(optimizer, state) for optimizer, state in pairs]
        # Past ModelParallelStrategy, which does nothing here.
        super(ModelParallelStrategy, self).load_optimizer_state_dict({"optimizer_states": parts})
