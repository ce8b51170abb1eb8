"""What a rank says of its end, and what it leaves to others."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.causes import Cause


@pytest.fixture(autouse=True)
def _rank_1_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "_group", causes._Group())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_the_agent_of_torchrun_shows_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv(causes.ELASTIC, str(file))
    assert not causes.announce(causes.raised("the disk\nis full", 2), tmp_path)
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file=str(file))
    later = ProcessFailure(local_rank=0, pid=8, exitcode=1, error_file=str(tmp_path / "none"))
    later.timestamp = failure.timestamp + 1
    shown = ChildFailedError("train.py", {0: later, 1: failure}).format_msg()
    assert "rank 1: the disk is full" in shown.partition("Root Cause (first observed failure):")[2]
    assert abs(failure.timestamp - time.time()) < 60


def test_what_follows_from_another_ranks_cause_is_no_root_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(causes.ELASTIC, str(tmp_path / "of_1"))
    cause = Cause(0, "raised", "the disk is full", 2)
    causes.as_fellow(cause)
    causes.write_elastic(str(tmp_path / "of_0"), cause)
    facts = json.loads((tmp_path / "of_1").read_text())["message"]["extraInfo"]
    assert facts == {"py_callstack": "rank 0: the disk is full", "timestamp": str(int(cause.time) + 1)}


def test_the_run_folder_has_the_first_cause_of_a_session(tmp_path: Path) -> None:
    text, owner = tmp_path / causes.ERROR_TEXT, tmp_path / "owner.json"
    text.write_text("of an earlier session")
    os.utime(text, (1, 1))
    owner.write_text("{}")
    os.utime(owner, (2, 2))
    for words in ("the first", "the second"):
        causes.write_text(tmp_path, Cause(1, "raised", words, 2, time=0.0, pid=7, host="node"))
    assert text.read_text().partition(" ")[2] == "rank 1 of 2 (process 7 on node): the first\n"
    causes.forget(tmp_path)
    assert not text.exists()


@pytest.mark.parametrize(
    "words",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:31337",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:9: Connection reset by peer",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "recvValue failed on SocketImpl(fd=21): failed to recv, got 0 bytes",
    ],
)
def test_a_lost_connection_is_a_consequence(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert causes.is_consequence(RuntimeError(words))
    assert not causes.is_consequence(ValueError(words))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not causes.is_consequence(RuntimeError(words)), "there is no other rank"


def test_an_error_that_a_lost_connection_follows_is_the_cause() -> None:
    error = RuntimeError("Connection closed by peer")
    error.__context__ = ValueError("the disk is full")
    assert not causes.is_consequence(error)


def test_one_process_announces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not causes.announce(causes.raised("the disk is full", 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_of_a_process_has_causes_of_its_own(tmp_path: Path) -> None:
    causes.join(0, 1, tmp_path / "of one process")
    assert causes.size() == 1
    causes.join(1, 2, tmp_path)
    causes.announce(causes.raised("the disk is full", 2), tmp_path)
    causes.join(1, 2, tmp_path / "next")
    (tmp_path / "next").mkdir()
    causes.announce(causes.raised("the disk is full again", 2), tmp_path / "next")
    assert "rank 1 of 2" in (tmp_path / "next" / causes.ERROR_TEXT).read_text()
    causes.join(0, 1, tmp_path)
    causes.begin()
    assert (causes.rank(), causes.size()) == (1, 2), "as the launcher says"
