"""What each signal does at each moment of a run, in this process; whole processes: test_signal_trials.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from tiny_run import assert_same

from llm_lightning.callbacks.checkpoints import Checkpoints, VerifiedCheckpointIO
from llm_lightning.callbacks.signals import Interrupted, Signals
from llm_lightning.experiments.build import leave_requeueing_to_signals
from llm_lightning.signals import STOPPING
from llm_lightning.weights import checkpoint as checkpoints

STEPS = 22
"""Two epochs of 11 updates."""


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[None]:
    """As an interactive shell starts a process; a background job may have been started with SIGINT ignored."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class SendAt(L.Callback):
    """Send signals to this process in `hook`, once `step` updates are done."""

    def __init__(self, hook: str, step: int, *signums: signal.Signals) -> None:
        self.step, self.signums = step, signums
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step >= self.step:
            signums, self.signums = self.signums, ()
            for signum in signums:
                os.kill(os.getpid(), signum)


def saved_step(folder: Path) -> int | None:
    path = folder / "checkpoints" / "last.ckpt"
    return checkpoints.read_header(path)["step"] if path.is_file() else None


@pytest.fixture
def fit(make_module: Any, make_trainer: Any, make_data: Any) -> Any:
    """Train in a folder, from its newest checkpoint on; returns the exit code, and the words of an end by signal."""

    def run(folder: Path, *extra: L.Callback, kept: bool = True, test: bool = False) -> tuple[int, str]:
        L.seed_everything(7, verbose=False)
        trainer = make_trainer(folder, [*([Checkpoints(every_n_steps=100)] if kept else []), *extra])
        data = make_data(batch_size=2, seed=5)
        data.test_samples = {"test": data.eval_samples["val"]} if test else {}
        path = checkpoints.newest_valid(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
        module = make_module(dropout=0.3)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
            if test:
                trainer.test(module, datamodule=data, verbose=False)
        except Interrupted as stop:
            return stop.exit_code, str(stop)
        return 0, ""

    return run


@pytest.mark.slow
def test_every_signal_saves_at_every_moment(tmp_path: Path, fit: Any) -> None:
    assert fit(tmp_path / "whole") == (0, "")
    whole = checkpoints.load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    moments = {
        "on_train_start": (0, 0),
        "on_train_batch_end": (4, 4),
        "on_before_optimizer_step": (4, 5),  # within an update
        "on_validation_batch_start": (11, 11),
        "on_validation_end": (11, 11),  # where samples are written
        "on_train_epoch_end": (22, 22),  # after the last update
    }
    cases = [(hook, *moments[hook], STOPPING[number % 4]) for number, hook in enumerate(moments)]
    failed = []
    for number, (hook, sent_at, saved_at, signum) in enumerate([*cases, ("on_train_batch_end", 4, 4, STOPPING[3])]):
        folder = tmp_path / str(number)
        code, words = fit(folder, SendAt(hook, sent_at, signum))
        right = f"stopped by {signum.name}; saved {folder}/checkpoints/last.ckpt; continue with resume={folder}"
        if (code, words, saved_step(folder)) != (128 + signum, right, saved_at):
            failed.append((hook, signum.name, code, words, saved_step(folder)))
        assert fit(folder) == (0, "")
        for key in ("state_dict", "optimizer_states", "rng", "task_module", "position"):
            assert_same(checkpoints.load(folder / "checkpoints" / "last.ckpt")[key], whole[key], f"{hook}: {key}")
    assert not failed


def test_before_the_first_update_a_run_ends_at_once(tmp_path: Path, fit: Any) -> None:
    late: list[str] = []

    class Late(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            late.append("it went on")

    for hook in ("setup", "on_fit_start"):
        sent = SendAt(hook, 0, signal.SIGTERM, signal.SIGTERM)
        assert fit(tmp_path / hook, sent, Late()) == (143, "stopped by SIGTERM; nothing was saved")
        assert saved_step(tmp_path / hook) is None
    assert not late
    fit(tmp_path / "on", SendAt("on_train_batch_end", 3, signal.SIGTERM))
    code, words = fit(tmp_path / "on", SendAt("on_fit_start", 0, signal.SIGUSR1))
    saved = f"saved {tmp_path}/on/checkpoints/last.ckpt; continue with resume={tmp_path}/on"
    assert (code, words) == (138, f"stopped by SIGUSR1; {saved}")


@pytest.mark.slow
def test_the_test_split_is_left_at_once(tmp_path: Path, fit: Any) -> None:
    class Swallow(L.Callback):
        """A library that takes every exception for its own."""

        def on_test_batch_end(self, *_: Any) -> None:
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
            except Exception:
                return

    sent = SendAt("on_test_batch_start", 22, signal.SIGTERM)
    for name, extra, code in (("straight", sent, 143), ("swallowed", Swallow(), 138)):
        assert fit(tmp_path / name, extra, test=True)[0] == code
        assert saved_step(tmp_path / name) == STEPS


def test_repeated_signals_but_a_second_ctrl_c_are_one(
    tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    assert fit(tmp_path / "one", SendAt("on_train_batch_end", 3, *twice))[0] == 143
    assert saved_step(tmp_path / "one") == 3
    ended = []

    def end(signum: int) -> None:
        ended.append((signum, signal.getsignal(signum)))
        raise SystemExit

    monkeypatch.setattr(signal, "raise_signal", end)
    with pytest.raises(SystemExit):
        fit(tmp_path / "two", SendAt("on_train_batch_end", 3, signal.SIGINT, signal.SIGINT))
    assert ended == [(signal.SIGINT, signal.SIG_DFL)]
    assert saved_step(tmp_path / "two") is None


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, fit: Any) -> None:
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    assert fit(tmp_path, SendAt("on_train_batch_end", 3, *STOPPING))[0] == 0
    assert saved_step(tmp_path) == STEPS
    assert all(signal.getsignal(signum) is signal.SIG_IGN for signum in STOPPING)


def test_without_checkpoints_a_run_ends_all_the_same(tmp_path: Path, fit: Any) -> None:
    sent = SendAt("on_train_batch_end", 3, signal.SIGTERM)
    assert fit(tmp_path, sent, kept=False) == (143, "stopped by SIGTERM; nothing was saved")
    assert saved_step(tmp_path) is None


def test_every_handler_is_ours_where_slurm_started_the_run(
    tmp_path: Path, make_module: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's would save `hpc_ckpt_1.ckpt` and requeue whatever the reason."""
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    found: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            found.update({signum.name: signal.getsignal(signum) for signum in STOPPING})

    callbacks = [Signals(), Checkpoints(), Look()]
    plugins = [VerifiedCheckpointIO(), SLURMEnvironment(auto_requeue=True)]
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        default_root_dir=tmp_path, callbacks=callbacks, plugins=plugins, enable_checkpointing=False, **options
    )
    trainer.fit(make_module(), datamodule=make_data(batch_size=2))
    assert {name: getattr(handler, "__self__", None) for name, handler in found.items()} == dict.fromkeys(
        (signum.name for signum in STOPPING), callbacks[0]
    )
    assert all(signal.getsignal(signum) is signal.SIG_DFL for signum in STOPPING if signum != signal.SIGINT)
    leave_requeueing_to_signals(trainer)
    assert trainer._accelerator_connector.cluster_environment.auto_requeue is False


SCONTROL = """#!/bin/sh
echo "$@" >>{folder}/asked
case $1 in show) cat {folder}/shown;; esac
"""


@pytest.fixture
def slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job of a SLURM whose `scontrol` shows given fields; returns what it was asked."""
    tool = tmp_path / "scontrol"
    tool.write_text(SCONTROL.format(folder=tmp_path))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)

    def shows(fields: str) -> Path:
        (tmp_path / "shown").write_text(fields)
        asked = tmp_path / "asked"
        asked.write_text("")
        return asked

    return shows


def test_a_job_of_slurm_is_requeued_after_a_step_of_this_start(tmp_path: Path, fit: Any, slurm_job: Any) -> None:
    asked = slurm_job("JobId=7 JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0")
    code, words = fit(tmp_path / "run", SendAt("on_train_start", 0, signal.SIGTERM, signal.SIGTERM))
    assert (code, asked.read_text()) == (143, "")
    assert words.endswith(
        "SLURM job 7 is not requeued: it made no step since its start; give it more time (sbatch --time)"
    )
    code, words = fit(tmp_path / "run", SendAt("on_train_batch_end", 4, signal.SIGTERM, signal.SIGTERM))
    assert (code, saved_step(tmp_path / "run")) == (143, 4)
    assert words.endswith("SLURM job 7 is requeued: time limit")
    assert asked.read_text() == "show job 7\nrequeue 7\n"
    asked.write_text("")
    code, words = fit(tmp_path / "run", SendAt("on_train_start", 4, signal.SIGTERM))  # continued, no step further
    assert "it made no step since its start" in words
    assert asked.read_text() == ""
    fit(tmp_path / "none", SendAt("on_train_batch_end", 4, signal.SIGTERM), kept=False)
    assert asked.read_text() == ""
