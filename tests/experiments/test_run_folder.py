from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llm_lightning.experiments import run_folder
from llm_lightning.experiments.run_folder import RunFolderInUseError, open_run
from llm_lightning.weights.checkpoint import Opened

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_new_folder_is_fresh_and_says_who_owns_it(tmp_path: Path) -> None:
    path, config = tmp_path / "a" / "b", {"seed": 1, "model": {"n_layer": 2}, "note": None}
    with open_run(path, config) as run:
        owner = json.loads((path / "owner.json").read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), platform.node())
        assert run.state() == "fresh"
    assert yaml.safe_load((path / "config.yaml").read_text()) == config
    assert not (path / "owner.json").exists()


def test_state_follows_checkpoint_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(
        run_folder,
        "_newest_checkpoint",
        lambda path: Opened(path / "checkpoints" / "step_00000010.ckpt", {"step": 10}, (0, 0, 0)),
    )
    with open_run(tmp_path, {"max_steps": 11}) as run:
        assert run.state() == "resumable"
        assert not (tmp_path / "config.yaml").exists()  # the caller may still refuse the change
        run.write_config({"max_steps": 11})
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"max_steps": 11}
    (tmp_path / "summary.json").write_text('{"finished": true, "steps": 7, "total_steps": 10}')
    with open_run(tmp_path, {}) as run:
        assert [run.state(steps) for steps in (None, 5, 10, 11)] == ["finished", "finished", "finished", "resumable"]


def test_a_folder_in_use_is_refused_naming_the_process(tmp_path: Path) -> None:
    message = f"in use by process {os.getpid()} on {platform.node()}"
    with open_run(tmp_path, {}), pytest.raises(RunFolderInUseError, match=message), open_run(tmp_path, {}):
        pass
    with open_run(tmp_path, {}):  # free again
        pass


def test_an_error_in_the_block_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, {}):
        _ = 1 / 0
    with open_run(tmp_path, {}):
        pass


def _own_for_ever(path: Path) -> None:
    with open_run(path, {}):
        (path / ".config.yaml.1.tmp").touch()
        time.sleep(60)


def test_a_killed_owner_is_succeeded_and_its_temporary_files_swept(tmp_path: Path) -> None:
    process = FORK.Process(target=_own_for_ever, args=(tmp_path,))
    process.start()
    while not (tmp_path / ".config.yaml.1.tmp").exists():
        time.sleep(0.01)
    with pytest.raises(RunFolderInUseError, match=f"process {process.pid} "), open_run(tmp_path, {}):
        pass
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped: a zombie owns nothing
    with open_run(tmp_path, {}):
        assert not (tmp_path / ".config.yaml.1.tmp").exists()
    process.join()


def test_workers_that_outlive_a_killed_owner_are_waited_for(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from llm_lightning.experiments.run_folder import open_run\n"
        "with open_run(sys.argv[1], {}):\n"
        "    if os.fork() == 0: time.sleep(1); os._exit(0)\n"  # inherits the lock, as a data loading worker does
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with open_run(tmp_path, {}):
        pass


def test_a_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    owner = {"pid": os.getpid(), "host": platform.node(), "process_start": "another time", "started": "then"}
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    with open_run(tmp_path, {}):
        pass


def test_an_owner_on_another_host_is_succeeded_when_it_has_been_silent(tmp_path: Path) -> None:
    owner_file = tmp_path / "owner.json"
    owner = {"pid": 7, "host": "another-host", "process_start": "1", "started": "then"}
    owner_file.write_text(json.dumps(owner))
    with (
        pytest.raises(RunFolderInUseError, match=r"process 7 on another-host .* delete .*owner\.json"),
        open_run(tmp_path, {}),
    ):
        pass
    assert json.loads(owner_file.read_text()) == owner
    long_ago = time.time() - run_folder.SILENT_SECONDS - 1
    os.utime(owner_file, (long_ago, long_ago))
    with open_run(tmp_path, {}):
        pass


def test_a_restart_on_another_node_succeeds_the_owner_of_its_own_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner_file = tmp_path / "owner.json"
    owner = {"pid": 7, "host": "a-node-that-died", "process_start": "1", "started": "then"}
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for launch in (None, {"id": "slurm_11", "attempt": 0}, {"id": "slurm_12", "attempt": 1}):
        owner_file.write_text(json.dumps({**owner, "launch": launch}))
        with pytest.raises(RunFolderInUseError, match="process 7 on a-node-that-died"), open_run(tmp_path, {}):
            pass
    owner_file.write_text(json.dumps({**owner, "launch": {"id": "slurm_12", "attempt": 0}}))
    with open_run(tmp_path, {}):
        assert json.loads(owner_file.read_text())["launch"] == {"id": "slurm_12", "attempt": 1}


def test_a_rank_on_another_node_may_record_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = {"pid": 7, "host": "the-first-node", "process_start": "1", "started": "then"}
    (tmp_path / "owner.json").write_text(json.dumps({**owner, "launch": {"id": "slurm_12", "attempt": 0}}))
    assert run_folder.is_anothers(tmp_path)
    for name, value in {"JOB_ID": "12", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2", "PROCID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert not run_folder.is_anothers(tmp_path)
    monkeypatch.setenv("SLURM_PROCID", "0")  # a second first rank is another run
    assert run_folder.is_anothers(tmp_path)


def test_later_ranks_share_the_folder_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path, {}):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with open_run(tmp_path, {}) as run:
            assert run.state() == "fresh"
        assert (tmp_path / "owner.json").exists()


def _compete(path: Path, start: FORK.Event, results: FORK.Queue, done: FORK.Event) -> None:  # type: ignore[name-defined]
    start.wait()
    try:
        with open_run(path, {}):
            results.put("owner")
            done.wait()
    except RunFolderInUseError as error:
        results.put(str(error))


@pytest.mark.slow
def test_of_sixteen_starters_in_one_instant_one_wins(tmp_path: Path) -> None:
    start, done, results = FORK.Event(), FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=_compete, args=(tmp_path / "run", start, results, done)) for _ in range(16)]
    for process in processes:
        process.start()
    start.set()
    answers = [results.get(timeout=30) for _ in processes]
    done.set()
    for process in processes:
        process.join()
    assert answers.count("owner") == 1
    assert sum("is in use by process" in answer for answer in answers) == 15


def test_opening_a_fresh_folder_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from llm_lightning.experiments.run_folder import open_run\n"
        "with open_run(sys.argv[1], {}): print(sorted({'torch', 'lightning', 'hydra'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
