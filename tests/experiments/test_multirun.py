"""A multirun that an experiment file asks for: each of its jobs is one run, whatever the file says of Hydra."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import jobs_are_forks
from tiny_run import ROOT, SETTINGS, train_here, write_corpus

from llm_lightning.experiments.stages import plan

EXPERIMENT = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      optimizer.lr: 0.001,0.002
  callbacks:
    told:
      _target_: hydra.experimental.callbacks.LogJobReturnCallback
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """What is typed: `--config-dir`, the experiment, settings of a run of 4 steps."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "search.yaml").write_text(EXPERIMENT)
    data = f"data.path={write_corpus(tmp_path / 'corpus.txt')}"
    return [f"--config-dir={tmp_path / 'mine'}", *SETTINGS, data, "experiment=search"]


@pytest.mark.slow
def test_each_job_of_a_multirun_that_a_file_asks_for_is_one_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = jobs_are_forks(monkeypatch)
    outcome = train_here([*words, f"hydra.sweep.dir={tmp_path / 'sweep'}"])
    assert outcome.code == 0, outcome.err
    # Had one not become a run but another multirun, its own jobs would have folders, too.
    assert len(commands) == 2
    assert sorted(path.name for path in (tmp_path / "sweep").rglob("job.json")) == ["job.json"] * 2
    folder = tmp_path / "sweep" / "lr_0.002"
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    typed = json.loads((folder / "command.json").read_text())["overrides"]
    assert [word for word in typed if "hydra" in word] == [f"hydra.run.dir='{folder}'"]
    log = (folder / "train.log").read_text()
    assert log.count("Succeeded with return value") == 1, "the multirun has called the callback already"
    outcome = train_here([words[0], f"resume={folder}", "trainer.max_steps=6"])
    assert outcome.code == 0, outcome.err
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_what_such_a_file_sweeps_over_is_checked_first(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine" / "experiment" / "search.yaml"
    file.write_text(EXPERIMENT.replace("optimizer.lr:", "optimizer.lrr:"))
    outcome = train_here([*words, f"hydra.sweep.dir={tmp_path / 'sweep'}"])
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?" in outcome.err
    assert not (tmp_path / "sweep").exists()


def test_such_a_file_is_no_stage_of_a_pipeline(words: list[str], tmp_path: Path) -> None:
    stages = tmp_path / "mine" / "pipeline"
    stages.mkdir()
    (stages / "p.yaml").write_text("stages:\n  - name: a\n    overrides: [experiment=search]\n")
    with pytest.raises(ValueError, match="stage a: its experiment is a multirun"):
        plan([*words[:-1], "pipeline=p"], ROOT / "conf")
