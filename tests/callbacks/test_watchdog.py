"""The watchdog's clock: it ends a run without progress, and no other."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llm_lightning.callbacks import watchdog
from llm_lightning.callbacks.watchdog import Watchdog
from llm_lightning.stacks import stacks

MINUTES = 0.002
"""0.12 seconds."""
NONE: Any = None


class Alarm:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.rang = threading.Event()

    def __call__(self, message: str) -> None:
        self.messages.append(message)
        self.rang.set()


@pytest.fixture
def alarm() -> Alarm:
    return Alarm()


def started(alarm: Alarm) -> Watchdog:
    dog = Watchdog(minutes=MINUTES)
    dog.alarm = alarm
    dog.setup(NONE, NONE, "fit")
    return dog


def test_no_progress_rings_once(alarm: Alarm) -> None:
    dog = started(alarm)
    assert alarm.rang.wait(10)
    time.sleep(0.2)
    dog.teardown(NONE, NONE, "fit")
    assert alarm.messages == ["no progress for 0.002 minutes (callbacks.watchdog.minutes)"]


def test_each_batch_validation_and_checkpoint_is_progress(alarm: Alarm, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(minutes=1)
    hooks = [dog.on_train_batch_end, dog.on_validation_batch_end, dog.on_test_batch_end, dog.on_save_checkpoint]
    for second, hook in enumerate(hooks):
        now[0] = float(second)
        hook(NONE, NONE, NONE)
        assert dog._progress == second


def test_nothing_rings_after_the_end(alarm: Alarm) -> None:
    dog = started(alarm)
    dog.teardown(NONE, NONE, "fit")
    assert not alarm.rang.wait(0.4)


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch, alarm: Alarm) -> None:
    """An hour passes between two looks, which are 5 seconds apart; then 20 seconds of progress missing are no alarm."""
    dog, looks = Watchdog(minutes=0.5), iter([0.0, 5.0, 3605.0, 3610.0])
    dog.alarm = alarm
    dog._progress = 0.0

    class Over:
        def wait(self, _: float) -> bool:
            return next(waits)

    waits = iter([False, False, False, True])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(looks))
    dog._watch(Over())  # type: ignore[arg-type]
    assert alarm.messages == []


def test_minutes_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.watchdog\.minutes=0 must be above 0"):
        Watchdog(minutes=0)


def test_the_stacks_name_what_each_thread_does() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="waits-for-tea")
    thread.start()
    try:
        text = stacks()
    finally:
        over.set()
        thread.join()
    assert "thread waits-for-tea:" in text
    assert "in test_the_stacks_name_what_each_thread_does" in text
