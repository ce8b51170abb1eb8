"""Signals outside of training: one line, 128 + the signal, and what repeats it changes nothing. Without PyTorch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from tiny_run import ROOT

from llm_lightning.signals import STOPPING

pytestmark = pytest.mark.slow  # they start processes
CHILD = """
import atexit, ctypes, signal, sys, time
for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):  # whatever has started the tests may ignore them
    signal.signal(getattr(signal, name), signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from llm_lightning import signals
from llm_lightning.experiments.errors import run_guarded
how = sys.argv[1]
signals.BLOCKED_SECONDS = 0.2
if how == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
if how == "at exit":
    atexit.register(lambda: (print("leaving", flush=True), time.sleep(0.3)))
def work():
    print("ready", flush=True)
    if how == "blocked":
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(lock), libc.pthread_mutex_lock(lock)  # for ever
    try:
        time.sleep(30)
    except Exception:
        print("a library took it for its own")
with signals.ending():
    run_guarded(work)
"""


def start(how: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if "RANK" not in name and "SLURM" not in name}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", CHILD, how], env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"
    return process  # type: ignore[no-any-return]


def line(signum: signal.Signals) -> str:
    if signum == signal.SIGINT:
        return "interrupted\n"
    return f"stopped by {signum.name} before training; the same command starts again\n"


def test_each_signal_ends_it_with_one_line() -> None:
    started = {signum: start("") for signum in STOPPING}
    for signum, process in started.items():
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (128 + signum, "", line(signum))


def test_repetitions_until_the_process_has_ended_change_nothing() -> None:
    process = start("at exit")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "leaving\n"
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        process.send_signal(signum)
    assert (process.wait(timeout=60), process.stderr.read()) == (143, line(signal.SIGTERM))  # type: ignore[union-attr]


@pytest.mark.skipif(sys.platform != "linux", reason="the lock of the test is Linux's")
def test_a_library_that_waits_for_others_does_not_hold_it_up() -> None:
    process = start("blocked")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == line(signal.SIGTERM)
    assert process.returncode == 143


def test_what_is_ignored_stays_ignored() -> None:
    process = start("ignored")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == line(signal.SIGTERM)
    assert process.returncode == 143
