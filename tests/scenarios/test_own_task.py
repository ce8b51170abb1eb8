"""A task outside this project, written as the top of tasks/base.py says: trained, continued, evaluated, in the help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, train_here, write_corpus

from llm_lightning.cli.main import main as cli
from llm_lightning.files.metrics_csv import read_metrics

MODULE = """
import torch

from llm_lightning.data.batches import IGNORE_INDEX
from llm_lightning.losses import token_log_probs
from llm_lightning.tasks.base import StepOutput, TaskModule


class Later(TaskModule):
    task, item = "later", "token"

    def step_output(self, batch):
        keep = batch.labels != IGNORE_INDEX
        hidden = self.model.hidden_states(batch.input_ids)
        losses = -token_log_probs(hidden[keep], self.model.head_weight(), batch.labels[keep])
        weights = torch.arange(1.0, keep.size(1) + 1).expand_as(keep)[keep]
        count = losses.new_tensor(float(batch.n_targets))
        return StepOutput((losses * weights).sum(), batch.n_targets, {"plain": (losses.detach().sum(), count)})

    def metric_names(self):
        return ("loss", "plain")
"""
YAML = """# @package _global_
# Later tokens weigh more.
defaults:
  - override /data: pretraining
task:
  _target_: own_later.Later
monitor: val/plain
monitor_mode: min
"""


def test_a_task_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own_later.py").write_text(MODULE)
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "later.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = ["--config-dir=mine", "task=later", "allow_targets=[own_later]", "run_name=first"]
    words = [*own, *SETTINGS, f"data.path={write_corpus(tmp_path / 'corpus.txt')}"]
    assert "task=later" in train_here(["--config-dir=mine", "--help"]).out
    for n_steps in (4, 6):
        outcome = train_here([*words, f"trainer.max_steps={n_steps}"])
        assert (outcome.code, outcome.err) == (0, "")
    folder = tmp_path / "outputs" / "later" / "first"
    curves = read_metrics(folder / "metrics.csv")
    assert [step for step, _ in curves["train/plain"]] == list(range(6))
    for (_, weighted), (_, plain) in zip(curves["train/loss"], curves["train/plain"], strict=True):
        assert weighted > plain
    capsys.readouterr()
    assert cli(["evaluate", str(folder), "--split", "val"]) == 0
    assert f"{curves['val/plain'][-1][1]:.4f} nats per token" in capsys.readouterr().out
    assert "not that of task=later" in caplog.text
    assert cli(["generate", str(folder), "to be", "--max-new-tokens", "4"]) == 0
    assert cli(["respond", str(folder), "--split", "test", "-o", "answers.json"]) == 2


def test_a_task_that_lacks_what_every_task_has_is_named() -> None:
    from llm_lightning.tasks.base import TaskModule

    class Half(TaskModule):
        task = "half"

    with pytest.raises(ValueError, match="task class Half does not define item, step_output"):
        Half(model=torch.nn.Linear(1, 1), tokenizer=None, optimizer=None, scheduler=None)  # type: ignore[arg-type]
