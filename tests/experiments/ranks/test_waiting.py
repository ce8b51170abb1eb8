"""A process that waits says for whom, in seconds shortened here."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from llm_lightning.experiments.ranks import naming, waiting
from llm_lightning.experiments.ranks.fresh_store import fresh_store
from llm_lightning.experiments.ranks.launcher import Launched


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _of(rank: int, address: str, processes: int = 3) -> Launched:
    return Launched("torchrun", rank, rank, per_node=(processes,), processes=processes, address=address)


def test_nothing_is_said_of_a_short_wait_and_a_long_one_is_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = threading.Event()
    lines = iter(["first", "", "second"])

    def line() -> str:
        text = next(lines, "")
        if text == "second":
            said.set()
        return text

    monkeypatch.setattr(waiting, "AGAIN_SECONDS", 0.01)
    with waiting.announced(line):
        pass
    assert next(lines) == "first", "not asked within ten seconds"
    lines = iter(["first", "", "second"])
    monkeypatch.setattr(waiting, "JOIN_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.01)
    with waiting.announced(line):
        assert said.wait(20)
        threading.Event().wait(0.2)
    assert capsys.readouterr().err.splitlines() == ["first", "second"]


def test_the_first_process_counts_those_that_are_missing(address: str) -> None:
    port = int(address.rpartition(":")[2])
    store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), wait_for_workers=False)
    rolls = [waiting.Roll(_of(rank, address), address, 3) for rank in range(3)]
    for expected, roll in zip((2, 1, 0), rolls, strict=True):
        roll.join()
        line = f"waiting for {expected} of 3 processes at {address}: start the others, or see why they ended"
        assert rolls[0].line() == (line if expected else "")
    assert rolls[1].line() == "", "one process says it for all"
    del store


def test_a_process_that_finds_nobody_says_where_it_looks(address: str) -> None:
    roll = waiting.Roll(_of(1, address), address, 3)
    roll.join()
    assert roll.line().startswith(f"waiting for the first of 3 processes at {address}: nothing answers there; start it")


def test_the_first_process_names_the_folder_for_all(address: str) -> None:
    names: dict[int, str] = {}

    def meet(rank: int) -> None:
        names[rank] = naming._told_by_first(_of(rank, address), f"drawn by {rank}")

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert names == dict.fromkeys(range(3), "drawn by 0")
    naming._kept.clear()


def test_a_restart_of_torchrun_finds_the_name_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(address.rpartition(":")[2])
    agent = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    told = [naming._told_by_first(_of(rank, address), f"at attempt {attempt}") for attempt in (0, 1) for rank in (0, 1)]
    assert told == ["at attempt 0"] * 4
    del agent


def test_a_restart_of_torchrun_meets_in_a_part_of_the_store_of_its_own(address: str) -> None:
    port = int(address.rpartition(":")[2])
    agent = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), wait_for_workers=False)
    for _ in range(3):
        found: dict[int, bool] = {}

        def meet(rank: int, found: dict[int, bool]) -> None:
            threading.Event().wait(0.3 * (rank == 0))  # the others come first, and find what the last attempt left
            store = fresh_store(address, rank, 3, timedelta(seconds=30))
            found[rank] = store.check([f"from {rank}"])
            store.set(f"from {rank}", "here")
            store.wait([f"from {other}" for other in range(3)])

        threads = [threading.Thread(target=meet, args=(rank, found)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert found == dict.fromkeys(range(3), False)
    del agent
