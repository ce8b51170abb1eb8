"""A callback that spoils the weights while a file exists: the loss is not finite, until somebody mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L


class Faulty(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.path.exists():
            next(pl_module.parameters()).data.fill_(float("nan"))
