"""`train` from Python, shell completion, how often a resumed run reads its checkpoint, and settings of before."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT, SETTINGS, train_here, write_corpus

from llm_lightning.experiments.command_line import continue_run
from llm_lightning.experiments.settings.checks import check_overrides
from llm_lightning.experiments.settings.compose import ConfigDirs
from llm_lightning.experiments.settings.targets import resolve_target
from llm_lightning.experiments.start import train
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.renamed import MOVED, RENAMED, translated

CONF = ROOT / "conf"
QUIET = [word for word in SETTINGS if "samples" not in word]
QUIET += ["callbacks.plots=null", "callbacks.samples=null", "data.eval_batches=0"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that continued from the weights of another, by `train`."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*QUIET, f"data.path={write_corpus(folder / 'corpus.txt')}"]
    root = logging.getLogger()
    before = root.handlers[:], root.level
    first = train([*words, f"hydra.run.dir={folder / 'first'}"])
    assert (root.handlers, root.level) == before
    assert first.folder == folder / "first"
    assert first.best_value == first.summary["best_value"] > 0
    second = train([*words, f"init_from={first.folder}", f"hydra.run.dir={folder / 'second'}"])
    assert second.summary["lineage"]["parent_name"] == str(first.folder)
    return second.folder


@pytest.mark.slow
def test_a_run_that_continues_hashes_its_checkpoint_once(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, loaded = [], []
    verify, load = checkpoints.verify, checkpoints.torch.load
    monkeypatch.setattr(checkpoints, "verify", lambda path: hashed.append(Path(path).name) or verify(path))
    monkeypatch.setattr(
        checkpoints.torch, "load", lambda path, **options: loaded.append(Path(path).name) or load(path, **options)
    )
    outcome = train_here([f"resume={run_folder}", "trainer.max_steps=6"])
    assert outcome.code == 0, outcome.err
    assert "Resuming from " in outcome.out
    assert hashed == ["step_00000004.ckpt"]
    assert loaded == ["step_00000004.ckpt"] * 2  # its header, then all of it


def test_what_is_not_one_run_is_refused() -> None:
    for word in ("-m", "sweep=book_ch06_table", "pipeline=nano", "--cfg=job"):
        with pytest.raises(ValueError, match=r"train\(\) trains one run and takes KEY=VALUE; leave"):
            train([word])
    with pytest.raises(ValueError, match=r"unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'\?"):
        train(["optimizer.lrr=1"])


def test_the_configuration_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = []
    compose = ConfigDirs.compose
    monkeypatch.setattr(ConfigDirs, "compose", lambda dirs, words: composed.append(words) or compose(dirs, words))
    check_overrides(["optimizer.lr=1e-4", "+trainer.profiler=simple", "task=lora", "experiment=book/ch07"], CONF)
    assert len(composed) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell: str) -> None:
    """As the script that `-sc install=SHELL` prints asks for it."""
    line = "python train.py model=gpt2_s"
    program = (
        "import os, sys; from pathlib import Path; from llm_lightning.experiments.launch import main\n"
        f"sys.argv = ['train.py', '-sc', 'query={shell}']; main(Path({str(ROOT / 'train.py')!r}))\n"
        f"sys.argv = ['train.py', '-sc', 'install={shell}']; main(Path({str(ROOT / 'train.py')!r}))"
    )
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "model=gpt2_small" in shown.stdout.split()
    assert "-sc query=" in shown.stdout


def test_a_renamed_key_is_refused_when_typed_and_translated_in_records(tmp_path: Path) -> None:
    values = {"data.max_lost": 0.2}
    assert set(values) == set(RENAMED)  # each with a value of its own here
    for old, new in RENAMED.items():
        with pytest.raises(ValueError, match=rf"{old} is now called {new}"):
            check_overrides(["task=sft", f"{old}={values[old]}"], CONF)
        check_overrides(["task=sft", f"{new}={values[old]}"], CONF)
        group, key = old.split(".")
        header: dict[str, Any] = {group: {"other": 1, key: values[old]}, "seed": 1}
        assert translated(header) == {group: {"other": 1, new.split(".")[1]: values[old]}, "seed": 1}
        command = {"folder": "x", "config_dir": None, "overrides": ["task=sft", f"{old}={values[old]}"]}
        (tmp_path / "command.json").write_text(json.dumps(command))
        assert f"{new}={values[old]}" in continue_run([f"resume={tmp_path}"], CONF)


def test_a_removed_value_is_refused_with_what_to_use() -> None:
    for word, instead in (
        ("task.reference=adapter_clone", "task.reference=adapter_off"),
        ("task.loss=length_normalised", "task.loss=average"),
    ):
        with pytest.raises(ValueError, match=rf"{word} was removed; in a new run set {instead}"):
            check_overrides(["task=dpo", word], CONF)


def test_the_targets_of_earlier_versions_resolve() -> None:
    earlier = {
        "callbacks.checkpoints": "Checkpoints",
        "callbacks.plots": "Plots",
        "callbacks.responses": "Responses",
        "callbacks.run_logs": "MetricsFile TensorBoard",
        "callbacks.samples": "Samples",
        "callbacks.throughput": "Throughput",
        "data.classification": "ClassificationDataModule",
        "data.instruction": "InstructionDataModule",
        "data.preference": "PreferenceDataModule",
        "data.pretraining": "PretrainingDataModule",
        "models.lora": "LoRAConfig",
        "optim": "AdamWConfig ConstantConfig WarmupCosineConfig",
        "tasks.classification": "ClassificationModule",
        "tasks.dpo": "DPOModule",
        "tasks.pretraining": "PretrainingModule",
        "tasks.sft": "SFTModule",
    }
    for module, names in earlier.items():
        for name in names.split():
            target = f"llm_lightning.{module}.{name}"
            assert resolve_target("x._target_", MOVED.get(target, target)).__name__ == name


@pytest.mark.slow
def test_a_moved_class_is_refused_when_typed_and_translated_in_records(tmp_path: Path) -> None:
    for old, new in MOVED.items():
        group = "optimizer" if old.endswith("AdamWConfig") else "scheduler"
        word = f"{group}._target_={old}"
        with pytest.raises(ValueError, match=rf"{word} is now called {new}"):
            check_overrides([word], CONF)
        before = {group: {"_target_": old, "lr": 1}, "seed": 1}
        assert translated(before) == {group: {"_target_": new, "lr": 1}, "seed": 1}
        command = {"folder": "x", "config_dir": None, "overrides": ["task=sft", word]}
        (tmp_path / "command.json").write_text(json.dumps(command))
        assert f"{group}._target_={new}" in continue_run([f"resume={tmp_path}"], CONF)
