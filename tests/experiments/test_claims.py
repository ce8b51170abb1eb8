"""GPUs and cores of jobs that run side by side: locks that die with their process, with pretended devices."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.experiments.sweep import claims

FORK = multiprocessing.get_context("fork")


class Holder:
    """Another process, which claims and says what it got."""

    def __init__(self, folder: Path, names: list[str], wanted: Any, shares: int = 1) -> None:
        self.ours, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_hold, args=(folder, names, wanted, shares, theirs), daemon=True)
        self.process.start()

    def got(self, seconds: float = 10.0) -> tuple[str, ...] | None:
        """The names that it holds; None if it still waits after `seconds`."""
        return self.ours.recv() if self.ours.poll(seconds) else None

    def end(self) -> None:
        self.ours.send("end")
        self.process.join()


def _hold(folder: Path, names: list[str], wanted: Any, shares: int, pipe: Any) -> None:
    with claims.claimed(folder, names, wanted, shares=shares) as claim:
        assert claim is not None
        pipe.send(claim.names)
        pipe.recv()


Hold = Callable[..., Holder]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    holders: list[Holder] = []

    def made(wanted: Any, names: list[str], **options: Any) -> Holder:
        holders.append(Holder(tmp_path, names, wanted, **options))
        return holders[-1]

    yield made
    for holder in holders:
        holder.process.kill()


GPUS = ["0", "GPU-8f6b/1", "MIG-c2c1"]


def test_each_claims_its_own_and_the_next_waits_until_one_ends(hold: Hold) -> None:
    holders = [hold(1, GPUS) for _ in GPUS]
    assert sorted(holder.got() for holder in holders) == sorted((name,) for name in GPUS)  # type: ignore[type-var]
    late = hold(1, GPUS)
    assert late.got(1.0) is None
    holders[1].end()
    assert late.got() is not None


def test_a_killed_holder_gives_its_devices_to_the_one_that_waits(hold: Hold) -> None:
    first, second = hold(2, GPUS), hold(1, GPUS)
    assert first.got() is not None
    assert second.got() is not None
    late = hold(2, GPUS)
    assert late.got(1.0) is None
    os.kill(first.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    assert late.got() is not None


def test_a_child_that_trains_on_holds_the_devices_of_its_killed_parent(tmp_path: Path, hold: Hold) -> None:
    source = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom llm_lightning.experiments.sweep import claims\n"
        f"with claims.claimed(Path({str(tmp_path)!r}), ['0'], 1) as claim:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'input()'], pass_fds=claim.descriptors)\n"
        "    print(child.pid, flush=True)\n    child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    late = hold(1, ["0"])
    assert late.got(1.0) is None
    os.kill(child, signal.SIGKILL)
    assert late.got() == ("0",)


def test_listed_devices_are_those_and_jobs_may_share_one(hold: Hold) -> None:
    assert hold(["MIG-c2c1"], GPUS).got() == ("MIG-c2c1",)
    assert hold(["MIG-c2c1"], GPUS).got(1.0) is None
    shared = [hold(1, ["0", "1"], shares=2) for _ in range(3)]
    assert {holder.got() for holder in shared[:2]} <= {("0",), ("1",)}
    assert shared[2].got() is not None


def test_a_wait_ends_when_the_sweep_stops(tmp_path: Path, hold: Hold) -> None:
    assert hold(1, ["0"]).got() == ("0",)
    said: list[bool] = []
    began = time.monotonic()

    def stops() -> bool:
        return time.monotonic() - began > 0.5

    with claims.claimed(tmp_path, ["0"], 1, gives_up=stops, waits=lambda: said.append(True)) as claim:
        assert claim is None
    assert said == [True]


@pytest.mark.parametrize(
    ("trainer", "wanted"),
    [
        ({"accelerator": "auto", "devices": "auto"}, 1),
        ({"accelerator": "gpu", "devices": 2}, 2),
        ({"accelerator": "cuda", "devices": "2"}, 2),
        ({"accelerator": "auto", "devices": -1}, 3),
        ({"accelerator": "gpu", "devices": [2]}, ["MIG-c2c1"]),
        ({"accelerator": "gpu", "devices": "0,2"}, ["0", "MIG-c2c1"]),
        ({"accelerator": "cpu", "devices": 2}, 0),
        ({"accelerator": "mps", "devices": 1}, 0),
    ],
)
def test_how_many_a_job_wants(trainer: dict[str, Any], wanted: Any) -> None:
    assert claims.gpus_wanted(trainer, GPUS) == wanted
    assert claims.gpus_wanted(trainer, []) == 0


@pytest.mark.parametrize("devices", [4, [3], "1,7"])
def test_more_than_there_are_is_refused(devices: Any) -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices=.* asks for more GPUs than this machine shows \(3\)"):
        claims.gpus_wanted({"accelerator": "gpu", "devices": devices}, GPUS)


@pytest.mark.parametrize(
    ("variable", "seen"),
    [("0,1,2", ("0", "1", "2")), ("", ()), ("-1", ()), ("1,-1,2", ("1",)), (" MIG-a , GPU-b", ("MIG-a", "GPU-b"))],
)
def test_devices_that_the_variable_names(variable: str, seen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims.shutil, "which", lambda _: None)
    monkeypatch.setenv(claims.VISIBLE, variable)
    assert claims.visible_gpus() == seen


def test_devices_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(claims.VISIBLE, raising=False)
    shown = (
        "GPU 0: NVIDIA A100 (UUID: GPU-5c89)\n  MIG 1g.10gb Device 0: (UUID: MIG-c6d4)\n"
        "  MIG 1g.10gb Device 1: (UUID: MIG-cba6)\nGPU 1: NVIDIA A100 (UUID: GPU-41b9)\n"
    )
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{shown}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert claims.visible_gpus() == ("MIG-c6d4", "MIG-cba6", "GPU-41b9")
    monkeypatch.setenv(claims.VISIBLE, "1")
    assert claims.visible_gpus() == ("1",)  # which it is depends on CUDA_DEVICE_ORDER
    shown = "".join(f"GPU {n}: NVIDIA H100 (UUID: GPU-{n}a)\n" for n in range(3))
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{shown}END\n")
    monkeypatch.setenv(claims.VISIBLE, "2,0")
    assert claims.visible_gpus() == ("GPU-2a", "GPU-0a")


def test_cores_are_divided_and_a_smaller_setting_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "cores", lambda: 8)
    for variable, jobs, threads in [(None, 2, 4), (None, 3, 2), (None, 20, 1), ("1", 2, 1), ("6", 2, 4), ("x", 1, 8)]:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert claims.threads_each(jobs) == threads, (variable, jobs)


def test_processes_of_a_job_share_its_threads_and_slurm_allots_its_own() -> None:
    two = {"accelerator": "cpu", "devices": 2}
    assert claims.threads_of(4, two, {}) == 2
    assert claims.threads_of(1, two, {}) == 1
    assert claims.threads_of(4, {"accelerator": "gpu", "devices": 2}, {}) == 2
    assert claims.threads_of(None, two, {"SLURM_CPUS_ON_NODE": "8"}) is None
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_CPUS_ON_NODE": "8"}
    assert claims.threads_of(None, {"accelerator": "cpu", "devices": 1}, slurm) == 8
    assert claims.threads_of(None, two, slurm) == 4
    assert claims.threads_of(None, two, {**slurm, "SLURM_NTASKS_PER_NODE": "2"}) == 4
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    assert claims.threads_of(None, {"accelerator": "cpu", "devices": "auto"}, {**slurm, **step}) == 4
