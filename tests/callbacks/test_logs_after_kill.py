"""What stands beside the checkpoints after a run was killed and continued: every step once, none missing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.event_files import drop_events_from, masked_crcs, whole_records
from llm_lightning.callbacks.run_logs import MetricsFile, TensorBoard, tag_of
from llm_lightning.callbacks.samples import Samples
from llm_lightning.callbacks.throughput import Throughput
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

MEASURED = ("train/tokens_per_second", "train/peak_memory_gib")


class KilledError(Exception): ...


class KillAt(L.Callback):
    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            raise KilledError


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {name: curve for name, curve in read_metrics(folder / "metrics.csv").items() if name not in MEASURED}


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: curve for tag, curve in curves.items() if tag not in map(tag_of, MEASURED)} | {
        tag: [(event.step, 0.0) for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }


@pytest.mark.slow
def test_logs_of_a_killed_run_equal_those_of_an_uninterrupted_one(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: Path, *extra: L.Callback) -> None:
        L.seed_everything(7, verbose=False)
        path = checkpoints.newest_valid(folder / "checkpoints")
        resumed_step = checkpoints.read_header(path)["step"] if path else 0
        loggers = [kind(folder, resumed_step=resumed_step) for kind in (MetricsFile, TensorBoard)]
        callbacks = [Checkpoints(every_n_steps=2), Samples(["ab"], max_new_tokens=4), Throughput(), *extra]
        trainer = make_trainer(folder, callbacks, logger=loggers, accumulate_grad_batches=2, log_every_n_steps=1)
        data = make_data(batch_size=2, seed=5)
        trainer.fit(make_module(dropout=0.3), datamodule=data, ckpt_path=path, weights_only=True)

    whole_run = tmp_path / "whole"
    run(whole_run)
    whole = metrics(whole_run)
    assert [step for step, _ in whole["train/loss"]] == list(range(12))
    assert [step for step, _ in whole["train/loss_epoch"]] == [5, 11]
    assert (whole_run / "samples.md").read_text().count("## step ") == 2
    # In the first steps, after a checkpoint, in validation, between two epochs; twice in the same run.
    for hook, *steps in [
        ("on_train_batch_end", 1, 5),
        ("on_validation_end", 6),
        ("on_train_epoch_end", 6, 12),
    ]:
        killed_run = tmp_path / f"{hook}_{steps}"
        for step in steps:
            with pytest.raises(KilledError):
                run(killed_run, KillAt(step, hook))
        run(killed_run)
        assert metrics(killed_run) == whole
        assert tensorboard(killed_run) == tensorboard(whole_run)
        assert (killed_run / "samples.md").read_text() == (whole_run / "samples.md").read_text()
        assert not list(killed_run.rglob("*.damaged"))
        assert "is not what this run wrote" not in caplog.text


FEWER = "it has 4 rows before step 5, the checkpoint covers 5"
CHANGED = "rows before step 5 are not those that the checkpoint covers"
CHANGES: list[tuple[str, Callable[[bytes], bytes | None]]] = [
    ("it has 0 rows before step 5, the checkpoint covers 5; the file as it was is gone", lambda content: None),
    (FEWER, lambda content: content[: content.rindex(b"\n4,") + 1]),
    (FEWER, lambda content: content.replace(b"\n2,", b"\nx,")),
    (CHANGED, lambda content: content.replace(b"\n2,", b'\n2,\xff\0"')),
    (CHANGED, lambda content: content.replace(b"\n3,", b"\n3,1")),
    (CHANGED, lambda content: content.replace(b"loss", b"lost", 1)),
]


@pytest.mark.slow
def test_rows_that_are_gone_or_changed_are_said_and_kept(
    tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And the run goes on: its weights do not depend on its logs."""

    def run(folder: Path, max_steps: int) -> str:
        path = checkpoints.newest_valid(folder / "checkpoints")
        logger = MetricsFile(folder, resumed_step=checkpoints.read_header(path)["step"] if path else 0)
        callbacks = [Checkpoints(every_n_steps=2)]
        trainer = make_trainer(folder, callbacks, logger=[logger], max_steps=max_steps, log_every_n_steps=1)
        caplog.clear()
        trainer.fit(make_module(), datamodule=make_data(batch_size=2), ckpt_path=path, weights_only=True)
        return caplog.text

    run(tmp_path / "whole", 4)
    assert "not what" not in run(tmp_path / "whole", 5)
    content = (tmp_path / "whole" / "metrics.csv").read_bytes()
    for number, (said, change) in enumerate(CHANGES):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "metrics.csv").unlink()
        changed = change(content)
        assert changed != content
        if changed is not None:
            (folder / "metrics.csv").write_bytes(changed)
        text = run(folder, 6)
        assert f"{folder / 'metrics.csv'} is not what this run wrote: " in text, said
        assert said in text
        assert [path.read_bytes() for path in folder.glob("metrics.csv.damaged")] == [changed] * (changed is not None)
        assert number > 1 or "not what" not in run(folder, 7), "it is said once"
        assert read_metrics(folder / "metrics.csv")["val/loss"]


def test_a_damaged_event_file_loses_the_damaged_event_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TensorBoard(tmp_path / "whole")
    for step in range(30):
        logger.log_metrics({"loss": float(step), "rate": 0.5}, step)
    logger.log_text("text", "long " * 1000, 20)
    logger.finalize("success")
    source = next((tmp_path / "whole").iterdir())
    content, draw = source.read_bytes(), random.Random(0)
    good, damaged = whole_records(content)
    assert damaged == []
    events = [Event.FromString(content[start + 12 : end - 4]) for start, end in good]
    early = [bool(event.file_version) or event.step < 25 for event in events]
    assert early.count(True) > 50
    assert early.count(False) == 10
    for number in range(40):
        file = tmp_path / str(number) / source.name
        file.parent.mkdir()
        bit = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        caplog.clear()
        drop_events_from(file.parent, 25)
        assert f"{file} is damaged at byte " in caplog.text, bit
        assert [path.read_bytes() for path in file.parent.glob("*.damaged")] == [flipped]
        index = next(i for i, (_, end) in enumerate(good) if bit // 8 < end)
        expected = [content[start:end] for i, (start, end) in enumerate(good) if early[i] and i != index]
        assert file.read_bytes() == b"".join(expected), bit
        kept = file.read_bytes()
        caplog.clear()
        drop_events_from(file.parent, 25)
        assert (file.read_bytes(), caplog.text) == (kept, "")


def test_checksums_are_those_of_tensorflow() -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    draw = random.Random(1)
    pieces = [draw.randbytes(length) for length in (0, 1, 8, 5000, 7, 300, 8, 2048, 2049)]
    assert masked_crcs(pieces) == [int(masked_crc32c(piece)) for piece in pieces]
    assert masked_crcs([]) == []
