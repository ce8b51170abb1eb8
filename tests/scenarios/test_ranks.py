"""Runs of two processes under every launcher: one folder, the same bits, one clear line where something is wrong.

SLURM's variables are set here as srun sets them; torchrun is real. The reference is a run whose processes were told
their ranks one by one.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, finish_two
from test_kill import assert_same_end
from tiny_run import ROOT, SETTINGS, finish, write_corpus

from llm_lightning.experiments.ranks import naming, waiting
from llm_lightning.experiments.run_records import read_summary
from llm_lightning.weights import checkpoint as checkpoints

pytestmark = pytest.mark.slow

STEPS = 6
TWO = ["accelerator=ddp", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder / "corpus.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests"))
        yield folder


@pytest.fixture(scope="module")
def command(folder: Path) -> list[str]:
    own = [word for word in SETTINGS if "max_steps" not in word and "samples" not in word]
    return [
        *own,
        *TWO,
        f"data.path={folder}/corpus.txt",
        "model.dropout=0.2",
        "data.batch_size=2",
        f"trainer.max_steps={STEPS}",
        "callbacks.samples=null",
        "callbacks.checkpoints.every_n_steps=1",
        "allow_targets=[faulty]",
        "+callbacks.killed._target_=faulty.Killed",
        f"+callbacks.killed.path={folder}/kill",
    ]


@pytest.fixture(scope="module")
def whole(folder: Path, command: list[str]) -> Path:
    run = folder / "whole"
    outcome = finish_two([*command, "trainer.devices=2", f"hydra.run.dir={run}"], folder)
    assert outcome.code == 0, outcome.err
    return run


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def by_srun(rank: int, **more: str) -> dict[str, str]:
    """The variables of one of two tasks on one node; `srun -n 2` does not set SLURM_NTASKS_PER_NODE."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "two",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "here",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
        **more,
    }


def torchrun(options: list[str], words: list[str], folder: Path) -> subprocess.Popen[str]:
    importable = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": importable}
    started = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(started, cwd=folder, env=environment, **pipes)


def the_run(folder: Path) -> Path:
    """The one run folder that a command without a name has left."""
    [run] = (folder / "outputs" / "pretraining").iterdir()
    assert read_summary(run)["processes"] == 2
    return run


def test_tasks_of_srun_are_the_processes_of_one_run(command: list[str], whole: Path, tmp_path: Path) -> None:
    port = str(free_port())
    tasks = [Forked(command, tmp_path, environment=by_srun(rank, MASTER_PORT=port)) for rank in (0, 1)]
    for outcome in [finish(task) for task in tasks]:
        assert outcome.code == 0, outcome.err
    run = the_run(tmp_path)
    assert run.name == "slurm_77"
    assert_same_end(whole, run, STEPS)


def test_processes_with_other_settings_stop_before_the_first_step(command: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    rates = ("1e-3", "2e-3")
    tasks = [
        Forked([*command, f"optimizer.lr={rate}"], tmp_path, environment=by_srun(rank, MASTER_PORT=port))
        for rank, rate in enumerate(rates)
    ]
    difference = "the processes of this run disagree: optimizer.lr is 0.001 on rank 0 and 0.002 on rank 1; start"
    for rank, outcome in enumerate([finish(task) for task in tasks]):
        assert outcome.code == 2, outcome.err
        assert f"error: rank {rank}: {difference}" in outcome.err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_task_that_waits_says_for_whom_and_ends_in_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.5)
    monkeypatch.setattr(waiting, "JOIN_SECONDS", 0.2)
    monkeypatch.setattr(naming, "MEET_SECONDS", 5.0)
    here = by_srun(0, SLURM_JOB_NAME="interactive")  # so the first process names the folder
    outcome = finish(Forked(command, tmp_path, environment=here))
    address = f"127.0.0.1:{here['MASTER_PORT']}"
    assert outcome.code == 2
    assert f"waiting for 1 of 2 processes at {address}: start the others, or see why they ended" in outcome.err
    assert f"error: rank 0: the 2 processes of this run did not meet at {address} (" in outcome.err
    assert not (tmp_path / "outputs").exists()


def test_two_agents_of_torchrun_are_two_nodes_of_one_run(command: list[str], whole: Path, tmp_path: Path) -> None:
    options = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    agents = [torchrun([*options, f"--node-rank={rank}"], command, tmp_path) for rank in (0, 1)]
    for agent in agents:
        out, _ = agent.communicate(timeout=900)
        assert agent.returncode == 0, out
    assert_same_end(whole, the_run(tmp_path), STEPS)


def test_an_elastic_restart_continues_to_the_bit(command: list[str], whole: Path, tmp_path: Path, folder: Path) -> None:
    (folder / "kill").touch()
    options = ["--nproc-per-node=2", "--max-restarts=3", "--rdzv-id=again", "--rdzv-backend=c10d"]
    agent = torchrun([*options, "--rdzv-endpoint=localhost:0"], command, tmp_path)
    out, _ = agent.communicate(timeout=900)
    assert agent.returncode == 0, out
    assert not (folder / "kill").exists(), "nothing was killed"
    run = the_run(tmp_path)
    assert run.name == "torchrun_again"
    assert "Resuming from" in out
    assert checkpoints.read_header(run / "checkpoints" / "last.ckpt")["step"] == STEPS
    assert_same_end(whole, run, STEPS)


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="the extra sweep is not installed"
)
def test_tasks_of_a_job_of_submitit_are_the_processes_of_one_run(
    command: list[str], whole: Path, tmp_path: Path
) -> None:
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    words = [*command, "-m", "run_name=study", "seed=1234", *launcher]
    importable = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": importable}
    started = [sys.executable, str(ROOT / "train.py"), *words]
    ended = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    [summary] = (tmp_path / "outputs" / "sweeps" / "study").glob("*/summary.json")
    assert read_summary(summary.parent)["processes"] == 2
    assert_same_end(whole, summary.parent, STEPS)
