"""A callback that writes how long each epoch took, validations included. Used by classification.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L


class EpochClock(L.Callback):
    def __init__(self, path: str) -> None:
        self.path, self.seconds = Path(path), []
        self.last = 0.0

    def on_train_start(self, *_: Any) -> None:  # before the task's own hook, which computes what frozen blocks give
        self.last = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        self.path.write_text(json.dumps(self.seconds))
