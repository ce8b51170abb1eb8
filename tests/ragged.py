"""A byte tokenizer, a two-layer GPT, ragged samples in memory: parts of a training that needs no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import Dataset

from llm_lightning.callbacks.checkpoints import Checkpoints, VerifiedCheckpointIO
from llm_lightning.callbacks.exact_resume import ExactResume
from llm_lightning.callbacks.signals import Signals
from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import Example, LMBatch, collate_padded
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import WarmupCosineConfig
from llm_lightning.tasks.pretraining import PretrainingModule
from llm_lightning.tokenizers.build import build_tokenizer

TINY = GPTConfig(vocab_size=257, context_length=16, n_layer=2, n_head=2, n_embd=16)


class Ragged(Dataset):
    """`n` random sequences of different lengths, the same in every process."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rows = [rng.integers(0, 257, rng.integers(2, 17)) for _ in range(n)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return Example(index, self.rows[index])


class RaggedDataModule(BaseDataModule):
    def __init__(self, n_train: int = 22, n_val: int = 7, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer = build_tokenizer("byte")
        self.train_samples = Ragged(n_train)
        self.eval_samples = {"val": Ragged(n_val, seed=1)}
        self.data_digest = "ragged"

    def build(self) -> None: ...

    def collate(self, samples: Any) -> LMBatch:
        return collate_padded(samples, pad_id=0)

    def preview(self, n: int) -> str:
        return ""

    def describe(self) -> str:
        return "random"

    def bytes_per_token(self, stage: str) -> float:
        return 1.0


def tiny_module(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **optimizer: Any) -> PretrainingModule:
    """A deterministic tiny module."""
    torch.manual_seed(0)
    config = GPTConfig(
        **{**TINY.__dict__, "embedding_dropout": dropout, "attention_dropout": dropout, "residual_dropout": dropout}
    )
    return PretrainingModule(
        model=GPT(config).to(dtype),
        tokenizer=build_tokenizer("byte"),
        optimizer=AdamWConfig(**{"lr": 1e-2, **optimizer}),
        scheduler=WarmupCosineConfig(warmup=2),
    )


def tiny_trainer(folder: Path, callbacks: list[L.Callback] | None = None, **options: Any) -> L.Trainer:
    """A Trainer as `experiments/run.py` builds it, without progress bar and loggers."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(
        **{**defaults, **options},
        default_root_dir=folder,
        callbacks=[ExactResume(), Signals(), *(callbacks if callbacks is not None else [Checkpoints(every_n_steps=3)])],
        plugins=[VerifiedCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
