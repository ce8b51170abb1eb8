from __future__ import annotations

import csv
import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from llm_lightning.callbacks.event_files import masked_crcs
from llm_lightning.callbacks.run_logs import MetricsFile, TensorBoard
from llm_lightning.files.metrics_csv import read_metrics

FORK = multiprocessing.get_context("fork")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_values_of_one_step_share_a_row(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"train/loss": 2.5, "lr": 0.1}, 1)
    metrics.log_metrics({"train/loss": 2.0}, 2)
    metrics.save()
    metrics.log_metrics({"val/loss": torch.tensor(2.25), "tokens_seen": 64}, 2)
    metrics.save()
    metrics.log_metrics({"train/loss": 1.5}, 3)
    metrics.save()
    text = "step,train/loss,val/loss,train/eval_loss,lr,tokens_seen\n1,2.5,,,0.1,\n2,2.0,2.25,,,64\n3,1.5,,,,\n"
    assert metrics.path.read_text() == text


def test_a_value_of_an_earlier_step_finds_its_row(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.log_metrics({"train/loss": float(step)}, step)
        metrics.save()
    metrics.log_metrics({"val/loss": 9.0}, 2)
    metrics.save()
    metrics.log_metrics({"train/loss": 4.0}, 4)
    metrics.save()
    assert [(r["step"], r["train/loss"], r["val/loss"]) for r in rows_of(metrics.path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", "9.0"),
        ("3", "3.0", ""),
        ("4", "4.0", ""),
    ]


def test_reopening_continues_the_file_as_if_it_had_never_been_closed(tmp_path: Path) -> None:
    one, many = MetricsFile(tmp_path / "one"), tmp_path / "many"
    generator = random.Random(0)
    for step in range(1, 30):
        values = {name: generator.random() for name in ("train/loss", "val/loss", "lr") if generator.random() < 0.7}
        one.log_metrics(values, step)
        again = MetricsFile(many, resumed_step=step)
        again.log_metrics(values, step)
        again.save()
    one.save()
    assert read_metrics(one.path) == read_metrics(many / "metrics.csv")
    assert [r["step"] for r in rows_of(many / "metrics.csv")] == [str(step) for step in range(1, 30)]


def test_resume_drops_later_rows_and_a_half_written_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in range(1, 8):
        metrics.log_metrics({"train/loss": 1 / step}, step)
    metrics.save()
    with metrics.path.open("a") as file:
        file.write("8,0.1")
    resumed = MetricsFile(tmp_path, resumed_step=6)
    resumed.log_metrics({"train/loss": 0.5}, 6)
    resumed.save()
    assert [row["step"] for row in rows_of(metrics.path)] == ["1", "2", "3", "4", "5", "6"]
    assert rows_of(metrics.path)[-1]["train/loss"] == "0.5"
    assert read_metrics(metrics.path)["train/loss"][:2] == [(1, 1.0), (2, 0.5)]


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"val/loss": 5.0}, 0)
    metrics.save()
    MetricsFile(tmp_path).save()
    assert rows_of(metrics.path) == []


def test_every_cut_of_the_file_is_mended(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        metrics.log_metrics({"train/loss": step / 2, "val/loss": 1.0}, step)
    metrics.save()
    content = metrics.path.read_bytes()
    for length in range(len(content)):
        metrics.path.write_bytes(content[:length])
        again = MetricsFile(tmp_path, resumed_step=9)
        again.log_metrics({"train/loss": 0.0}, 9)
        again.save()
        complete = max(0, content[:length].count(b"\n") - 1)  # the first line is the header
        assert [row["step"] for row in rows_of(metrics.path)] == [*["1", "2", "3"][:complete], "9"]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("time,loss\n1,2\n")
    with pytest.raises(ValueError, match="first column is 'time'"):
        MetricsFile(tmp_path).log_metrics({"train/loss": 1.0}, 1)


def _log_until_killed(folder: Path, covered: FORK.Value) -> None:  # type: ignore[name-defined]
    metrics = MetricsFile(folder, resumed_step=covered.value)
    for step in range(covered.value, 10**9):
        metrics.log_metrics({"train/loss": step * 0.5}, step)
        if step % 7 == 0:
            metrics.log_metrics({f"metric_{step // 700}": float(step)}, step)
            metrics.save()
            covered.value = step + 1  # stands for a checkpoint


@pytest.mark.slow
def test_sigkill_at_any_instant_loses_no_covered_row(tmp_path: Path) -> None:
    covered, generator = FORK.Value("i", 0), random.Random(1)
    for _ in range(12):
        process = FORK.Process(target=_log_until_killed, args=(tmp_path, covered))
        process.start()
        time.sleep(generator.uniform(0.01, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert covered.value > 0
    MetricsFile(tmp_path, resumed_step=covered.value).save()
    losses = read_metrics(tmp_path / "metrics.csv")["train/loss"]
    assert losses == [(step, step * 0.5) for step in range(covered.value)]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _tensorboard_until_killed(folder: Path, steps: range, then: int) -> None:
    logger = TensorBoard(folder, resumed_step=steps.start)
    for step in steps:
        logger.log_metrics({"train/loss": float(step)}, step)
    logger.save()
    os.kill(os.getpid(), then)


def test_tensorboard_shows_each_step_once_after_kills(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "warm").log_metrics({"a": 1.0}, 1)  # imports what each fork would need seconds to import
    for steps in (range(20), range(10, 30), range(30, 35)):  # killed at 20, went on from 10, ...
        process = FORK.Process(target=_tensorboard_until_killed, args=(tmp_path, steps, signal.SIGKILL))
        process.start()
        process.join()
        newest = max(tmp_path.glob("events*"))
        with newest.open("ab") as file:  # a record that announces 100 bytes and has 5
            length = struct.pack("<Q", 100)
            file.write(length + struct.pack("<I", masked_crcs([length])[0]) + b"12345")
    assert scalars(tmp_path, "train/loss") == [(step, float(step)) for step in range(35)]
    assert [path.is_file() for path in tmp_path.glob("events*")] == [True] * 3


@pytest.mark.slow
def test_tensorboard_files_of_one_second_are_read_in_order(tmp_path: Path) -> None:
    for start in range(1, 4):
        logger = TensorBoard(tmp_path, resumed_step=start)
        logger.log_metrics({"loss": 1.0}, start)
        logger.log_metrics({"loss": 1.0}, start + 1)
        logger.save()
    names = sorted(path.name.split(".")[3] for path in tmp_path.iterdir())
    assert len(set(names)) == 3
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2, 3, 4]


def test_a_run_of_an_earlier_version_continues_in_its_folder(tmp_path: Path) -> None:
    earlier = TensorBoard(tmp_path / "run" / "tensorboard")
    for step in range(4):
        earlier.log_metrics({"train/loss": float(step)}, step)
    earlier.save()
    logger = TensorBoard(tmp_path / "run", resumed_step=2)
    logger.log_metrics({"train/loss": 7.0}, 2)
    logger.save()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tensorboard"]
    assert scalars(tmp_path / "run" / "tensorboard", "train/loss") == [(0, 0.0), (1, 1.0), (2, 7.0)]


def test_tensorboard_has_six_groups_of_scalars(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path)
    rows = ["train/loss", "train/eval_loss", "train/loss_epoch", "train/grad_norm", "lr", "epoch", "tokens_seen"]
    rows += ["train/tokens_per_second", "train/peak_memory_gib", "train/mfu", "samples/repetition", "val/loss"]
    logger.log_metrics(dict.fromkeys([*rows, "test/loss"], 1.0), 3)
    logger.log_hyperparams({"seed": 1}, {"best/val_loss": 0.5}, 4)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"train", "val", "lr", "time", "best", "test"}
    assert {tag for tag in tags if tag.startswith("time/")} == {
        "time/tokens_seen", "time/tokens_per_second", "time/peak_memory_gib", "time/mfu"
    }  # fmt: skip
    assert len(tags) == len(rows) + 1  # without the epoch, with the test and the best
    assert scalars(tmp_path, "val/samples_repetition") == [(3, 1.0)]


def test_tensorboard_hyperparameters_carry_the_final_metric(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path)
    logger.log_hyperparams({"a": 1})  # as Lightning does when training starts: not yet a result
    assert list(tmp_path.iterdir()) == []
    logger.log_metrics({"val/loss": 3.0}, 10)
    settings = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "run_name": None, "compile": False}
    logger.log_hyperparams(settings, {"best/val_loss": 2.5}, 11)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [path.is_file() for path in tmp_path.iterdir()] == [True]
    assert events.Scalars("best/val_loss")[0].value == 2.5
    assert scalars(tmp_path, "val/loss") == [(10, 3.0)]
    assert "hp_metric" not in events.Tags()["scalars"]
    found = events.PluginTagToContent("hparams")
    assert found.keys() == {
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }  # not the columns
    for name in ("optimizer.lr", "optimizer.betas", "run_name", "compile"):
        assert name in found["_hparams_/session_start_info"].decode("latin1")


def test_training_and_validation_share_a_chart(tmp_path: Path) -> None:
    """Also in a run that was killed and continued: one layout."""
    for start in (0, 3):
        logger = TensorBoard(tmp_path, resumed_step=start)
        for step in range(start, start + 4):
            logger.log_metrics({"train/loss": 1.0, "train/accuracy": 1.0}, step)
            logger.log_metrics({"val/loss": 1.0, "val/accuracy": 0.5, "val/accuracy_low": 0.4}, step)
        logger.save()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert [chart.title for chart in category.chart] == ["loss", "accuracy"]
    tags = ["train/loss", "train/eval_loss", "val/loss", "train/loss_epoch", "val/accuracy", "val/accuracy_low"]
    shown = [[tag for tag in tags if re.match(chart.multiline.tag[0], tag)] for chart in category.chart]
    assert shown == [["train/loss", "train/eval_loss", "val/loss"], ["val/accuracy"]]


def test_a_picture_is_the_file_itself(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 840, 540) + b"pixels"
    logger = TensorBoard(tmp_path)
    logger.log_picture("loss", png, 5)
    logger.save()
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("loss")
    assert (image.encoded_image_string, image.width, image.height, image.step) == (png, 840, 540, 5)


def test_tensorboard_text(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path)
    logger.log_text("samples", "hello", 3)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3
    assert event.tensor_proto.string_val == [b"hello"]


WITHOUT_TENSORFLOW = """
import sys
import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from llm_lightning.callbacks.run_logs import TensorBoard

for resumed_step in (0, 1):
    ours = TensorBoard("ours", resumed_step)
    ours.log_metrics({"train/loss": 1.0}, step=resumed_step)
    ours.log_text("samples", "to be", step=resumed_step)
    ours.log_hyperparams({"seed": 1}, {"best/val_loss": 1.0}, step=resumed_step)
theirs = TensorBoardLogger("theirs")
theirs.log_metrics({"train/loss": 1.0}, step=0)
theirs.finalize("success")
assert "torch.utils.tensorboard" in sys.modules and "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('TensorFlow was imported')\n")
    places = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": places}
    script = [sys.executable, "-c", WITHOUT_TENSORFLOW]
    outcome = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 3
