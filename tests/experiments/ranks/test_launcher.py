"""What a process learns from the variables of its launcher, with the values that each sets."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_lightning.experiments.ranks import naming
from llm_lightning.experiments.ranks.counts import counts
from llm_lightning.experiments.ranks.environments import environments
from llm_lightning.experiments.ranks.launcher import (
    is_main_process,
    is_one_of_several,
    launched,
    tasks_not_started,
    tasks_per_node,
)

PREFIXES = ("LOCAL_", "RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_", "MASTER_", "SLURM_", "TORCHELASTIC_", "SUBMITIT_")
SECOND_NODE = {"NODE_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {  # srun -N 2 -n 4: the job's numbers may be others
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "train.sh",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu-[03-04]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
BATCH = {  # sbatch --ntasks=2, without srun
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "train.sh",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "4321",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)


def start_by(monkeypatch: pytest.MonkeyPatch, *variables: dict[str, str]) -> None:
    for one in variables:
        for name, value in one.items():
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "by", "rank", "local_rank", "per_node", "address"),
    [
        ({}, "none", 0, 0, (), None),
        ({"NODE_RANK": "1"}, "none", 1, 0, (), None),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, "parent", 1, 1, (), None),
        (
            {"LOCAL_RANK": "0", "NODE_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
            "parent",
            2,
            0,
            (2, 2),
            None,
        ),
        (TORCHRUN, "torchrun", 3, 1, (2, 2), "10.0.0.1:29500"),
        # 15000 + 8 x 1234 + step 0
        (SRUN, "slurm", 3, 1, (2, 2), "gpu-03:24872"),
        ({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5000"}, "slurm", 3, 1, (2, 2), "head:5000"),
        ({**SRUN, **TORCHRUN}, "torchrun", 3, 1, (2, 2), "10.0.0.1:29500"),
        (BATCH, "none", 0, 0, (), None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "none", 0, 0, (), None),
        (LOCAL, "submitit", 1, 1, (2,), "127.0.0.1:19321"),  # 15000 + 4321
        ({**LOCAL, "SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_GLOBALID": "0"}, "none", 0, 0, (), None),
    ],
)
def test_each_launcher_tells_the_place_of_a_process(
    environment: dict[str, str], by: str, rank: int, local_rank: int, per_node: tuple[int, ...], address: str | None
) -> None:
    here = launched(environment)
    assert (here.by, here.rank, here.local_rank) == (by, rank, local_rank)
    assert (here.per_node, here.address) == (per_node, address)


def test_the_first_process_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main_process()
    assert not is_one_of_several()
    start_by(monkeypatch, SRUN)
    assert not is_main_process()
    assert is_one_of_several()
    start_by(monkeypatch, {"SLURM_PROCID": "0"})
    assert is_main_process()
    assert is_one_of_several()


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK=first is no number"):
        launched({"LOCAL_RANK": "first"})


def test_lists_of_slurm() -> None:
    assert tasks_per_node("2(x3),1") == (2, 2, 2, 1)
    hosts = {"gpu-[03-04,7],x1": "gpu-03", "a1,a2": "a1", "n[1-2]": "n1", "rack[1,3]n": "rack1n"}
    for listed, first in hosts.items():
        address = launched({**SRUN, "SLURM_STEP_NODELIST": listed}).address
        assert address is not None
        assert address.partition(":")[0] == first


# --- devices ---------------------------------------------------------------------------------------------------------


def test_open_devices_follow_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts({"devices": "auto"}) == {}
    for variables in (TORCHRUN, SRUN):
        with monkeypatch.context() as patch:
            start_by(patch, variables)
            assert counts({"devices": "auto"}) == {"devices": 2, "num_nodes": 2}
            assert counts({"devices": -1, "num_nodes": 2}) == {"devices": 2, "num_nodes": 2}
            for equal in (2, "2", [0, 1], "0,1"):
                assert counts({"devices": equal}) == {"num_nodes": 2}


@pytest.mark.parametrize(
    ("environment", "trainer", "message"),
    [
        (
            TORCHRUN,
            {"devices": 1},
            r"trainer\.devices=1, but torchrun started 2 processes on each node; set ",
        ),
        (SRUN, {"devices": 4}, r"trainer\.devices=4, but srun started 2 processes on each node"),
        (SRUN, {"devices": "auto", "num_nodes": 1}, r"trainer\.num_nodes=1, but srun started processes on 2;"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, {"devices": "auto"}, "srun started 3, 1 processes on the nodes"),
        ({**TORCHRUN, "WORLD_SIZE": "5"}, {"devices": "auto"}, "torchrun started 2, 3 processes on the nodes"),
        (BATCH, {"devices": "auto", "strategy": "ddp"}, r"has 2 tasks, but only this process runs: start it with srun"),
        (BATCH, {"devices": 2, "strategy": "auto"}, r"has 2 tasks, but only this process runs: start it with srun"),
    ],
)
def test_a_contradiction_is_one_line(
    environment: dict[str, str], trainer: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_by(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        counts(trainer)


def test_a_run_of_one_process_in_a_job_of_two_tasks_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    start_by(monkeypatch, BATCH)
    assert tasks_not_started() == 2
    assert counts({"devices": 1, "strategy": "auto"}) == {}
    start_by(monkeypatch, {"SLURM_JOB_NAME": "interactive"})  # salloc: a person types
    assert tasks_not_started() == 0


def test_lightning_hears_of_the_step_not_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environments() == []
    start_by(monkeypatch, SRUN)
    [of_step] = environments()
    of_step.validate_settings(num_devices=2, num_nodes=2)
    assert (of_step.world_size(), of_step.global_rank(), of_step.local_rank(), of_step.node_rank()) == (4, 3, 1, 1)
    assert (of_step.main_address, of_step.main_port) == ("gpu-03", 24872)
    assert of_step.creates_processes_externally


def test_one_task_of_slurm_starts_its_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    start_by(monkeypatch, {**BATCH, "SLURM_NTASKS": "1"})
    [alone] = environments()
    assert not alone.creates_processes_externally


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "my run/7"}, "torchrun_my-run-7"),
        (SRUN, "slurm_1234"),
        ({**SRUN, "SLURM_STEP_ID": "2"}, "slurm_1234_step_2"),
        ({**SRUN, "SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "7"}, "slurm_99_7"),
        ({}, None),
        ({"LOCAL_RANK": "1"}, None),
    ],
)
def test_a_run_is_named_by_its_launcher(
    environment: dict[str, str], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_by(monkeypatch, environment)
    assert naming.shared_name(["seed=1"]) == name


def test_two_commands_of_one_batch_script_are_two_runs_and_a_requeued_job_finds_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    start_by(monkeypatch, {**BATCH, "SLURM_NTASKS": "1"})
    names = [naming.shared_name([f"seed={seed}"]) for seed in (1, 2, 1)]
    assert names[0] == names[2] != names[1]
    assert str(names[0]).startswith("slurm_1234_")
    start_by(monkeypatch, {"SLURM_JOB_NAME": "interactive"})
    assert naming.shared_name(["seed=1"]) is None, "every command that a person types is a new run"
    start_by(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"})
    assert naming.shared_name(["seed=1"]) == "slurm_1234"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))  # srun --pty zsh
    assert naming.shared_name(["seed=1"]) is None


def test_the_name_reaches_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf

    from llm_lightning.experiments.launch import _name_folder
    from llm_lightning.experiments.settings.compose import prepare_hydra

    start_by(monkeypatch, SRUN)
    prepare_hydra()
    config = OmegaConf.create({"run_name": None, "dir": "outputs/${run_folder:${run_name}}"})
    _name_folder(config, ["hydra.run.dir=here"])
    assert config.dir != "outputs/slurm_1234"
    _name_folder(config, ["seed=1"])
    assert config.dir == "outputs/slurm_1234"
    config.run_name = "mine"
    _name_folder(config, ["run_name=mine"])
    assert config.dir == "outputs/mine"
