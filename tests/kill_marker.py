"""A callback that tells the outside, in one byte of a file, what a run is doing."""

from __future__ import annotations

import mmap
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
