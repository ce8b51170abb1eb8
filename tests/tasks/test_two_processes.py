"""Classification in two processes: the same losses and exact metrics as in one, with frozen blocks and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import WITH_PLOTS, finish, start, write_checkpoint

from llm_lightning.files.metrics_csv import read_metrics

CLASSIFY = [*(word for word in WITH_PLOTS if "samples" not in word), "task=classification", "data.bucket=false"]
FORMS = {
    "last_block": [],
    "lora": ["lora=default"],
    "head": ["task.trained_blocks=0"],
    "all": ["task.trained_blocks=all"],
}


def run(folder: Path, base: Path, arguments: list[str]) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """Training losses and final metrics."""
    outcome = finish(start([*CLASSIFY, f"init_from={base}", f"hydra.run.dir={folder}", *arguments], folder.parent))
    assert outcome.code == 0, outcome.err[-3000:]
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    return read_metrics(folder / "metrics.csv")["train/loss"], metrics


@pytest.mark.slow
def test_two_processes_are_one_with_many_classes(tmp_path: Path) -> None:
    """Logits of more than 100 classes stay in their process; what is measured on them is the same."""
    letters = [f"{chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(120)]
    rows = [f"{name} {letters[number]} text\t{name}\n" for name in letters for number in range(11)]
    (tmp_path / "many.tsv").write_text("text\tlabel\n" + "".join(rows))
    base = write_checkpoint(tmp_path / "base.ckpt", n_layer=3)
    many = [f"data.path={tmp_path / 'many.tsv'}", "optimizer.lr=1e-2"]
    _, metrics = run(tmp_path / "one", base, [*many, "data.batch_size=6"])
    two = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=3"]
    _, other_metrics = run(tmp_path / "two", base, [*many, *two])
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
def test_two_processes_are_one(tmp_path: Path, strategy: str, form: str) -> None:
    base = write_checkpoint(tmp_path / "base.ckpt", n_layer=3)
    losses, metrics = run(tmp_path / "one", base, [*FORMS[form], "data.batch_size=6"])
    two = [f"accelerator={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=3"]
    other_losses, other_metrics = run(tmp_path / "two", base, [*FORMS[form], *two])
    assert [step for step, _ in losses] == [step for step, _ in other_losses] == [0, 1, 2, 3]
    for (_, one), (_, other) in zip(losses, other_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name in ("loss", "accuracy", "accuracy_low", "precision", "recall", "f1", "auroc"):
        for split in ("val", "test"):
            assert metrics[f"{split}/{name}"] == pytest.approx(other_metrics[f"{split}/{name}"], rel=1e-4), name
