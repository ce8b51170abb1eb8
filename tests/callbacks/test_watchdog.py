"""The watchdog's clock: it ends a run without progress, and no other."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_lightning import progress
from llm_lightning.callbacks.watchdog import Watchdog
from llm_lightning.inference.generation import generate
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.stacks import stacks
from llm_lightning.tasks.stored_results import fill

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
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])  # the watchdog's too: one module
    dog = Watchdog(minutes=1)
    hooks = [dog.on_train_batch_end, dog.on_validation_batch_end, dog.on_test_batch_end, dog.on_save_checkpoint]
    for second, hook in enumerate(hooks):
        now[0] = float(second)
        hook(NONE, NONE, NONE)
        now[0] = second + 0.5
        assert progress.since() == 0.5


def test_nothing_rings_after_the_end(alarm: Alarm) -> None:
    dog = started(alarm)
    dog.teardown(NONE, NONE, "fit")
    assert not alarm.rang.wait(0.4)


def test_nothing_rings_after_an_exception(alarm: Alarm) -> None:
    """Lightning calls no teardown then, and a notebook lives on."""
    dog = started(alarm)
    dog.on_exception(NONE, NONE, KeyboardInterrupt())
    assert not alarm.rang.wait(0.4)


def test_generated_tokens_and_stored_results_are_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[float] = []
    monkeypatch.setattr(progress, "mark", lambda: marks.append(0.0))
    model = GPT(GPTConfig(vocab_size=17, context_length=8, n_layer=1, n_head=1, n_embd=8)).eval()
    generate(model, [[1], [2]], max_new_tokens=4)
    assert len(marks) == 3, "each step behind the prompts"

    class Store:
        def ensure(self, keys: Any, n_rows: Any, compute: Any, **_: Any) -> None:
            for index in range(len(keys)):
                compute([index])

    fill(Store(), SimpleNamespace(is_sharded=False), [b"a", b"b"], [1, 1], lambda _: torch.zeros(1))  # type: ignore[arg-type]
    assert len(marks) == 5


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch, alarm: Alarm) -> None:
    """An hour passes between two looks, which are 5 seconds apart; then 10 seconds without progress are no alarm."""
    dog, now = Watchdog(minutes=0.5), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    dog.alarm = alarm
    progress.mark()

    class Over:
        def wait(self, _: float) -> bool:
            now[0] = next(looks)
            return now[0] > 3610

    looks = iter([5.0, 3605.0, 3610.0, 3615.0])
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
