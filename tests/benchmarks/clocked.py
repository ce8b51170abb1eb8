"""Training whose batches are timed one by one: ours by a Lightning Trainer, TRL's trainers; what they share."""

from __future__ import annotations

import logging
import time
from typing import Any


class Clock:
    """Ends and losses of all batches."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def tick(self, loss: float) -> None:
        """Note the end of a batch, and its mean loss."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.losses.append(loss)


def on_gpu() -> bool:
    """Whether to train on a GPU: where there is one, it is what a user would take."""
    import torch

    return torch.cuda.is_available()


def train_ours(module: Any, data: Any, clock: Clock, batches: int) -> None:
    """Fit a TaskModule for one epoch of so many batches."""
    import lightning as L

    class Ticks(L.Callback):
        """The clock, as a callback."""

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            clock.tick(outputs["loss"].item() / batch.n_targets)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu() else "cpu", devices=1, precision="bf16-mixed", deterministic=True, max_epochs=1,
        logger=False, callbacks=[Ticks()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_train_batches=batches, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


def clocked(trainer: type[Any], clock: Clock) -> type[Any]:
    """A trainer of TRL's that notes the end and the loss of each batch."""

    class Clocked(trainer):  # type: ignore[misc, valid-type]
        """It, with a clock."""

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step:  # the batch before is over, its update included
                clock.tick(self.last_loss.item())
            self.last_loss = super().training_step(*arguments, **options)
            return self.last_loss

        def train(self, *arguments: Any, **options: Any) -> Any:
            from transformers.trainer_callback import PrinterCallback

            self.remove_callback(PrinterCallback)
            result = super().train(*arguments, **options)
            clock.tick(self.last_loss.item())
            return result

    return Clocked


SHARED_ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "use_cpu": not on_gpu(),
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Of TRL's configurations: its defaults, but for gradient checkpointing, which costs time, and what it writes."""
