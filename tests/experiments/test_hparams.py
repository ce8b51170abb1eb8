"""The columns of TensorBoard's HParams tab, as its own server gives them for made runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_runs import make_run
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
from werkzeug.test import Client

from llm_lightning.callbacks.event_files import HPARAMS
from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.experiments.hparams import shown_settings, write_hparams
from llm_lightning.experiments.run_list import read_runs

LOGGER = {"tensorboard": {"_target_": "llm_lightning.callbacks.run_logs.TensorBoard"}}


def make(folder: Path, status: str, value: float | None = None, **changes: Any) -> None:
    """A made run with TensorBoard's events."""
    make_run(folder, status, logger=LOGGER, **changes)
    logger = TensorBoard(folder)
    logger.log_metrics({"train/loss": 9.0, "val/loss": 8.0}, 3)
    if value is not None:
        (run,) = read_runs(folder)
        logger.log_metrics({"test/accuracy": 0.75}, 100)
        shown = shown_settings(run.settings, "sft", ["optimizer.lr=1", "callbacks.plots=null"])
        logger.log_hyperparams(shown, {"best/val_loss": value}, 100)
    logger.save()


def hparams(logdir: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the HParams tab asks for: the columns, and the lines of the table by name."""
    runs = EventMultiplexer(tensor_size_guidance={"scalars": 0}).AddRunsFromDirectory(str(logdir))
    runs.Reload()
    flags = SimpleNamespace(generic_data="true")
    context = TBContext(data_provider=MultiplexerDataProvider(runs, str(logdir)), flags=flags, logdir=str(logdir))
    apps = HParamsPlugin(context).get_plugin_apps()
    experiment = Client(apps["/experiment"]).post(json={}).json
    statuses = [f"STATUS_{name}" for name in ("SUCCESS", "FAILURE", "RUNNING", "UNKNOWN")]
    asked = {"allowedStatuses": statuses, "startIndex": 0, "sliceSize": 100}
    groups = Client(apps["/session_groups"]).post(json=asked).json["sessionGroups"]
    return experiment, {group["name"]: group for group in groups}


def metrics_of(group: dict[str, Any]) -> dict[str, float]:
    return {one["name"]["tag"]: one["value"] for one in group.get("metricValues", [])}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two finished runs, one that failed while it trained, one that failed before it logged, one that runs."""
    folder = tmp_path / "sweeps" / "rates"
    for lr in (0.001, 0.01):
        make(folder / f"lr_{lr}", "finished", lr, optimizer__lr=lr)
    make(folder / "lr_1", "failed", optimizer__lr=1.0)
    make_run(folder / "lr_2", "failed", optimizer__lr=float("inf"), logger=LOGGER)
    make(folder / "lr_3", "running", optimizer__lr=3.0)
    return folder


def test_a_sweep_has_the_columns_that_vary_and_a_short_list(sweep: Path) -> None:
    write_hparams(sweep, read_runs(sweep), keys=["optimizer.lr"])
    experiment, groups = hparams(sweep)
    columns = [column["name"] for column in experiment["hparamInfos"]]
    assert columns[0] == "optimizer.lr"  # what differs is first
    assert set(columns) == {"optimizer.lr", "task", "model.n_layer", "model.n_embd", "data.batch_size", "seed"}
    assert [column["name"] for column in experiment["hparamInfos"] if column["differs"]] == ["optimizer.lr"]
    assert [one["name"]["tag"] for one in experiment["metricInfos"]] == ["best/val_loss", "test/accuracy"]
    assert set(groups) == {"lr_0.001", "lr_0.01", "lr_1", "lr_2"}
    assert metrics_of(groups["lr_0.01"]) == pytest.approx({"best/val_loss": 0.01, "test/accuracy": 0.75})
    assert (groups["lr_0.01"]["hparams"]["optimizer.lr"], groups["lr_0.01"]["hparams"]["task"]) == (0.01, "sft")
    assert {name: group["sessions"][0]["status"] for name, group in groups.items()} == {
        "lr_0.001": "STATUS_SUCCESS",
        "lr_0.01": "STATUS_SUCCESS",
        "lr_1": "STATUS_FAILURE",
        "lr_2": "STATUS_FAILURE",
    }
    assert (groups["lr_1"]["hparams"]["optimizer.lr"], metrics_of(groups["lr_1"])) == (1.0, {})
    assert groups["lr_2"]["hparams"]["optimizer.lr"] == "inf"  # a number of JSON it cannot be


def test_columns_are_rewritten_and_not_appended(sweep: Path) -> None:
    write_hparams(sweep, read_runs(sweep), keys=["optimizer.lr"])
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob(HPARAMS)}
    write_hparams(sweep, read_runs(sweep), keys=["optimizer.lr"])
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob(HPARAMS)} == before
    write_hparams(sweep, read_runs(sweep), keys=["scheduler.min_lr"], metrics=[])
    experiment, _ = hparams(sweep)
    assert "scheduler.min_lr" in [column["name"] for column in experiment["hparamInfos"]]
    assert [one["name"]["tag"] for one in experiment["metricInfos"]] == ["best/val_loss"]


def test_a_run_that_is_tried_again_loses_its_failed_line(sweep: Path) -> None:
    write_hparams(sweep, read_runs(sweep))
    assert [path.parent.name for path in sorted(sweep.glob(f"*/{HPARAMS}"))] == ["lr_1", "lr_2"]
    (sweep / "lr_1" / "failure.json").unlink()
    make(sweep / "lr_1", "finished", 1.0, optimizer__lr=1.0)  # its logger
    assert not (sweep / "lr_1" / HPARAMS).exists()
    (sweep / "lr_2" / "failure.json").unlink()
    (sweep / "lr_2" / "tensorboard").mkdir()
    (sweep / "lr_2" / "tensorboard" / "events.out.tfevents.1").touch()  # of an earlier version
    TensorBoard(sweep / "lr_2").log_metrics({"train/loss": 9.0}, 3)
    assert not (sweep / "lr_2" / HPARAMS).exists()
    write_hparams(sweep, read_runs(sweep))
    make_run(sweep / "lr_2", "finished", logger=LOGGER)  # without one
    write_hparams(sweep, read_runs(sweep))
    assert list(sweep.glob(f"*/{HPARAMS}")) == []
    assert hparams(sweep)[1]["lr_1"]["sessions"][0]["status"] == "STATUS_SUCCESS"


def test_above_several_sweeps_each_line_has_the_short_list(sweep: Path) -> None:
    other = sweep.with_name("ranks")
    make(other / "rank_4", "finished", 0.5, lora__rank=4)
    make(other.parent / "alone", "finished", 0.25)
    for folder in (sweep, other):
        write_hparams(folder, read_runs(folder))
    experiment, groups = hparams(sweep.parent)
    columns = {column["name"] for column in experiment["hparamInfos"]}
    assert columns >= {"task", "model.n_layer", "optimizer.lr", "seed"}
    assert {"rates/lr_0.01", "ranks/rank_4", "alone"} <= set(groups)
    for name in ("rates/lr_0.01", "ranks/rank_4", "alone"):
        assert groups[name]["hparams"].keys() >= {"task", "model.n_layer", "optimizer.lr", "seed"}
        assert metrics_of(groups[name]).keys() == {"best/val_loss", "test/accuracy"}


def test_runs_without_tensorboard_get_no_files(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "failed")
    write_hparams(tmp_path, read_runs(tmp_path))
    assert list(tmp_path.rglob("*tfevents*")) == []


def test_what_was_typed_is_shown() -> None:
    settings = {
        "optimizer._target_": "torch.optim.SGD",
        "optimizer.lr": 0.1,
        "seed": 3,
        "run_name": "x",
        "data.path": "p",
    }
    words = ["optimizer=sgd", "++data.path=p", "run_name=x", "task=sft", "hydra.run.dir=y"]
    shown = shown_settings(settings, "sft", words)
    assert json.loads(json.dumps(shown)) == {
        "task": "sft",
        "optimizer.lr": 0.1,
        "seed": 3,
        "optimizer._target_": "torch.optim.SGD",
        "data.path": "p",
    }
