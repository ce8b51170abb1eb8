"""Imported once by the fork server: all that a run imports. It makes no tensor, no thread and no file.

Signals that go to a whole process group must not end the server, whose forks then could not report how they ended.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
import signal

from llm_lightning.signals import STOPPING

for _signum in STOPPING:
    signal.signal(_signum, signal.SIG_IGN)

for _room in ("callbacks", "data", "experiments", "tasks"):
    _package = importlib.import_module(f"llm_lightning.{_room}")
    for _module in pkgutil.iter_modules(_package.__path__, f"llm_lightning.{_room}."):
        importlib.import_module(_module.name)
for _name in ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg", "hydra", "yaml"):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # what is imported here stays shared with the forks
