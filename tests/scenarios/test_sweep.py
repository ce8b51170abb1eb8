"""A sweep that fails, is killed, mended and extended: every job once, with the bits of an undisturbed sweep."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_kill import CLOCK_METRICS, tensorboard
from tiny_run import ROOT, SETTINGS, assert_same, living, start, write_corpus

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

STUDY = """# @package _global_
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      data.path: {corpus}
      allow_targets: [faulty]
      +callbacks.faulty._target_: faulty.Faulty
      +callbacks.faulty.path: {folder}/nothing
      callbacks.checkpoints.every_n_steps: 3
      trainer.max_steps: {steps}
    jobs:
      plain_1: {{seed: 1}}
      missing: {{data.path: {folder}/missing.txt}}
      plain_2: {{seed: 2}}
      {more}
"""
MORE = """two_processes: {{accelerator: ddp, trainer.accelerator: cpu, trainer.devices: 2}}
      malformed: {{data.path: {folder}/malformed.jsonl}}
      spoilt: {{+callbacks.faulty.path: {folder}/spoils}}
      other_two: {{accelerator: ddp, trainer.accelerator: cpu, trainer.devices: 2, seed: 3}}
      plain_3: {{seed: 3}}
      wide: {{data.batch_size: 8}}
      fast: {{optimizer.lr: 0.01}}
      dropped: {{model.dropout: 0.3}}
      decayed: {{optimizer.weight_decay: 0.5}}"""
FAILING = {"missing": "os", "malformed": "error", "spoilt": "error"}


class Study:
    """Sweeps over the same jobs, each typed in a folder of its own."""

    def __init__(self, folder: Path, more: str, steps: int) -> None:
        self.folder = folder
        corpus = write_corpus(folder / "corpus.txt")
        (folder / "conf" / "sweep").mkdir(parents=True)
        filled = STUDY.format(corpus=corpus, folder=folder, steps=steps, more=more.format(folder=folder))
        (folder / "conf" / "sweep" / "study.yaml").write_text(filled)
        own = [word for word in SETTINGS if not word.startswith("trainer.max_steps")]
        self.words = [f"--config-dir={folder / 'conf'}", *own, "sweep=study", "run_name=study"]
        (folder / "spoils").touch()
        (folder / "malformed.jsonl").write_text('{"text": \n')

    def mend(self) -> None:
        text = (self.folder / "corpus.txt").read_text()
        (self.folder / "missing.txt").write_text(text)
        (self.folder / "malformed.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (self.folder / "spoils").unlink()

    def start(self, place: str, *more: str) -> subprocess.Popen[str]:
        (self.folder / place).mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        output = (self.folder / f"{place}.log").open("a")
        command = [sys.executable, str(ROOT / "train.py"), *self.words, *more]
        with output:
            return subprocess.Popen(
                command,
                cwd=self.folder / place,
                env=environment,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def run(self, place: str, *more: str) -> int:
        return self.start(place, *more).wait(timeout=900)

    def said(self, place: str) -> str:
        return (self.folder / f"{place}.log").read_text()

    def begun(self, place: str) -> int:
        """How many attempts at jobs have begun."""
        log = self.folder / f"{place}.log"
        return log.read_text().count("Sweep study: job ") if log.exists() else 0

    def jobs(self, place: str) -> dict[str, Path]:
        return {path.parent.name: path.parent for path in sorted((self.folder / place).rglob("job.json"))}


def kill(study: Study, moments: random.Random, *, group: bool) -> None:
    """Start a sweep and kill it among its jobs, alone or with all that it started, unless it ends first."""
    before = study.begun("killed")
    process = study.start("killed")
    wanted, deadline = before + moments.randint(1, 3), time.monotonic() + 120
    while study.begun("killed") < wanted and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(moments.uniform(0, 6))
    if process.poll() is None:
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        assert process.wait() == -signal.SIGKILL


def all_gone(group: int, seconds: float = 5.0) -> bool:
    """Whether no process of a group is left, at the latest after some time."""
    deadline = time.monotonic() + seconds
    while living(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not living(group)


def finished_in(log: str) -> list[str]:
    return re.findall(r"Finished \d+ steps", log)


def assert_same_jobs(study: Study, place: str, reference: str) -> None:
    ours, theirs = study.jobs(place), study.jobs(reference)
    assert ours.keys() == theirs.keys()
    for name, folder in ours.items():
        one, other = (checkpoints.load(run / "checkpoints" / "last.ckpt") for run in (folder, theirs[name]))
        for key in ("state_dict", "optimizer_states", "rng", "global_step", "position"):
            assert_same(one[key], other[key], f"{name}.{key}")
        rows, others = (read_metrics(run / "metrics.csv") for run in (folder, theirs[name]))
        for metric in rows.keys() - CLOCK_METRICS:
            assert rows[metric] == others[metric], (name, metric)
        assert tensorboard(folder) == tensorboard(theirs[name])
        assert len(finished_in((folder / "train.log").read_text())) == 1, name


@pytest.mark.parametrize(
    ("more", "steps", "kills"),
    [
        pytest.param("", 6, 2, marks=pytest.mark.slow, id="few"),
        pytest.param(MORE, 30, 20, marks=pytest.mark.soak, id="many"),
    ],
)
def test_a_sweep_that_fails_is_killed_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, steps: int, kills: int
) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    study = Study(tmp_path, more, steps)
    moments = random.Random(1)
    for number in range(kills):
        kill(study, moments, group=number % 2 == 0)
    assert study.run("killed") == 2, study.said("killed")
    jobs = study.jobs("killed")
    failing = {name: kind for name, kind in FAILING.items() if name in jobs}
    for name, folder in jobs.items():
        assert (folder / "summary.json").is_file() == (name not in failing), study.said("killed")
        if name in failing:
            assert json.loads((folder / "failure.json").read_text())["kind"] == failing[name]
    assert f"{len(failing)} of {len(jobs)} jobs failed" in study.said("killed")

    study.mend()
    command = shlex.split(study.said("killed").rstrip().splitlines()[-1].rpartition("run only them: python ")[2])
    retried = study.start("killed", *(word for word in command if "retry_failed" in word))
    assert retried.wait(timeout=600) == 0, study.said("killed")
    assert study.said("killed").count(f"{len(failing)} to run") >= 1
    assert all_gone(retried.pid)
    assert study.run("whole") == 0, study.said("whole")
    assert_same_jobs(study, "killed", "whole")
    finished = {name: (folder / "summary.json").stat().st_mtime_ns for name, folder in study.jobs("killed").items()}

    assert study.run("killed", "seed=1,7", "hydra.sweeper.only=plain_1") == 0, study.said("killed")
    assert study.jobs("killed").keys() - finished.keys() == {"plain_1-seed_7"}
    assert all(
        (study.jobs("killed")[name] / "summary.json").stat().st_mtime_ns == was for name, was in finished.items()
    )


@pytest.mark.parametrize(
    ("different", "equal"),
    [pytest.param(2, 2, marks=pytest.mark.slow, id="few"), pytest.param(16, 4, marks=pytest.mark.soak, id="many")],
)
def test_what_starts_at_once_shares_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, different: int, equal: int
) -> None:
    """Half of the different ones are runs, half are sweeps; none has a name."""
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    data = [*SETTINGS, f"data.path={write_corpus(tmp_path / 'corpus.txt')}"]
    several = [[f"seed={n}"] if n % 2 else ["-m", f"seed={n},{n + 100}"] for n in range(different)]
    processes = [start([*words, *data], tmp_path) for words in several]
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    trained = [path.parent for path in sorted(tmp_path.rglob("summary.json"))]
    assert len(trained) == different // 2 + different // 2 * 2
    for folder in trained:
        assert len(finished_in((folder / "train.log").read_text())) == 1
    same = [start(["-m", "seed=7,8", "trainer.max_steps=300", "run_name=same", *data], tmp_path) for _ in range(equal)]
    said = [process.communicate(timeout=600)[1] for process in same]
    refused = [err for process, err in zip(same, said, strict=True) if process.returncode == 2]
    assert len(refused) == equal - 1, said
    for err in refused:
        assert "sweep folder" in err.splitlines()[-1]
        assert "is in use by process" in err.splitlines()[-1]
    for name in ("seed_7", "seed_8"):
        assert len(finished_in((tmp_path / "outputs" / "sweeps" / "same" / name / "train.log").read_text())) == 1
