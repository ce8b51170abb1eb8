"""A rank of two fails: all are gone within 15 seconds, the cause is where it is promised, and the run can go on."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from forked import Forked
from test_kill import assert_same_end
from tiny_run import ROOT, SETTINGS, living, write_corpus

STEPS = 12
GONE_SECONDS = 15.0
WATCHDOG_SECONDS = 6.0
RAISED = "the disk is made of cheese"
TWO = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
HOWS = ("raise", "SIGKILL", "SIGSTOP", "uneven")
MOMENTS = ("start", "training", "validation", "saving")
LAUNCHERS = ("train.py", "torchrun", "srun")
"""`srun`: two processes that were told their ranks, and that nobody watches."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Trial(NamedTuple):
    launcher: str
    how: str
    when: str
    rank: int = 1


class Result(NamedTuple):
    code: int
    err: str
    seconds: float
    """From the failure to the end of the last process."""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    corpus = write_corpus(tmp_path / "corpus.txt", 4000)
    words = [word for word in SETTINGS if not word.startswith(("accelerator=", "trainer.max_steps="))]
    return [
        *words,
        *TWO,
        f"data.path={corpus}",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=4",
        "trainer.limit_val_batches=4",
        "callbacks.checkpoints.every_n_steps=2",
        "model.dropout=0.1",
        "logger=csv",
        "allow_targets=[failing]",
        "+callbacks.failing._target_=failing.Failing",
        f"+callbacks.failing.path={tmp_path / 'fails'}",
    ]


def of_trial(command: Sequence[str], trial: Trial) -> list[str]:
    named = {"how": trial.how, "when": trial.when, "rank": trial.rank}
    minutes = WATCHDOG_SECONDS / 60 if trial.how == "uneven" else 1.0  # else the heartbeat is to be the first
    return [
        *command,
        f"callbacks.watchdog.minutes={minutes}",
        *(f"+callbacks.failing.{key}={value}" for key, value in named.items()),
    ]


def started(launcher: str, words: Sequence[str], folder: Path) -> list[subprocess.Popen[bytes] | Forked]:
    """The processes of a run that the launcher starts, each in a process group of the first."""
    if launcher == "srun":
        return list(_two_ranks(words, folder))
    runs = [sys.executable] if launcher == "train.py" else [sys.executable, "-m", "torch.distributed.run"]
    options = [] if launcher == "train.py" else ["--nproc-per-node=2", f"--master-port={free_port()}"]
    with (folder / "err").open("wb") as err, (folder / "out").open("wb") as out:
        full = [*runs, *options, str(ROOT / "train.py"), *words]
        return [subprocess.Popen(full, cwd=folder, stdout=out, stderr=err, start_new_session=True)]


def _two_ranks(words: Sequence[str], folder: Path, own: Iterable[Sequence[str]] = ((), ())) -> Iterator[Forked]:
    """Two processes that were told their ranks; `own` are words of each alone."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    for rank, more in zip("01", own, strict=True):
        yield Forked([*words, *more], folder, start_new_session=True, environment={**shared, "LOCAL_RANK": rank})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ended(launcher: str, words: Sequence[str], folder: Path) -> Result:
    """Start a run, and wait until the last of its processes has gone."""
    (folder / "fails").write_text("once")
    processes = started(launcher, words, folder)
    deadline = time.monotonic() + 600
    failed: float | None = None
    while any(process.poll() is None for process in processes) or any(living(one.pid) for one in processes):
        if failed is None and not (folder / "fails").exists():
            failed = time.monotonic()
        assert time.monotonic() < deadline, "some of its processes are left"
        time.sleep(0.05)
    seconds = time.monotonic() - failed if failed is not None else 0.0
    if launcher == "srun":
        outcomes = [process.communicate() for process in processes]
        return Result(max(abs(one.returncode or 0) for one in processes), "".join(err for _, err in outcomes), seconds)
    code = processes[0].returncode
    assert code is not None
    return Result(code, (folder / "err").read_text(), seconds)


def problems(trial: Trial, result: Result, run: Path) -> Iterator[str]:
    """What is not as promised."""
    limit = GONE_SECONDS + (WATCHDOG_SECONDS if trial.how == "uneven" else 0)
    if result.code == 0:
        yield "it did not fail"
    if result.seconds > limit:
        yield f"the last process went after {result.seconds:.1f} s"
    said = {
        "raise": RAISED,
        "SIGKILL": "(was ended by|ended without a word|Signal 9)",
        "SIGSTOP": "has not answered for 10 s",
        # It leaves the others in the middle of an epoch, or is at a decision of its own while they are at another.
        "uneven": "are out of step" if trial.when == "validation" else "no progress for",
    }[trial.how]
    lines = [line for line in result.err.splitlines() if line.strip()]
    rank = "" if trial.how == "uneven" else f"rank {trial.rank}: "
    if trial.launcher == "train.py" and not re.match(f"error: {rank}.*{said}", lines[-1]):
        yield f"the last line is {lines[-1]!r}"
    if trial.launcher == "torchrun" and not re.search(f"Root Cause.*{said}", result.err, re.DOTALL):
        yield f"the Root Cause is another: {result.err[-800:]}"
    text = ""
    with contextlib.suppress(OSError):
        text = (run / "error.txt").read_text()
    if trial.launcher == "srun" and not re.search(said, text):
        yield f"error.txt has {text!r}; {result.err[-800:]}"


def tried(trial: Trial, command: Sequence[str], folder: Path) -> list[str]:
    words = of_trial(command, trial)
    run = folder / "run"
    found = list(problems(trial, ended(trial.launcher, [*words, f"hydra.run.dir={run}"], folder), run))
    return [f"{trial}: {problem}" for problem in found]


@pytest.mark.slow
def test_the_cause_is_the_last_line_and_the_same_command_goes_on(command: list[str], tmp_path: Path) -> None:
    trial = Trial("train.py", "raise", "training")
    words = of_trial(command, trial)
    assert tried(trial, command, tmp_path) == []
    for name in ("run", "whole"):
        processes = started("train.py", [*words, f"hydra.run.dir={tmp_path / name}"], tmp_path)
        assert processes[0].wait(timeout=300) == 0, (tmp_path / "err").read_text()
    assert not (tmp_path / "run" / "error.txt").exists()
    assert_same_end(tmp_path / "whole", tmp_path / "run", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial",
    [
        Trial("train.py", "SIGSTOP", "training", 0),
        Trial("torchrun", "raise", "validation"),
        Trial("torchrun", "SIGSTOP", "training"),
        Trial("srun", "SIGKILL", "saving"),
        Trial("srun", "SIGSTOP", "validation"),
        Trial("srun", "raise", "start"),
        Trial("srun", "uneven", "training"),
    ],
    ids=lambda trial: "-".join(map(str, trial)),
)
def test_all_are_gone_and_the_cause_is_where_it_is_promised(trial: Trial, command: list[str], tmp_path: Path) -> None:
    assert tried(trial, command, tmp_path) == []


@pytest.mark.slow
def test_another_setting_on_one_rank_is_refused_by_both(command: list[str], tmp_path: Path) -> None:
    words = [*of_trial(command, Trial("srun", "raise", "start")), f"hydra.run.dir={tmp_path / 'run'}"]
    own = iter([["seed=1"], ["seed=2"]])
    ranks = list(_two_ranks(words, tmp_path, own))
    for rank in ranks:
        assert rank.wait(timeout=300) != 0
        assert "seed" in rank.communicate()[1]


@pytest.mark.soak
def test_sixty_failures(command: list[str], tmp_path: Path) -> None:
    kinds = [kind for kind in product(LAUNCHERS, HOWS, MOMENTS) if kind[1:] != ("uneven", "start")]
    trials = [Trial(*kind, rank=number % 2) for number, kind in enumerate([*kinds, *kinds][:60])]
    wrong: list[str] = []
    for number, trial in enumerate(trials):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = [word.replace(str(tmp_path / "fails"), str(folder / "fails")) for word in command]
        wrong += tried(trial, own, folder)
    assert not wrong, "\n".join(wrong)
