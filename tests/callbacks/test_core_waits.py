"""A run that waits for a core says so once; the kernel's counts are files here."""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_lightning.callbacks import core_waits
from llm_lightning.callbacks.core_waits import CoreWaits, CpuTime, advice, cpu_times, waiting_share

TRAINER: Any = SimpleNamespace(local_rank=0, num_devices=1)


def test_threads_that_ended_or_began_between_two_looks_do_not_count() -> None:
    before = {"1": CpuTime(100, 50), "2": CpuTime(0, 9000)}
    now = {"1": CpuTime(130, 60), "3": CpuTime(0, 9000)}
    assert waiting_share(before, now) == 0.25
    assert waiting_share(before, before) == 0


def test_counts_are_read_of_every_thread(tmp_path: Path) -> None:
    for name, text in (("7", "120 34 5\n"), ("8", "0 0 0\n"), ("9", "")):  # the last has ended
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    assert cpu_times(tmp_path) == {"7": CpuTime(120, 34), "8": CpuTime(0, 0)}
    assert cpu_times(tmp_path / "elsewhere") == {}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts how long threads wait")
def test_the_kernel_counts_this_thread() -> None:
    before, start = cpu_times(), time.thread_time()
    while time.thread_time() - start < 0.05:
        pass
    own = str(threading.get_native_id())
    # The kernel accounts at ticks, of at most 10 ms, and at switches.
    assert cpu_times()[own].running - before[own].running > 0.03e9


@pytest.mark.parametrize(("waiting", "says"), [(0, 0), (20, 0), (30, 1), (400, 1)])
def test_it_is_said_once_and_only_where_a_quarter_is_lost(
    waiting: int, says: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(core_waits, "cpu_times", lambda: {"1": CpuTime(int(clock[0] * 100), int(clock[0] * waiting))})
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    callback = CoreWaits()
    callback.on_train_start(TRAINER, None)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            clock[0] += 1.0
            callback.on_train_batch_end(TRAINER)
            assert not caplog.records or clock[0] >= core_waits.SECONDS
    assert len(caplog.records) == says


def test_the_remedy_is_what_is_left_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    line = advice(0.5, threads=8, ranks=2)
    assert "50%" in line
    assert "8 threads in each of 2 processes" in line
    assert "OMP_NUM_THREADS=4 and OMP_WAIT_POLICY=PASSIVE" in line
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "PASSIVE" not in advice(0.5, threads=8, ranks=1)
    assert "OMP_NUM_THREADS" not in advice(0.5, threads=1, ranks=1), "fewer than one thread is none"
