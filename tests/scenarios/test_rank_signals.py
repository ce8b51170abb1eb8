"""Signals to a run of two processes: to the typed one, to one rank, to the whole group, once or twice.

What is saved continues to the bits of the run that nobody disturbed, and no process is left. Which process starts the
ranks does not matter here: a rank is found by `LOCAL_RANK` in its environment.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from kill_marker import SAVING, STARTING, VALIDATING
from test_kill import assert_same_end
from test_sweep import all_gone
from tiny_run import ROOT, living, start, write_corpus

from llm_lightning.weights import checkpoint as checkpoints

STEPS = 60
COMMAND = [
    "tokenizer=byte",
    "accelerator=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    "model.context_length=32",
    "model.dropout=0.2",
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    f"trainer.max_steps={STEPS}",
    "trainer.max_epochs=-1",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.val_check_interval=20",
    "trainer.limit_val_batches=4",
    "callbacks.checkpoints.every_n_steps=10",
    "callbacks.samples=null",
    "callbacks.plots=null",
    "allow_targets=[kill_marker]",
    "+callbacks.marker._target_=kill_marker.Marker",
]
GONE_SECONDS = 60.0
"""After the end of the typed process: a later rank may wait for a rank that was killed."""


class Trial(NamedTuple):
    signum: signal.Signals
    to: str
    """`typed`, `rank 0`, `rank 1`, or `group`."""
    moment: str
    """`imports`, `start`, `training`, `validation` or `saving`."""
    gap: float | None = None
    """Seconds until the same signal again."""


class Result(NamedTuple):
    trial: Trial
    code: int
    step: int | None
    """Of the newest checkpoint; None: nothing was saved."""
    seconds: float
    words: str
    problem: str

    def row(self) -> str:
        signum, to, moment, gap = self.trial
        twice = "once" if gap is None else f"+{gap:.1f} s"
        end = self.problem or "bitwise equal"
        return f"{signum.name:8} {to:7} {moment:11} {twice:7} {self.code:4} {self.step!s:5} {self.seconds:6.1f}  {end}"


def start_run(folder: Path) -> subprocess.Popen[str]:
    marker = folder.with_suffix(".marker")
    marker.write_bytes(STARTING)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    corpus = folder.parent / "corpus.txt"
    words = [*COMMAND, f"data.path={corpus}", f"+callbacks.marker.path={marker}", f"hydra.run.dir={folder}"]
    with folder.with_suffix(".log").open("a") as log:
        log.truncate(0)
        return start(words, folder.parent, stdout=log, stderr=log, start_new_session=True)


def said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


def rank(process: subprocess.Popen[str], number: int) -> int | None:
    """The pid of a rank; rank 0 may be the typed process."""
    for pid in living(process.pid):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if f"LOCAL_RANK={number}".encode() in environment and b"train.py" in command:
            return pid
    return process.pid if number == 0 else None


def send(process: subprocess.Popen[str], trial: Trial) -> None:
    if trial.to == "group":
        os.killpg(process.pid, trial.signum)
        return
    pid = process.pid if trial.to == "typed" else rank(process, int(trial.to[-1]))
    assert pid is not None, "no such rank yet"
    try:
        os.kill(pid, trial.signum)
    except ProcessLookupError:
        assert trial.gap is not None  # it has ended before the second


def reached(process: subprocess.Popen[str], folder: Path, trial: Trial, moments: random.Random) -> None:
    """Wait for the moment of a trial."""
    marker, wanted = folder.with_suffix(".marker"), {"validation": VALIDATING, "saving": SAVING}.get(trial.moment)
    deadline = time.monotonic() + 600

    def until(holds: object) -> None:
        while not holds():  # type: ignore[operator]
            assert process.poll() is None, f"ended before the signal: {said(folder)[-2000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    if trial.moment == "imports":
        time.sleep(moments.uniform(0.3, 1.5))
    elif trial.moment == "start":
        until(lambda: rank(process, 1) is not None)
        time.sleep(moments.uniform(0.5, 8.0))
    else:
        until(lambda: marker.read_bytes() != STARTING)
        time.sleep(moments.uniform(0, 0.2))
        if wanted is not None:
            until(lambda: marker.read_bytes() == wanted)


def attempt(folder: Path, trial: Trial, moments: random.Random) -> Result:
    process = start_run(folder)
    try:
        reached(process, folder, trial, moments)
        sent = time.monotonic()
        send(process, trial)
        if trial.gap is not None:
            time.sleep(trial.gap)
            send(process, trial)
        code, seconds = process.wait(timeout=600), time.monotonic() - sent
        words, problem = said(folder), ""
        if not all_gone(process.pid, GONE_SECONDS):
            problem = f"left: {living(process.pid)}"
    finally:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)
    newest = checkpoints.newest_valid(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    step = checkpoints.read_header(newest)["step"] if newest else None
    again = start_run(folder)
    if again.wait(timeout=600) != 0 or not all_gone(again.pid, GONE_SECONDS):
        return Result(trial, code, step, seconds, words, f"does not go on: {said(folder)[-2000:]}")
    try:
        assert_same_end(folder.parent / "whole", folder, STEPS)
    except AssertionError as error:
        problem = problem or f"differs: {str(error)[:200]}"
    return Result(trial, code, step, seconds, words, problem or wrong_end(trial, code, words, seconds))


def wrong_end(trial: Trial, code: int, words: str, seconds: float) -> str:
    """What is not as promised of the end of a signalled run; empty: nothing."""
    if trial.signum == signal.SIGKILL:
        return "" if code != 0 else "exit code 0"
    name = trial.signum.name
    lines = [line for line in words.splitlines() if f"stopped by {name}" in line]
    if trial.moment in ("imports", "start"):
        is_right = code == 128 + trial.signum and seconds < 30
        return "" if is_right and len(lines) <= 1 else f"exit {code} after {seconds:.0f} s: {words[-1000:]}"
    is_right = code == 128 + trial.signum and len(lines) == 1 and "; saved " in lines[0]
    return "" if is_right else f"exit {code}: {words[-2000:]}"


def try_all(folder: Path, trials: list[Trial], seed: int) -> Iterator[Result]:
    write_corpus(folder / "corpus.txt", 4000)
    whole, moments = start_run(folder / "whole"), random.Random(seed)
    assert whole.wait(timeout=600) == 0, said(folder / "whole")
    for number, trial in enumerate(trials):
        yield attempt(folder / f"run_{number}", trial, moments)


def check(results: list[Result]) -> None:
    wrong = [one.row() for one in results if one.problem]
    assert not wrong, "\n".join(wrong)
    late = [one for one in results if one.trial.moment not in ("imports", "start")]
    late = [one for one in late if one.trial.signum != signal.SIGKILL]  # which may come before the first checkpoint
    assert sum(0 < (one.step or 0) < STEPS for one in late) >= 0.9 * len(late)


def all_trials() -> list[Trial]:
    """30 while it trains, each kind to each target; 20 at other moments, with and without a second signal."""
    signums = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)
    targets = ("typed", "rank 0", "rank 1", "group")
    trials = [Trial(*kind) for kind in product(signums, targets, ("training", "validation"))]
    trials += [Trial(signal.SIGTERM, to, "training", gap) for to in ("rank 1", "group") for gap in (0.0, 0.1, 1.0)]
    trials += [Trial(signal.SIGTERM, "group", moment, 0.1) for moment in ("imports", "start", "validation", "saving")]
    trials += [Trial(signum, to, "saving") for signum in signums for to in ("typed", "rank 1", "group")]
    trials += [Trial(signum, "group", "start") for signum in signums]
    return [*trials, *(Trial(signal.SIGTERM, "typed", moment) for moment in ("imports", "start", "start", "imports"))]


@pytest.mark.slow
def test_two_processes_save_together_and_end_the_same(tmp_path: Path) -> None:
    as_slurm = Trial(signal.SIGTERM, "group", "training", 0.0)
    check(list(try_all(tmp_path, [as_slurm], seed=1)))


@pytest.mark.soak
def test_fifty_signals_to_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials, results = all_trials(), []
    assert len(trials) == 50
    with capsys.disabled():
        print("\nsignal   to      moment      again   exit  step seconds  the resumed run")
        for result in try_all(tmp_path, trials, seed=2):
            results.append(result)
            print(result.row(), flush=True)
        print(f"{sum(not one.problem for one in results)} of {len(results)} end bitwise equal, none left")
    check(results)
