"""The adapter alone, after runs that were stopped, killed, extended, moved, or made by an earlier version."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from tiny_run import SETTINGS, fit_here, write_checkpoint

from llm_lightning.cli.main import main as cli
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.lora import merge_and_unload
from llm_lightning.tasks.base import TaskModule
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.checkpoint import HEADER, load, read_header, save
from llm_lightning.weights.digests import digest_under
from llm_lightning.weights.load import load_model

PLAIN = [word for word in SETTINGS if "samples" not in word and "max_steps" not in word] + [
    "callbacks.plots=null",
    "logger=csv",
]
FORMS = {
    "pretraining": ["callbacks.samples=null"],
    "classification": ["task=classification"],
    "sft": [
        "task=sft",
        "callbacks.samples=null",
        "callbacks.responses=null",
        "data.template='{instruction}{response}'",
    ],
    **{
        f"dpo {kind}": [
            "task=dpo",
            f"task.reference={kind}",
            "callbacks.samples=null",
            "data.template='{instruction}{response}'",
        ]
        for kind in ("copy", "adapter_off", "cached")
    },
}
IDS = torch.arange(40).view(2, -1)


def command(project: Path, form: str, max_steps: int, *more: str) -> list[str]:
    """A run with adapters on `project/base.ckpt`, of a longer context than the run has."""
    if not project.is_dir():
        write_checkpoint(project / "base.ckpt", context_length=64)
        rows = [
            {"instruction": f"Say {i}", "output": f"yes {i}", "chosen": f"yes {i}", "rejected": "no" * (1 + i % 4)}
            for i in range(40)
        ]
        (project / "rows.json").write_text(json.dumps(rows))
        (project / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    data = {"pretraining": "text.txt", "classification": None}.get(form, "rows.json")
    settings = [*PLAIN, *FORMS[form], "model.context_length=48", "lora=default", "lora.rank=2", "optimizer.lr=1e-2"]
    if data is not None:
        settings.append(f"data.path={project / data}")
    places = [f"init_from={project / 'base.ckpt'}", f"hydra.run.dir={project / 'run'}"]
    return [*settings, *places, f"trainer.max_steps={max_steps}", "callbacks.checkpoints.every_n_steps=1", *more]


def stopped(words: list[str], step: int) -> None:
    """Run until a signal comes after `step` updates."""
    ends = TaskModule.on_train_batch_end

    def on_train_batch_end(self: TaskModule, *arguments: Any) -> None:
        ends(self, *arguments)
        if self.global_step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskModule, "on_train_batch_end", on_train_batch_end)
        outcome = fit_here(words)
    assert outcome.code == 128 + signal.SIGTERM, outcome.err


def ended(words: list[str]) -> str:
    outcome = fit_here(words)
    assert outcome.code == 0, outcome.err
    return outcome.out


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, torch.tensor([20, 3])) if isinstance(model, Classifier) else model(IDS)


def assert_right(project: Path) -> None:
    """Every checkpoint names the base, and the adapter works alone, on a model, moved with its project, and in PEFT."""
    base = digest_under({"model": {"context_length": 48}}, load_model(project / "base.ckpt").gpt)
    files = sorted((project / "run" / "checkpoints").glob("*.ckpt"))
    assert {file.name: read_header(file)["lineage"]["base"] for file in files} == {file.name: base for file in files}
    adapter = project / "run" / "checkpoints" / "adapter.ckpt"
    whole = load_model(project / "run").model
    assert torch.equal(outputs(load_model(adapter).model), outputs(whole))
    moved = shutil.copytree(project, project.with_name(f"{project.name} moved"))
    project.rename(project.with_name("away"))
    try:
        assert torch.equal(outputs(load_model(moved / "run" / "checkpoints" / "adapter.ckpt").model), outputs(whole))
        (moved / "base.ckpt").unlink()
        with pytest.raises(FileNotFoundError, match="say where with base="):
            load_model(moved / "run" / "checkpoints" / "adapter.ckpt")
    finally:
        project.with_name("away").rename(project)
        shutil.rmtree(moved)
    if isinstance(whole, Classifier):
        return
    assert cli(["generate", str(project / "base.ckpt"), "a", "--adapter", str(adapter), "--max-new-tokens", "2"]) == 0
    assert cli(["export", str(adapter), str(project / "peft"), "--format", "peft"]) == 0
    by_peft = merge_and_unload(load_model(project / "peft").model).trunk
    assert torch.allclose(
        outputs(by_peft), outputs(merge_and_unload(load_model(project / "run").model).trunk), atol=1e-5
    )
    shutil.rmtree(project / "peft")


@pytest.mark.slow
def test_the_adapter_of_a_run_that_was_stopped_and_extended(tmp_path: Path) -> None:
    stopped(command(tmp_path / "p", "pretraining", 3), 1)
    ended(command(tmp_path / "p", "pretraining", 3))
    assert_right(tmp_path / "p")
    ended(command(tmp_path / "p", "pretraining", 4))
    assert_right(tmp_path / "p")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_adapter_of_every_task_and_reference(tmp_path: Path, form: str) -> None:
    project = tmp_path / "p"
    for step in (1, 2):
        stopped(command(project, form, 4), step)
    ended(command(project, form, 4))
    assert_right(project)
    for max_steps in (5, 6):
        ended(command(project, form, max_steps))
        assert_right(project)


@pytest.mark.slow
def test_the_adapter_of_a_run_that_was_killed(tmp_path: Path) -> None:
    words = command(tmp_path / "p", "dpo copy", 60, "trainer.max_epochs=-1")
    process = Forked(words, tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "p" / "run" / "checkpoints").glob("step_*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert "Resuming from" in ended(words)
    assert_right(tmp_path / "p")


def damage(project: Path) -> None:
    """Make every checkpoint what an earlier version wrote after it had continued the run once."""
    for file in {path.resolve() for path in (project / "run" / "checkpoints").glob("*.ckpt")}:
        state = load(file)
        state[HEADER]["lineage"]["base"] = "0" * 64
        state[HEADER]["lineage"].pop("base_of", None)
        state[HEADER] |= {"base": "0" * 64} if "base" in state[HEADER] else {}
        save(file, state)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_a_run_of_an_earlier_version_is_mended(tmp_path: Path, precision: str) -> None:
    project, more = tmp_path / "p", [f"trainer.precision={precision}"]
    ended(command(project, "classification", 2, *more))
    damage(project)
    adapter = project / "run" / "checkpoints" / "adapter.ckpt"
    with pytest.raises(checkpoints.CheckpointError, match="for other weights"):
        load_model(adapter)
    assert "is written again" in ended(command(project, "classification", 2, *more))  # finished, but for that
    load_model(adapter)
    assert "is written again" not in ended(command(project, "classification", 2, *more))
    damage(project)
    ended(command(project, "classification", 3, *more))
    load_model(adapter)
    damage(project)
    (project / "base.ckpt").rename(project / "elsewhere.ckpt")
    out = ended(command(project, "classification", 4, *more))
    if precision == "32-true":  # the frozen weights in the checkpoint are those of the base
        load_model(adapter, base=project / "elsewhere.ckpt")
    else:
        assert "The adapter of this run may be refused" in out
