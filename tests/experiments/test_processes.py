"""A process and the one that it starts: signals reach both, and none is left behind. Without PyTorch: a few seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT, living

# A run in small: it counts the signals it gets, "saves", and ends with 128 + the first.
CHILD = """
import os, signal, sys, time
from llm_lightning.experiments import processes
got = []
for name in sys.argv[2].split(","):
    signal.signal(getattr(signal, name), lambda signum, _: got.append(signum))
if "later rank" in sys.argv[1]:
    del os.environ[processes.PARENT]
    os.environ["LOCAL_RANK"] = "1"
    processes.LATER_RANK_SECONDS = 0.1
if "without prctl" in sys.argv[1]:
    processes.signal_at_death_of = lambda *_: False
processes.end_with_parent()
assert processes.PARENT not in os.environ, "a process that this one starts would take it for its parent"
print(os.getpid(), flush=True)
end = time.monotonic() + 30
while not got and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
if "dies" in sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
open("saved", "w").write(" ".join(map(str, got)))
sys.exit(128 + got[0])
"""
PARENT = """
import signal, sys
for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # whatever has started the tests may ignore them
    signal.signal(signum, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if "ignored" in sys.argv[2]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from llm_lightning.experiments import processes
processes.KEYBOARD_SECONDS = 0.5
try:
    code = processes.wait_for(processes.start([sys.executable, *sys.argv[1:]]))
except KeyboardInterrupt:
    code = 130
print("code", code, flush=True)
sys.exit(code)
"""
ALL = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"


def start(folder: Path, words: str = "", taken: str = ALL) -> tuple[subprocess.Popen[str], int]:
    """A parent that waits for its child; the pid of the child, which is ready."""
    folder.mkdir()
    child, parent = folder / "child.py", folder / "parent.py"
    child.write_text(CHILD)
    parent.write_text(PARENT)
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, parent, child, f"-{words}", taken]
    process = subprocess.Popen(command, cwd=folder, env=environment, **options)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def wait_until(condition: Any, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def saved(folder: Path) -> list[int]:
    """The signals that the child got."""
    assert wait_until((folder / "saved").is_file), "the child did not save"
    assert wait_until(lambda: (folder / "saved").read_text())
    return [int(word) for word in (folder / "saved").read_text().split()]


@pytest.mark.slow
def test_what_stops_the_parent_stops_the_child_once_saved(tmp_path: Path) -> None:
    cases = [(signum, to) for signum in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT") for to in ("process", "group")]
    started = [start(tmp_path / f"{signum} {to}") for signum, to in cases]
    failed = []
    for (name, to), (process, _) in zip(cases, started, strict=True):
        signum = getattr(signal, name)
        (os.kill if to == "process" else os.killpg)(process.pid, signum)
        out, err = process.communicate(timeout=60)
        got = saved(tmp_path / f"{name} {to}")
        # A keyboard's reaches the group; one that was sent to the parent alone is handed on, as SIGTERM, after a while.
        first = signal.SIGTERM if (name, to) == ("SIGINT", "process") else signum
        if got[0] != first or process.returncode != 128 + signum or err:
            failed.append((name, to, got, process.returncode, out, err))
    assert not failed


def test_what_the_parent_ignores_stays_ignored_and_the_end_of_a_child_is_a_shells(tmp_path: Path) -> None:
    process, child = start(tmp_path / "ignored", "ignored", "SIGTERM")
    process.send_signal(signal.SIGHUP)  # the child inherits that it is ignored
    os.kill(child, signal.SIGHUP)
    os.kill(child, signal.SIGTERM)
    assert process.communicate(timeout=60) == ("code 143\n", "")
    assert saved(tmp_path / "ignored") == [signal.SIGTERM]
    process, child = start(tmp_path / "dies", "dies")
    os.kill(child, signal.SIGTERM)
    assert process.communicate(timeout=60) == ("code 137\n", "")


@pytest.mark.parametrize("words", ["", "without prctl"])
def test_a_child_outlives_no_parent_that_is_killed(tmp_path: Path, words: str) -> None:
    process, _ = start(tmp_path / "run", words)
    process.kill()
    assert saved(tmp_path / "run") == [signal.SIGTERM]
    assert wait_until(lambda: not living(process.pid))
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_later_process_of_distributed_training_ends_some_time_after_the_first(tmp_path: Path) -> None:
    process, child = start(tmp_path / "run", "later rank")
    assert Path(f"/proc/{child}").exists()
    process.kill()
    process.communicate()
    assert wait_until(lambda: child not in living(process.pid))
    assert not (tmp_path / "run" / "saved").exists()


def test_a_parent_that_is_gone_before_it_is_looked_at(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLM_LIGHTNING_PARENT": str(2**30)}  # of nobody
    code = "from llm_lightning.experiments.processes import end_with_parent as end; end(); print('goes on', flush=True)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if sys.platform == "linux":
        assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")
