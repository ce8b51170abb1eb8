"""Classification in two processes: the same losses and exact metrics as in one, with frozen blocks and adapters."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import finish_two
from tiny_run import SETTINGS, WITH_PLOTS, Outcome, finish, fit_here, start, write_checkpoint

from llm_lightning.files.metrics_csv import read_metrics

CLASSIFY = ["task=classification", "data.bucket=false"]
FORMS = {
    "last_block": [],
    "lora": ["lora=default"],
    "head": ["task.trained_blocks=0"],
    "all": ["task.trained_blocks=all"],
    "llama": ["task.trained_blocks=all"],
}


Found = tuple[list[tuple[int, float]], dict[str, Any]]
"""Training losses and final metrics."""


def words(folder: Path, base: Path, *arguments: str, settings: list[str] = SETTINGS) -> list[str]:
    own = [word for word in settings if "samples" not in word]
    return [*own, *CLASSIFY, f"init_from={base}", f"hydra.run.dir={folder}", *arguments]


def found(folder: Path, outcome: Outcome) -> Found:
    assert outcome.code == 0, outcome.err[-3000:]
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    return read_metrics(folder / "metrics.csv")["train/loss"], metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base.ckpt", n_layer=3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    """The weights that each of `FORMS` begins with."""
    llama = write_checkpoint(tmp_path_factory.mktemp("llama") / "base.ckpt", n_layer=3, kind="llama")
    return dict.fromkeys(FORMS, base) | {"llama": llama}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Callable[[str], Found]:
    """What one process finds, for each of `FORMS`."""

    @functools.cache
    def of(form: str) -> Found:
        folder = tmp_path_factory.mktemp("alone") / "run"
        return found(folder, fit_here(words(folder, bases[form], *FORMS[form], "data.batch_size=6")))

    return of


@pytest.mark.slow
def test_two_processes_are_one_with_many_classes(tmp_path: Path, base: Path) -> None:
    """Logits of more than 100 classes stay in their process; what is measured on them is the same.

    Lightning starts the second process itself.
    """
    letters = [f"{chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(120)]
    rows = [f"{name} {letters[number]} text\t{name}\n" for name in letters for number in range(11)]
    (tmp_path / "many.tsv").write_text("text\tlabel\n" + "".join(rows))
    many = [f"data.path={tmp_path / 'many.tsv'}", "optimizer.lr=1e-2"]
    one = words(tmp_path / "one", base, *many, "data.batch_size=6", settings=WITH_PLOTS)
    _, metrics = found(tmp_path / "one", fit_here(one))
    two = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=3"]
    started = start(words(tmp_path / "two", base, *many, *two, settings=WITH_PLOTS), tmp_path)
    _, other_metrics = found(tmp_path / "two", finish(started))
    for name in ("loss", "accuracy", "precision", "recall", "f1", "auroc"):
        for split in ("val", "test"):
            assert metrics[f"{split}/{name}"] == pytest.approx(other_metrics[f"{split}/{name}"], rel=1e-3), name
    for folder in ("one", "two"):
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert "confusion" not in summary
        assert all(pair["texts"] <= pair["of"] for pair in summary["most_confused"]["test"])
        assert (tmp_path / folder / "plots" / "test_confused.png").is_file()
    assert summary["most_confused"]["test"], "so little training confuses some"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(
    tmp_path: Path, bases: dict[str, Path], alone: Callable[[str], Found], strategy: str, form: str
) -> None:
    losses, metrics = alone(form)
    two = [f"accelerator={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=3"]
    command = [word for word in words(tmp_path / "two", bases[form], *FORMS[form], *two) if word != "accelerator=cpu"]
    other_losses, other_metrics = found(tmp_path / "two", finish_two(command, tmp_path))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert [step for step, _ in losses] == [step for step, _ in other_losses] == [0, 1, 2, 3]
    for (_, one), (_, other) in zip(losses, other_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name in ("loss", "accuracy", "accuracy_low", "precision", "recall", "f1", "auroc"):
        for split in ("val", "test"):
            assert metrics[f"{split}/{name}"] == pytest.approx(other_metrics[f"{split}/{name}"], rel=1e-4), name
