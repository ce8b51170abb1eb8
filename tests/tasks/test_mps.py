"""Every task on a GPU of Apple, pretended: no machine with one has run it. `pytest -n 0 -m mps` is for a real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pretended_mps import TASKS, Device, built
from tiny_run import SETTINGS, fit_here, write_corpus

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.optim.clipping import scale_and_clip_gradients


@pytest.mark.parametrize("task", TASKS)
def test_a_whole_step_needs_no_float64(task: str) -> None:
    module, batch = built(task)
    optimizer = module.optimizer_config.build(module.model.named_parameters())
    with Device("cpu") as seen:
        module.train().step_output(batch).loss_sum.backward()
        scale_and_clip_gradients(module.parameters(), 0.5, 1.0)
        optimizer.step()
    assert seen.calls > 50, "the step was not seen"


@pytest.mark.slow
def test_nothing_needs_float64_on_a_pretended_device() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", str(Path(__file__).with_name("pretended_mps.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(".") > 20 or "needs g++" in done.stdout, done.stdout[-3000:]


@pytest.mark.mps
@pytest.mark.parametrize("task", ["pretraining", "sft", "lora", "dpo", "classification"])
def test_losses_are_those_of_a_cpu(task: str, tmp_path: Path) -> None:
    """In float32, without dropout: sums in another order differ by 1e-7, and AdamW's first updates enlarge that."""
    corpus = write_corpus(tmp_path / "corpus.txt", 1000)
    words = [word for word in SETTINGS if not word.startswith(("accelerator=", "model.context_length=", "callbacks."))]
    words += ["model.dropout=0", "model.context_length=400", "callbacks.samples=null", "callbacks.plots=null"]
    words += [f"data.path={corpus}"] if task == "pretraining" else [f"task={task}", "callbacks.responses=null"]
    losses = {}
    for device in ("cpu", "mps"):
        outcome = fit_here([*words, f"accelerator={device}", f"hydra.run.dir={tmp_path / device}"])
        assert outcome.code == 0, outcome.err
        losses[device] = [value for _, value in read_metrics(tmp_path / device / "metrics.csv")["train/loss"]]
    assert losses["mps"] == pytest.approx(losses["cpu"], rel=2e-4)
