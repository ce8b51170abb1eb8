"""The list of runs: every status from made folders, progress, settings that differ, conditions and order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_runs
import pytest
from made_runs import MADE, NOBODY, make_run, settings, write_metrics, write_owner, write_settings, write_summary
from tiny_run import SETTINGS, digests, fit_here, write_corpus

import llm_lightning
from llm_lightning.experiments import run_status
from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_folder import SILENT_SECONDS, open_run
from llm_lightning.experiments.run_list import ordered, read_runs, refuse_unknown, runs, select
from llm_lightning.experiments.run_table import counts, table


def the_run(folder: Path) -> dict[str, Any]:
    [record] = runs(folder)
    return record


@pytest.fixture
def other() -> Iterator[int]:
    """The pid of a living process."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def test_every_status(tmp_path: Path, other: int) -> None:
    for status in MADE:
        make_run(tmp_path / status, status)
    write_owner(tmp_path / "running", other)
    found = {record["name"]: record for record in runs(tmp_path)}
    assert {name: record["status"] for name, record in found.items()} == {status: status for status in MADE}
    assert set(MADE) == set(run_status.STATUSES)
    reasons = {name: record["reason"] for name, record in found.items() if record["reason"]}
    assert reasons.keys() == {"foreign", "failed", "died", "unreadable"}
    assert reasons["foreign"].startswith(f"process 7 of {made_runs.HOST} wrote ")
    assert reasons["failed"] == "loss is not finite at step 51"
    assert reasons["died"].startswith(f"process {NOBODY} is gone")
    assert f"{tmp_path / 'unreadable' / 'summary.json'} is damaged" in reasons["unreadable"]
    assert counts(list(found.values())).startswith("7 runs: 1 running, 1 foreign, 1 finished")


def test_the_owner_decides_who_runs(tmp_path: Path, other: int) -> None:
    with open_run(tmp_path, settings()):
        assert the_run(tmp_path)["status"] == "running"
    assert the_run(tmp_path)["status"] == "stopped"
    write_owner(tmp_path, other)
    assert the_run(tmp_path)["status"] == "running"
    owner = json.loads((tmp_path / "owner.json").read_text())
    (tmp_path / "owner.json").write_text(json.dumps(owner | {"process_start": "another process has this pid now"}))
    assert the_run(tmp_path)["status"] == "died"


def test_a_run_of_another_host_says_when_it_wrote(tmp_path: Path) -> None:
    make_run(tmp_path, "foreign")
    assert "continues" not in the_run(tmp_path)["reason"]
    long_ago = time.time() - SILENT_SECONDS - 3600
    for name in ("owner.json", "metrics.csv"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    assert (the_run(tmp_path)["status"], "1 h 10 min ago; the same" in the_run(tmp_path)["reason"]) == ("foreign", True)


def test_an_older_failure_is_not_that_of_a_session_that_died(tmp_path: Path) -> None:
    make_run(tmp_path, "failed")
    write_owner(tmp_path, NOBODY, started="2999-01-01T00:00:00+00:00")
    assert the_run(tmp_path)["status"] == "died"
    write_owner(tmp_path, NOBODY, started="2020-01-01T00:00:00+00:00")  # what a sweep says of a killed job
    assert the_run(tmp_path)["status"] == "failed"
    write_owner(tmp_path, NOBODY, made_runs.HOST, started="2020-01-01T00:00:00+00:00")
    assert the_run(tmp_path)["status"] == "failed"


def test_a_finished_run_stays_finished_when_a_later_start_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    Failure("error", "ValueError", "cannot resume: optimizer.lr changed", 2, began=False).write(tmp_path)
    assert the_run(tmp_path)["status"] == "finished"
    Failure("memory", "MemoryError", "out of memory", 2).write(tmp_path)
    assert (the_run(tmp_path)["status"], the_run(tmp_path)["reason"]) == ("failed", "out of memory")


def test_a_run_that_went_on_is_not_finished(tmp_path: Path) -> None:
    make_run(tmp_path / "longer", "finished")
    made_runs.write_command(tmp_path / "longer", 200)
    write_metrics(tmp_path / "longer", [3.0] * 12)
    make_run(tmp_path / "more_patience", "finished")
    write_summary(tmp_path / "more_patience", steps=40, stopped_by="early_stopping")
    assert [(run["status"], run["steps"], run["total_steps"]) for run in runs(tmp_path)] == [
        ("stopped", 111, 200),
        ("finished", 40, 100),
    ]
    made_runs.write_checkpoint(tmp_path / "more_patience", 41)
    assert runs(tmp_path)[1]["status"] == "stopped"
    write_summary(tmp_path / "more_patience", finished=False, stopped_by="time", steps=41)
    assert (runs(tmp_path)[1]["status"], runs(tmp_path)[1]["reason"]) == ("stopped", "its time was over")


def test_settings_alone(tmp_path: Path) -> None:
    write_settings(tmp_path / "a", settings())
    Failure("error", "ValueError", "monitor_mode=up", 2).write(tmp_path)  # failed before it wrote them
    assert (the_run(tmp_path)["status"], the_run(tmp_path)["task"]) == ("failed", None)
    (tmp_path / "failure.json").unlink()
    run = the_run(tmp_path)
    assert (run["status"], run["reason"], run["steps"], run["task"]) == ("stopped", "not begun", 0, "sft")


def test_figures_of_a_run_that_has_not_finished(tmp_path: Path) -> None:
    make_run(tmp_path, "stopped")
    run = the_run(tmp_path)
    assert (run["steps"], run["total_steps"], run["monitor"], run["best_value"]) == (53, 100, "val/loss", 1.875)
    assert (run["val/loss"], run["train/loss"]) == (1.875, 2.875)
    losses = [1.0 + abs(index - 3000) / 100 for index in range(5000)]  # the best one is far from the end
    write_metrics(tmp_path, losses)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("50000,9.0,9")  # a killed process left it
    run = the_run(tmp_path)
    assert (run["steps"], run["best_value"], run["val/loss"]) == (49991, losses[2999], losses[4999])
    make_run(tmp_path, "stopped", monitor="val/accuracy", monitor_mode="max")
    assert the_run(tmp_path)["best_value"] is None


def test_the_best_value_of_a_run_without_checkpoints_is_that_of_its_validations(tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    write_metrics(tmp_path, [3.0, 2.5, 2.0, 1.25, 1.0, 2.0])  # every second one is a validation
    write_summary(tmp_path, monitor=None, best_value=None)
    run = the_run(tmp_path)
    assert (run["status"], run["monitor"], run["best_value"], run["val/loss"]) == ("finished", "val/loss", 1.25, 1.51)


def test_figures_of_a_finished_run(tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    run = the_run(tmp_path)
    assert {key: run[key] for key in ("steps", "seconds", "best_value", "val/loss", "test/accuracy")} == {
        "steps": 100,
        "seconds": 61.5,
        "best_value": 1.5,
        "val/loss": 1.51,
        "test/accuracy": 0.75,
    }


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "summary.json", "owner.json", "failure.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"a: &a [*a]", b'{"seed": 1'])
def test_a_damaged_file_is_named_and_the_others_are_listed(name: str, content: bytes, tmp_path: Path) -> None:
    make_run(tmp_path / "good", "finished")
    make_run(tmp_path / "bad", "stopped", as_json=name != "config.yaml")
    (tmp_path / "bad" / name).write_bytes(content)
    bad, good = runs(tmp_path)
    assert good["status"] == "finished"
    if (name, content) == ("config.yaml", b"a: &a [*a]"):
        assert bad["status"] in ("stopped", "unreadable")
        return
    assert bad["status"] == "unreadable"
    assert name in bad["reason"]
    assert table([bad, good])


def test_hostile_files_do_not_hang_or_fail(tmp_path: Path) -> None:
    make_run(tmp_path / "pipe", "finished")
    (tmp_path / "pipe" / "summary.json").unlink()
    os.mkfifo(tmp_path / "pipe" / "summary.json")
    make_run(tmp_path / "bomb", "stopped", as_json=False)
    bomb = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)])
    (tmp_path / "bomb" / "config.yaml").write_text(bomb)
    make_run(tmp_path / "numbers", "finished")
    odd = {"seconds": float("inf"), "steps": 10**400, "monitor": ["\x1b[31m"], "metrics": {"val/loss": float("nan")}}
    write_summary(tmp_path / "numbers", **odd)
    found = {record["name"]: record for record in runs(tmp_path)}
    assert "summary.json is not a regular file" in found["pipe"]["reason"]
    assert "more than 20,000 values" in found["bomb"]["reason"]
    assert found["numbers"]["seconds"] is None
    assert "\x1b" not in "".join(table(list(found.values())))


def test_what_is_a_run_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "sweeps" / "study" / "lr_2", "finished")
    make_run(tmp_path / "sweeps" / "study" / "lr_10", "finished")
    make_run(tmp_path / "sweeps" / "study" / "lr_2" / "inside", "finished")  # belongs to the run around it
    make_run(tmp_path / ".hidden", "finished")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "link").symlink_to(tmp_path / "sweeps")
    assert [run["name"] for run in runs(tmp_path)] == ["sweeps/study/lr_2", "sweeps/study/lr_10"]
    assert the_run(tmp_path / "sweeps" / "study" / "lr_2")["name"] == "lr_2"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        runs(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        runs(tmp_path / "exported" / "config.json")


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    for status in MADE:
        make_run(tmp_path / status, status)
    before = digests(tmp_path)
    assert len(llm_lightning.runs(str(tmp_path))) == len(MADE)
    assert digests(tmp_path) == before


def test_settings_that_differ_among_runs_of_a_task(tmp_path: Path) -> None:
    for index, rate in enumerate((0.1, 0.2)):
        make_run(tmp_path / f"sft_{index}", "stopped", optimizer__lr=rate, run_name=f"sft_{index}")
    make_run(tmp_path / "dpo", "stopped", task___target_="llm_lightning.tasks.dpo.DPOModule", seed=7)
    found = {record["name"]: record for record in runs(tmp_path)}
    keys = set(found["sft_0"]) - {*run_status.FACTS, "train/loss", "val/loss"}
    assert keys == {"optimizer.lr"}
    assert [run["optimizer.lr"] for run in found.values()] == [0.001, 0.1, 0.2]
    assert [run["task"] for run in found.values()] == ["dpo", "sft", "sft"]
    everything = runs(tmp_path, every_setting=True)[0]
    assert (everything["seed"], everything["callbacks.samples.prompts"]) == (7, '["to be"]')
    assert all(value is None or isinstance(value, (str, int, float)) for value in everything.values())


def test_only_a_place_differs(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name, "stopped", run_name=name)
    assert [run["run_name"] for run in runs(tmp_path)] == ["a", "b"]


def test_settings_of_earlier_versions_are_read_from_yaml(tmp_path: Path) -> None:
    content = settings(run_name="2026-11-26", seed=3)
    write_settings(tmp_path / "new", content)
    write_settings(tmp_path / "old", content, as_json=False)
    shared = ["&id001\n- to be", "*id001"]  # as a dumper writes a list that occurs twice
    text = (tmp_path / "old" / "config.yaml").read_text()
    (tmp_path / "alias").mkdir()
    (tmp_path / "alias" / "config.yaml").write_text(f"{text}one: {shared[0]}\nother: {shared[1]}\n")
    alias, new, old = runs(tmp_path, every_setting=True)
    assert {**new, "name": "", "folder": ""} == {**old, "name": "", "folder": ""}
    assert new["seed"] == alias["seed"] == 3
    assert alias["one"] == alias["other"] == '["to be"]'


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for index, (status, rate) in enumerate([("finished", 0.01), ("failed", 0.001), ("stopped", 1e-4)]):
        make_run(tmp_path / f"lr_{index}", status, optimizer__lr=rate, data__path="a,b.txt" if index else None)
    return tmp_path


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        (["status=failed"], ["lr_1"]),
        (["status=f*"], ["lr_0", "lr_1"]),
        (["status=failed,stopped"], ["lr_1", "lr_2"]),
        (["optimizer.lr=1e-3"], ["lr_1"]),
        (["optimizer.lr=0.0100"], ["lr_0"]),
        (["data.path=a,b.txt", "status=stopped"], ["lr_2"]),
        (["data.path=null"], ["lr_0"]),
        (["name=lr_[01]"], ["lr_0", "lr_1"]),
        (["task=sft", "seed=1", "test/accuracy=0.75"], ["lr_0"]),
        (["status=failed", "test/accuracy=0.75"], []),
    ],
)
def test_conditions(conditions: list[str], names: list[str], study: Path) -> None:
    assert [run.facts["name"] for run in select(read_runs(study), conditions)] == names


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("status", "--where status must be KEY=VALUE, such as status=failed"),
        ("statsu=failed", "--where statsu: no run has it; did you mean status? There are name, folder, "),
        ("optimiser.lr=1", "did you mean optimizer.lr? "),
        ("status=finshed", "--where status=finshed: did you mean finished? a run is running, "),
    ],
)
def test_misspelt_conditions(condition: str, words: str, study: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        select(read_runs(study), [condition])


def test_order(study: Path) -> None:
    def names(key: str, **options: bool) -> list[str]:
        return [run.facts["name"] for run in ordered(read_runs(study), key, **options)]

    assert names("optimizer.lr") == ["lr_2", "lr_1", "lr_0"]
    assert names("best_value") == ["lr_0", "lr_1", "lr_2"]
    assert names("test/accuracy") == names("test/accuracy", reverse=True) == ["lr_0", "lr_1", "lr_2"]
    assert names("name", reverse=True) == ["lr_2", "lr_1", "lr_0"]
    with pytest.raises(ValueError, match=r"--sort val/los: no run has it; did you mean val/loss\? There are name, "):
        refuse_unknown(read_runs(study), ["val/los"], "--sort")


def test_a_real_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*SETTINGS, f"data.path={write_corpus(tmp_path / 'a.txt', 60)}", f"hydra.run.dir={folder}"]
    assert fit_here(words).code == 0
    summary = json.loads((folder / "summary.json").read_text())
    run = the_run(folder)
    assert run["status"] == "finished"
    assert (run["task"], run["steps"], run["total_steps"]) == ("pretraining", 4, 4)
    assert run["best_value"] == summary["best_value"]
    assert {key: run[key] for key in summary["metrics"]} == summary["metrics"]
    (folder / "summary.json").unlink()
    before = run
    run = the_run(folder)
    assert (run["status"], run["steps"], run["total_steps"], run["monitor"]) == ("stopped", 4, 4, before["monitor"])
    assert run["best_value"] == pytest.approx(before["best_value"], rel=1e-6)
