from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.throughput import Throughput
from llm_lightning.experiments.run_folder import open_run
from llm_lightning.experiments.summary import build_summary, closing_lines, duration, git_state, write_summary


@pytest.fixture
def summary(tmp_path: Path, make_module: Any, make_trainer: Any, make_data: Any) -> dict[str, Any]:
    with open_run(tmp_path, {}) as run:
        trainer = make_trainer(tmp_path, [Checkpoints(every_n_steps=5), Throughput()], accumulate_grad_batches=2)
        module = make_module()
        module.header = {"config": {}, "lineage": {"data": "ragged", "parent": None}}
        trainer.fit(module, datamodule=make_data(batch_size=2, seed=5))
        written = build_summary(run, trainer, module, data={}, seconds=1.0)
        write_summary(tmp_path, written)
    return written


def test_a_run_is_summed_up_in_plain_values(tmp_path: Path, summary: dict[str, Any]) -> None:
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    # 11 micro-batches in windows of 2: 6 updates an epoch, two epochs.
    assert (summary["steps"], summary["total_steps"], summary["epochs"]) == (12, 12, 2.0)
    assert summary["tokens"] == 2 * sum(len(row) - 1 for row in _training_rows())
    assert summary["metrics"]["val/loss"] == pytest.approx(summary["best_value"], rel=0.1)
    # Tied head: embeddings 257 x 16 and 16 x 16; two blocks; the final norm.
    blocks = 2 * (2 * 32 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16))
    total = 257 * 16 + 16 * 16 + blocks + 32
    assert summary["parameters"] == {"total": total, "trainable": total}
    assert summary["checkpoint"] == "checkpoints/best.ckpt"
    assert (tmp_path / summary["checkpoint"]).is_file()
    assert set(summary["versions"]) == {"python", "llm-lightning", "torch", "lightning", "hydra-core"}
    assert summary["lineage"] == {"data": "ragged", "parent": None}


def _training_rows() -> list[Any]:
    from ragged import RaggedDataModule

    return RaggedDataModule(batch_size=1).train_samples.rows  # type: ignore[attr-defined]


def test_a_run_that_left_a_summary_is_finished(tmp_path: Path, summary: dict[str, Any]) -> None:
    with open_run(tmp_path, {}) as run:
        assert run.state(summary["total_steps"]) == "finished"
        assert run.state(summary["total_steps"] + 1) == "resumable"


def test_a_run_killed_before_its_summary_sums_up_the_same(
    tmp_path: Path, summary: dict[str, Any], make_module: Any, make_trainer: Any, make_data: Any
) -> None:
    (tmp_path / "summary.json").unlink()
    with open_run(tmp_path, {}) as run:
        trainer = make_trainer(tmp_path, [Checkpoints(every_n_steps=5), Throughput()], accumulate_grad_batches=2)
        module, data = make_module(), make_data(batch_size=2, seed=5)
        module.header = {"config": {}, "lineage": summary["lineage"]}
        trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
        again = build_summary(run, trainer, module, data={}, seconds=1.0)
    measured = ("ended", "seconds", "tokens_per_second")
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in summary.items() if k not in measured
    }
    assert again["seconds"] >= summary["seconds"]


def test_closing_lines_say_what_where_and_what_next(tmp_path: Path, summary: dict[str, Any]) -> None:
    fixed = summary | {"seconds": 88.0, "tokens": 1234567, "tokens_per_second": 14029.2}
    fixed |= {"monitor": "val/loss", "best_value": 2.5, "best_step": 9, "metrics": {"val/perplexity": 13.4637}}
    assert closing_lines(fixed, tmp_path, tmp_path.parent) == [
        "Finished 12 steps, 2 epochs, 1,234,567 tokens in 1 min 28 s, 14,029 tokens/s.",
        "Best val/loss 2.5000 after 9 steps; last val/perplexity 13.4637.",
        f"Run folder: {tmp_path.name}",
        f'Next: llm-lightning generate {tmp_path.name}/checkpoints/best.ckpt "The"',
    ]
    sets = fixed["metrics"] | {"val/hard/loss": 3.25, "val/hard/perplexity": 25.8, "val/easy/loss": 1.5}
    lines = closing_lines(fixed | {"metrics": sets, "monitor": "val/hard/loss"}, tmp_path, tmp_path.parent)
    assert lines[1] == "Best val/hard/loss 2.5000 after 9 steps; last val/perplexity 13.4637, val/easy/loss 1.5000."
    assert f"Run folder: {tmp_path.relative_to('/')}" in closing_lines(fixed, tmp_path, Path("/"))
    assert len(closing_lines(fixed | {"best_value": None, "tokens_per_second": None}, tmp_path, Path("/"))) == 3
    (tmp_path / "first").mkdir()
    inside = (str(tmp_path / "first"), f"compare {tmp_path.relative_to('/')}/first ")
    for parent, command in (("start.ckpt", "compare start.ckpt "), inside, (None, "respond ")):
        of_dpo = {"task": "dpo", "item": "token", "lineage": {"parent_name": parent}}
        assert closing_lines(fixed | of_dpo, tmp_path, Path("/"))[-1].startswith(f"Next: llm-lightning {command}")
    assert closing_lines(fixed | {"checkpoint": None}, tmp_path, Path("/"))[-1].startswith("Run folder: ")
    for answers, command in ((False, "respond "), (True, "judge ")):  # what it answered is not answered again
        if answers:
            (tmp_path / "responses.json").touch()
        assert closing_lines(fixed | {"task": "sft"}, tmp_path, Path("/"))[-1].startswith(
            f"Next: llm-lightning {command}"
        )
    for reason, said in (
        ("time", "Stopped by trainer.max_time after 5 of 12 steps"),
        ("other", "Stopped after 5 of 12"),
    ):
        assert closing_lines(fixed | {"steps": 5, "stopped_by": reason}, tmp_path, Path("/"))[0].startswith(said)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.6, "5 s"), (59.7, "1 min 0 s"), (88, "1 min 28 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert git_state(package) is None
    git("init")
    assert git_state(package) is None  # lies in a repository, but is not part of it
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_state(package)
    assert clean is not None
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "file").touch()
    assert git_state(package) == clean
    (package / "__init__.py").write_text("changed = True")
    assert git_state(package) == clean | {"dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(package) is None
