"""Callbacks that tell the outside what a run is doing, in one byte of a file, and which samples it trained on."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import lightning as L

STARTING, TRAINING, VALIDATING, SAMPLING, SAVING = b"s", b"t", b"v", b"p", b"w"


class Marker(L.Callback):
    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self.byte = mmap.mmap(file.fileno(), 1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.byte[0:1] = TRAINING

    def on_validation_batch_start(self, *_: Any) -> None:
        self.byte[0:1] = VALIDATING

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.byte[0:1] = SAMPLING  # until `on_validation_end`, the last of whose callbacks this one is

    def on_save_checkpoint(self, *_: Any) -> None:
        self.byte[0:1] = SAVING  # until the next batch: what is written comes after this hook

    def on_validation_end(self, *_: Any) -> None:
        self.byte[0:1] = TRAINING


class Seen(L.Callback):
    """Appends a line for each training batch: its epoch, its number, the process, and its samples."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        line = json.dumps([trainer.current_epoch, batch_idx, trainer.global_rank, batch.sample_ids]) + "\n"
        os.write(self.file, line.encode())  # at once, or a kill would take what is in a buffer
