"""Threads of a run's processes, with pretended cores and launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from tiny_run import ROOT

from llm_lightning.experiments import threads


class Cpu:
    """Eight cores, of which PyTorch takes all."""

    def __init__(self) -> None:
        self.threads = 8

    def set(self, n: int) -> None:
        self.threads = n


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cpu]:
    found = Cpu()
    monkeypatch.setattr(torch, "get_num_threads", lambda: found.threads)
    monkeypatch.setattr(torch, "set_num_threads", found.set)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(threads, "_ours", None)
    monkeypatch.setattr(threads, "_exported", None)
    for name in [name for name in os.environ if name.startswith(("OMP_", "SLURM_", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield found
    os.environ.clear()
    os.environ.update(before)


def trainer(ranks: int = 1, environment: Any = LightningEnvironment) -> Any:
    strategy: Any = SimpleNamespace(launcher=None)
    if ranks > 1:
        strategy = SimpleNamespace(cluster_environment=object.__new__(environment), launcher=object())
    return SimpleNamespace(num_devices=ranks, strategy=strategy, is_global_zero=True)


@pytest.mark.parametrize(
    ("ranks", "workers", "expected"), [(1, 0, 8), (2, 0, 4), (3, 0, 2), (16, 0, 1), (1, 1, 7), (1, 6, 6), (2, 2, 3)]
)
def test_ranks_and_loader_processes_share_the_cores(ranks: int, workers: int, expected: int, cpu: Cpu) -> None:
    threads.divide_cores(trainer(ranks), workers)
    assert cpu.threads == expected
    assert os.environ.get("OMP_NUM_THREADS") == (str(expected) if ranks > 1 else None)


def test_one_process_keeps_pytorchs_number_unless_a_quota_is_smaller(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.threads = 4  # physical cores
    threads.divide_cores(trainer(), 0)
    assert cpu.threads == 4
    monkeypatch.setattr(threads, "cores", lambda: 3)
    threads.divide_cores(trainer(), 0)
    assert cpu.threads == 3


def test_each_run_of_a_process_divides_all_cores(cpu: Cpu) -> None:
    for ranks, workers, expected in [(1, 2, 6), (1, 2, 6), (2, 0, 4), (2, 0, 4), (1, 0, 8)]:
        threads.divide_cores(trainer(ranks), workers)
        assert cpu.threads == expected
    cpu.set(3)  # the user's own, between two runs
    threads.divide_cores(trainer(), 0)
    assert cpu.threads == 3


def test_a_typed_number_wins(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    threads.divide_cores(trainer(2), 0)
    assert (cpu.threads, os.environ["OMP_NUM_THREADS"]) == (8, "5")


def test_tasks_of_slurm_have_their_own_cores(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    threads.divide_cores(trainer(2, SLURMEnvironment), 0)
    assert cpu.threads == 4, "tasks that are not bound see all cores of the node"
    del os.environ["OMP_NUM_THREADS"]
    cpu.threads = 4  # PyTorch counts those that the task is bound to
    monkeypatch.setattr(threads, "cores", lambda: 4)
    threads.divide_cores(trainer(2, SLURMEnvironment), 0)
    assert cpu.threads == 4


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "expected"), [({}, "4"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_torchruns_own_number_is_replaced_and_a_typed_one_is_not(typed: dict[str, str], expected: str) -> None:
    """In a child whose parent, as torchrun does, sets the number where it finds none."""
    child = (
        "import os, types; from llm_lightning.experiments import threads; threads.cores = lambda: 8\n"
        "import test_threads as t; threads.divide_cores(t.trainer(2), 0); print(os.environ['OMP_NUM_THREADS'])"
    )
    parent = (
        "import os, subprocess, sys; os.environ.setdefault('OMP_NUM_THREADS', '1')\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    )
    here = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "experiments")])
    environment = {**here, **typed, "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", parent], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.split()[-1:] == [expected], done.stderr


@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [("cpu", 2, "PASSIVE"), ("auto", "3", "PASSIVE"), ("cpu", 1, None), ("cpu", "auto", None), ("gpu", 2, None)],
)
def test_processes_that_share_a_cpu_wait_asleep(
    accelerator: str, devices: int | str, expected: str | None, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"accelerator": accelerator, "devices": devices}
    threads.choose_wait_policy(settings)
    assert "OMP_WAIT_POLICY" not in os.environ, "torch is loaded, and has read it"
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    threads.choose_wait_policy(settings)
    assert os.environ.get("OMP_WAIT_POLICY") == expected
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # by torchrun, which knows how many there are
    for name, number in [("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")]:
        monkeypatch.setenv(name, number)
    threads.choose_wait_policy({"accelerator": accelerator, "devices": "auto"})
    assert os.environ.get("OMP_WAIT_POLICY") == ("PASSIVE" if accelerator != "gpu" else None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    threads.choose_wait_policy(settings)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
