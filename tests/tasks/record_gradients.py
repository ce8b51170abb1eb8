"""Run by test_base.py in a process of its own: train the tiny module and save every update's gradients.

Arguments: a JSON object with trainer options, batch_size, dtype and out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import RaggedDataModule, tiny_module, tiny_trainer


class Recorder(L.Callback):
    def __init__(self, out: str) -> None:
        self.out, self.updates = Path(out), []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        clip = pl_module.configure_gradient_clipping

        def record(*args: Any, **kwargs: Any) -> None:
            clip(*args, **kwargs)
            self.updates.append({name: full(p.grad) for name, p in pl_module.model.named_parameters()})

        pl_module.configure_gradient_clipping = record

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        weights = {name: full(p.detach()) for name, p in pl_module.model.named_parameters()}
        val = float(trainer.callback_metrics["val/loss"])
        if trainer.is_global_zero:
            torch.save({"updates": self.updates, "weights": weights, "val/loss": val}, self.out)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dtype = getattr(torch, options.pop("dtype"))
    module = tiny_module(dtype=dtype, max_grad_norm=None)
    data = RaggedDataModule(batch_size=options.pop("batch_size"), seed=3)
    recorder = Recorder(options.pop("out"))
    if options.get("strategy") == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        options["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
    trainer = tiny_trainer(recorder.out.parent, [recorder], max_epochs=1, **options)
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    main()
