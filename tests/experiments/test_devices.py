"""Runs that want a device that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, fit_here

from llm_lightning.experiments.devices import refuse_missing_device


@pytest.mark.parametrize("accelerator", ["cpu", "auto", "tpu"])
def test_other_kinds_are_left_to_lightning(accelerator: str) -> None:
    refuse_missing_device(accelerator)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="it has a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "mps"])
def test_a_missing_device_is_refused_with_the_remedy(accelerator: str, tmp_path: Path) -> None:
    words = [word for word in SETTINGS if not word.startswith("accelerator=")]
    outcome = fit_here([f"accelerator={accelerator}", *words, f"hydra.run.dir={tmp_path / 'run'}"])
    assert outcome.code == 2
    assert f"error: trainer.accelerator={accelerator}, but PyTorch {torch.__version__} sees no such" in outcome.err
    assert "set trainer.accelerator=cpu, or accelerator=auto" in outcome.err
