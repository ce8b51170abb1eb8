"""`failure.json`: what is written there, when, by whom, and what removes it."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, fit_here, train_here, write_corpus

import llm_lightning
from llm_lightning.callbacks.signals import Interrupted
from llm_lightning.experiments import failures
from llm_lightning.experiments import run as runs
from llm_lightning.experiments.errors import guarded
from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_folder import RunFolderInUseError, process_start


def raising(error: BaseException) -> Callable[..., None]:
    def action(*_: object, **__: object) -> None:
        raise error

    return action


def read(folder: Path) -> Failure:
    failure = Failure.read(folder)
    assert failure is not None
    return failure


def own(folder: Path, pid: int, host: str | None = None) -> None:
    owner = {"pid": pid, "host": host or platform.node(), "process_start": process_start(pid), "started": "then"}
    (folder / "owner.json").write_text(json.dumps(owner))


@pytest.mark.reaches_net
@pytest.mark.parametrize(
    ("error", "kind", "code", "words"),
    [
        (ValueError("lr must\nbe positive"), "error", 2, "lr must be positive"),
        (OSError(errno.ENOSPC, "No space left on device", "x.ckpt"), "os", 2, "x.ckpt: No space left on device; make"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory", 2, "CUDA out of memory; out of memory: lower"),
        (MemoryError(), "memory", 2, "out of memory: lower data.batch_size"),
        (KeyError("a fault"), "error", 70, "'a fault'"),
    ],
)
def test_each_kind(error: Exception, kind: str, code: int, words: str, tmp_path: Path) -> None:
    assert guarded(raising(error), log_dir=tmp_path) == (code, None)
    failure = read(tmp_path)
    assert (failure.kind, failure.exception, failure.exit_code) == (kind, type(error).__name__, code)
    assert failure.message.startswith(words)
    assert failure.repeats == (kind != "error")
    assert set(json.loads((tmp_path / "failure.json").read_text())) >= {*failures.FAILURE_FACTS}


def test_the_users_own_code_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        guarded(raising(KeyError("of mine")), log_dir=tmp_path, own=[__name__])
    assert (read(tmp_path).exception, read(tmp_path).exit_code) == ("KeyError", 1)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted(15, None)])
def test_a_run_that_is_stopped_has_not_failed(stop: BaseException, tmp_path: Path) -> None:
    code, _ = guarded(raising(stop), log_dir=tmp_path)
    assert code in (130, 143)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_to_a_folder_of_another_process(tmp_path: Path) -> None:
    guarded(raising(RunFolderInUseError("in use")), log_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    for host in (platform.node(), "another-host"):  # refused before it asked for the folder
        own(tmp_path, os.getppid(), host)
        guarded(raising(ValueError("a typo")), log_dir=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]
    own(tmp_path, 2**22 + 1)  # more than Linux gives
    guarded(raising(ValueError("a typo")), log_dir=tmp_path)
    assert read(tmp_path).message == "a typo"


def test_the_first_of_several_ranks_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failure("lost", None, "of yesterday", None).write(tmp_path)
    os.utime(tmp_path / "failure.json", (1, 1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    own(tmp_path, os.getppid())  # the first rank, as Lightning starts the others
    for message in ("first", "second"):
        guarded(raising(ValueError(message)), log_dir=tmp_path)
        assert read(tmp_path).message == "first"
    monkeypatch.delenv("LOCAL_RANK")
    (tmp_path / "owner.json").unlink()

    def later() -> None:
        os.utime(tmp_path / "failure.json", (now := time.time() + 1, now))
        raise ValueError("the other rank is gone")

    guarded(later, log_dir=tmp_path)
    assert read(tmp_path).message == "first"
    os.utime(tmp_path / "failure.json", (1, 1))
    guarded(raising(ValueError("a new session")), log_dir=tmp_path)
    assert read(tmp_path).message == "a new session"


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raising(ValueError("the cause")), log_dir=tmp_path / "gone") == (2, None)
    assert capsys.readouterr().err == "error: the cause\n"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    assert Failure.read(tmp_path) is None
    written = Failure("signal", None, "SIGKILL", 137, lines=("step 7", "step 8"))
    written.write(tmp_path)
    assert Failure.read(tmp_path) == written
    file = tmp_path / "failure.json"
    for content in ("{", '{"kind": "error"}', file.read_text().replace("signal", "bad luck")):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"failure\.json is damaged .*; delete it"):
            Failure.read(tmp_path)


def test_it_is_gone_once_a_later_session_trains_or_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    words = [*SETTINGS, f"data.path={write_corpus(tmp_path / 'a.txt', 60)}", f"hydra.run.dir={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "announce", raising(ValueError("after it began")))
        assert fit_here(words).code == 2
    assert read(folder).began
    assert json.loads((folder / "config.json").read_text())["trainer"]["max_steps"] == 4
    assert fit_here(words).code == 0
    assert Failure.read(folder) is None

    refused = fit_here([*words, "optimizer.lr=1"])
    assert (refused.code, read(folder).began) == (2, False)
    assert "optimizer.lr" in read(folder).message
    assert fit_here(words).code == 0
    assert Failure.read(folder) is None


def test_a_refusal_before_the_folder_is_asked_for_leaves_a_living_run_alone(tmp_path: Path) -> None:
    own(tmp_path, os.getppid())
    for word in ("monitor_mode=upwards", "seed=1"):
        outcome = fit_here([*SETTINGS, word, f"hydra.run.dir={tmp_path}"])
        assert outcome.code == 2
        assert ("in use by process" in outcome.err) == (word == "seed=1")
        assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"owner.json"}


def test_train_in_python_records_it_too(tmp_path: Path) -> None:
    words = [*SETTINGS, f"data.path={tmp_path / 'nothing.txt'}", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(FileNotFoundError):
        llm_lightning.train(words)
    assert (read(tmp_path / "run").kind, read(tmp_path / "run").exit_code) == ("os", None)


def test_a_command_that_is_refused_leaves_a_record(tmp_path: Path) -> None:
    outcome = train_here([*SETTINGS, f"data.path={tmp_path / 'nothing.txt'}", f"hydra.run.dir={tmp_path / 'run'}"])
    assert outcome.err == f"error: {read(tmp_path / 'run').message}\n"
