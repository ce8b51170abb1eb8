"""Train a tiny module and save every update's gradients, for test_base.py and test_sft.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from ragged import TINY, RaggedDataModule, tiny_module, tiny_trainer

from llm_lightning.data.batches import Example, LMBatch, collate_packed, collate_padded
from llm_lightning.models.gpt import GPT
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import WarmupCosineConfig
from llm_lightning.tasks.sft import SFTModule
from llm_lightning.tokenizers.build import build_tokenizer


class AnswersDataModule(RaggedDataModule):
    """The ragged sequences, of each of which another share is learnt."""

    def __init__(self, *, packed: bool, **options: Any) -> None:
        super().__init__(**options)
        self.packed = packed

    def collate(self, samples: Any) -> LMBatch:
        rows = []
        for index, ids, _ in samples:
            first = 1 + index * 7 % (len(ids) - 1)
            rows.append(Example(index, ids, np.arange(len(ids)) >= first))
        if self.packed:
            return collate_packed(rows, pad_id=0)
        return collate_padded(rows, pad_id=0, context_length=TINY.context_length)


def tiny_sft_module(dtype: torch.dtype = torch.float32, **optimizer: Any) -> SFTModule:
    """What `tiny_module` is for pretraining."""
    torch.manual_seed(0)
    return SFTModule(
        model=GPT(TINY).to(dtype),
        tokenizer=build_tokenizer("byte"),
        optimizer=AdamWConfig(**{"lr": 1e-2, **optimizer}),
        scheduler=WarmupCosineConfig(warmup=2),
    )


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


def train(options: dict[str, Any]) -> None:
    """Train with the trainer's options, `batch_size`, `dtype` and `out`; `packed` makes it SFT, on answers alone."""
    dtype = getattr(torch, options.pop("dtype"))
    packed, batches = options.pop("packed", None), {"batch_size": options.pop("batch_size"), "seed": 3}
    make = tiny_module if packed is None else tiny_sft_module
    module: Any = make(dtype=dtype, max_grad_norm=None)
    data = RaggedDataModule(**batches) if packed is None else AnswersDataModule(packed=packed, **batches)
    recorder = Recorder(options.pop("out"))
    if options.get("strategy") == "fsdp2":
        from llm_lightning.tasks.sharded_strategy import ShardedStrategy

        options["strategy"] = ShardedStrategy()
    trainer = tiny_trainer(recorder.out.parent, [recorder], max_epochs=1, **options)
    trainer.fit(module, datamodule=data)
