"""The parent of the ranks: its last line is the cause, its exit code that of the rank, and no process is left.

The ranks import no torch (`rank_stub.py`); whole runs are in `tests/scenarios/test_failing_ranks.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from llm_lightning.experiments.ranks.local import local_ranks

STUB = Path(__file__).parents[2] / "rank_stub.py"
ROOT = STUB.parents[1]
GONE_SECONDS = 15.0


class Ended(NamedTuple):
    code: int
    lines: list[str]
    """Of stderr."""
    seconds: float
    """Since all ranks were ready."""
    folder: Path

    @property
    def text(self) -> str:
        return (self.folder / "error.txt").read_text()


def start(folder: Path, words: str, ranks: int = 3) -> subprocess.Popen[str]:
    command = [sys.executable, str(STUB), "supervise", str(ranks), str(folder), *words.split()]
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "SLURM_NTASKS")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def pids(folder: Path, ranks: int = 3) -> list[int]:
    """The processes of the ranks, once all are ready."""
    deadline = time.monotonic() + 120
    files = [folder / f"ready_{rank}" for rank in range(ranks)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, "the ranks did not come up"
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def run(folder: Path, words: str, act: Callable[[subprocess.Popen[str], list[int]], None] | None = None) -> Ended:
    """The end of a run whose ranks, or `act`, do something once all are ready."""
    process = start(folder, words)
    ranks = pids(folder)
    ready = time.monotonic()
    if act is not None:
        act(process, ranks)
    _, errors = process.communicate(timeout=120)
    while any(map(is_alive, ranks)) and time.monotonic() - ready < 60:
        time.sleep(0.02)  # only if the parent itself was killed
    seconds = time.monotonic() - ready
    assert not [pid for pid in ranks if is_alive(pid)]
    return Ended(process.returncode, errors.splitlines(), seconds, folder)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


FAILURES = {
    "1 raise": (2, r"error: rank 1: the disk is made of cheese"),
    "0 raise": (2, r"error: rank 0: the disk is made of cheese"),
    "all raise": (2, r"error: the disk is made of cheese"),
    "2 fault": (70, r"error: rank 2: unforeseen KeyError at .*a fault.*traceback.txt"),
    "1 exit": (3, r"error: rank 1: process \d+ on \S+ ended with exit code 3"),
    "1 SIGKILL": (137, r"error: rank 1: process \d+ on \S+ was ended by SIGKILL"),
    "0 SIGKILL": (137, r"error: rank 0: process \d+ on \S+ was ended by SIGKILL"),
    "1 SIGSTOP": (137, r"error: rank 1: process \d+ on \S+ has not answered for 10 s"),
    "0 SIGSTOP": (137, r"error: rank 0: process \d+ on \S+ has not answered for 10 s"),
    "1 stall": (1, r"error: rank 0: no progress for 3 minutes; the stacks are above"),
    "1 SIGSTOP watched": (137, r"error: rank 1: process \d+ on \S+ is stopped: no progress for 3 minutes"),
    "1 raise unmet": (2, r"error: rank 1: the disk is made of cheese"),
    "1 SIGKILL unmet": (137, r"error: rank 1: process \d+ on \S+ was ended by SIGKILL"),
    "1 SIGKILL unmet saves": (137, r"error: rank 1: process \d+ on \S+ was ended by SIGKILL"),
    "1 SIGSTOP unmet": (137, r"error: rank 1: process \d+ on \S+ has not answered for 10 s"),
    "1 SIGKILL gloo": (137, r"error: rank 1: process \d+ on \S+ was ended by SIGKILL"),
}
"""What a rank does -> the exit code, and the last line. `unmet`: before the ranks have met."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("words", FAILURES)
def test_the_last_line_is_the_cause_and_all_are_gone(words: str, tmp_path: Path) -> None:
    code, line = FAILURES[words]
    if "unmet" in words and "raise" not in words:  # no rank came so far as to forget an earlier session
        for name in ("error.txt", "failure.json"):
            (tmp_path / name).write_text("an earlier cause")
    ended = run(tmp_path, words)
    assert ended.code == code
    assert re.fullmatch(line, ended.lines[-1]), ended.lines
    assert ended.seconds < GONE_SECONDS
    assert not [line for line in ended.lines if "gloo" in line], "what follows from the cause"
    rank = re.search(r"rank (\d)", ended.lines[-1])
    assert rank is None or f"rank {rank[1]} of 3 (process " in ended.text
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["exit_code"] == code
    if rank is not None and rank[1] == "1":
        assert "a word of rank 1" in ended.lines
    assert "a word of rank 2" not in ended.lines or "2 fault" in words


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stop_of_one_rank_before_they_meet_stops_all(tmp_path: Path) -> None:
    ended = run(tmp_path, "1 SIGTERM unmet saves")
    assert (ended.code, ended.seconds < GONE_SECONDS) == (143, True)
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_ends_well_shows_nothing_of_later_ranks(tmp_path: Path) -> None:
    ended = run(tmp_path, "all end")
    assert (ended.code, ended.lines) == (0, ["a word of rank 0"])
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_stacks_of_a_stalled_run_are_shown(tmp_path: Path) -> None:
    ended = run(tmp_path, "1 stall")
    for rank in range(3):
        assert f"--- Python stacks of rank {rank} of 3 ---" in ended.lines
    assert sum("time.sleep(" in line for line in ended.lines) >= 3, "where each of them waits"


@pytest.mark.slow
def test_a_stalled_run_of_one_process_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(STUB), str(tmp_path), "0", "stall"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: no progress for 3 minutes; the stacks are above"
    assert "time.sleep(" in ended.stderr, "where the main thread waits"
    assert json.loads((tmp_path / "failure.json").read_text())["exit_code"] == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_group_goes_on(tmp_path: Path) -> None:
    """As by ^Z, for longer than a silent rank has."""

    def act(process: subprocess.Popen[str], ranks: list[int]) -> None:
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(13)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(3)
        assert process.poll() is None
        assert all(map(is_alive, ranks))
        process.send_signal(signal.SIGTERM)

    ended = run(tmp_path, "nobody waits", act)
    assert ended.code == 143
    assert not [line for line in ended.lines if line.startswith("error")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_outlives_its_killed_parent(tmp_path: Path) -> None:
    ended = run(tmp_path, "nobody waits", lambda process, _: process.kill())
    assert ended.code == -signal.SIGKILL
    assert ended.seconds < GONE_SECONDS


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        ({"accelerator": "cpu", "devices": 2, "strategy": "ddp"}, 2),
        ({"accelerator": "cpu", "devices": "auto", "strategy": "ddp"}, 1),
        ({"accelerator": "gpu", "devices": [0, 2, 3], "strategy": "auto"}, 3),
        ({"accelerator": "gpu", "devices": "0,1", "strategy": "auto"}, 2),
        ({"accelerator": "auto", "devices": "4", "strategy": {"_target_": "a.Strategy"}}, 4),
        ({"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}, 1),
        ({"accelerator": "mps", "devices": 1, "strategy": "auto"}, 1),
    ],
)
def test_the_settings_tell_how_many_ranks_to_start(
    trainer: dict[str, object], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_NTASKS", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = {"trainer": trainer, "data": {}, "plot_lr": False}
    assert local_ranks(config) == ranks
    assert local_ranks({**config, "plot_lr": True}) == 1, "nothing is trained"
    monkeypatch.setenv("PMI_SIZE", "1")  # one task of srun --mpi=pmi2
    assert local_ranks(config) == ranks
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert local_ranks(config) == 1, "somebody else starts them"
