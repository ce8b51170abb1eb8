"""Whole runs on a CUDA GPU: they learn what runs on a CPU learn, in the precisions and forms that a GPU is used with.

`test_kill.py` kills them.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import ROOT, SETTINGS, Outcome, assert_same, fit_here, write_corpus

from llm_lightning import generate_text, load_model
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

pytestmark = pytest.mark.gpu

REPLACED = ("accelerator=", "trainer.precision=", "trainer.max_steps=", "model.context_length=", "callbacks.")
SHARED = [
    *(word for word in SETTINGS if not word.startswith(REPLACED)),
    "model.n_layer=2",
    "model.n_embd=64",
    "scheduler=constant",
    "callbacks.plots=null",
]
WRITTEN = "callbacks.samples.max_new_tokens=9"
ANSWERS = [WRITTEN, "callbacks.responses.max_records=9", "callbacks.responses.max_new_tokens=9"]
SFT = ["model.context_length=320", "data.batch_size=4", *ANSWERS]
RUNS = {
    "pretraining": ["model.context_length=64", WRITTEN],
    "classification": ["task=classification", "model.context_length=64", "task.trained_blocks=all"],
    "frozen": ["task=classification", "model.context_length=64", "task.trained_blocks=1"],
    "packed": ["task=sft", *SFT, "data.packing=true"],
    "padded": ["task=sft", *SFT, "data.packing=false"],
    "lora": ["task=lora", *SFT],
    "dpo": ["task=dpo", "model.context_length=400", "data.batch_size=4", WRITTEN],
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt", 4000)


def words(name: str, corpus: Path, folder: Path, *more: str, steps: int = 8) -> list[str]:
    return [
        *SHARED,
        *RUNS[name],
        *([f"data.path={corpus}"] if name == "pretraining" else []),
        f"trainer.max_steps={steps}",
        f"hydra.run.dir={folder}",
        *more,
    ]


def fit(arguments: Sequence[str]) -> Outcome:
    outcome = fit_here(arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def state(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "checkpoints" / "last.ckpt")["state_dict"]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses and gradient norms of a run."""
    found = read_metrics(folder / "metrics.csv")
    return {name: found[name] for name in found if "loss" in name or name == "train/grad_norm"}


def assert_close(actual: Path, expected: Path, relative: float) -> None:
    """The curves of `expected` are within `actual`'s, which may have been validated more often."""
    ours, theirs = curves(actual), curves(expected)
    assert ours.keys() == theirs.keys()
    assert len(theirs["train/loss"]) == 8
    for name in theirs:
        values = dict(ours[name])
        for step, value in theirs[name]:
            assert math.isclose(values[step], value, rel_tol=relative, abs_tol=1e-6), (name, step, values[step], value)


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_gradients_are_those_of_a_cpu(name: str, tmp_path: Path, corpus: Path) -> None:
    """In float32, without dropout: sums in another order differ by 1e-7, and AdamW's first updates enlarge that."""
    for device in ("cpu", "gpu"):
        options = [f"accelerator={device}", "trainer.precision=32-true", "model.dropout=0"]
        fit(words(name, corpus, tmp_path / device, *options))
    assert_close(tmp_path / "gpu", tmp_path / "cpu", 2e-4)


@pytest.mark.parametrize("name", RUNS)
def test_by_default_a_run_takes_the_gpu_in_bfloat16_and_repeats_its_bits(
    name: str, tmp_path: Path, corpus: Path
) -> None:
    more = ["model.dropout=0.1"] if name != "dpo" else []
    for folder in ("one", "other"):
        fit(words(name, corpus, tmp_path / folder, *more))
    settings = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert settings["trainer"]["accelerator"] == "auto"
    assert settings["trainer"]["precision"] == "bf16-mixed"
    assert checkpoints.load(tmp_path / "one" / "checkpoints" / "last.ckpt")["rng"][0]["cuda"]
    assert_same(state(tmp_path / "one"), state(tmp_path / "other"))
    assert curves(tmp_path / "one") == curves(tmp_path / "other")


def test_float16_with_its_loss_scale_continues_to_the_bit(tmp_path: Path, corpus: Path) -> None:
    for folder, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        options = ["accelerator=gpu", "trainer.precision=16-mixed", "model.dropout=0.1"]
        fit(words("pretraining", corpus, tmp_path / folder, *options, steps=steps))
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    losses = [value for _, value in curves(tmp_path / "whole")["train/loss"]]
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("name", ["pretraining", "packed", "dpo"])
def test_recomputed_activations_change_no_bit(name: str, tmp_path: Path, corpus: Path) -> None:
    options = ["accelerator=gpu", "trainer.precision=bf16-mixed", f"model.dropout={0.1 if name != 'dpo' else 0}"]
    for setting in ("false", "true"):
        setting_word = f"model.activation_checkpointing={setting}"
        fit(words(name, corpus, tmp_path / setting, *options, setting_word))
    assert_same(state(tmp_path / "true"), state(tmp_path / "false"))


@pytest.mark.parametrize("name", ["pretraining", "packed"])
def test_a_compiled_model_learns_the_same(name: str, tmp_path: Path, corpus: Path) -> None:
    options = ["accelerator=gpu", "trainer.precision=32-true", "model.dropout=0"]
    for setting in ("false", "true"):
        fit(words(name, corpus, tmp_path / setting, *options, f"compile={setting}"))
    assert_close(tmp_path / "true", tmp_path / "false", 2e-4)


def test_a_model_from_the_gpu_is_the_same_on_the_cpu(tmp_path: Path, corpus: Path) -> None:
    fit(words("pretraining", corpus, tmp_path / "run", "accelerator=gpu", "trainer.precision=bf16-mixed", steps=40))
    texts = {
        device: generate_text(load_model(tmp_path / "run", device=device), "to be", max_new_tokens=40, temperature=0)
        for device in ("cpu", "cuda")
    }
    assert texts["cpu"] == texts["cuda"]


def test_a_run_from_the_gpu_continues_on_the_cpu(tmp_path: Path, corpus: Path) -> None:
    """Where the settings allow it: on a machine without a GPU, `auto` is the CPU."""
    options = ["trainer.precision=32-true", "model.dropout=0"]
    for folder in ("gpu", "mixed"):
        fit(words("pretraining", corpus, tmp_path / folder, *options, steps=8 if folder == "gpu" else 4))
    rest = words("pretraining", corpus, tmp_path / "mixed", *options, steps=8)
    done = without_a_gpu("from tiny_run import fit_here", f"print(fit_here({rest!r}))")
    assert "code=0" in done, done
    assert_close(tmp_path / "mixed", tmp_path / "gpu", 2e-4)


def without_a_gpu(*lines: str) -> str:
    return python(*lines, CUDA_VISIBLE_DEVICES="")


def python(*lines: str, **environment: str) -> str:
    """What these lines print, in a process of their own."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def little_memory() -> Iterator[None]:
    """As if the GPU had a five-hundredth of its memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_too_little_memory_is_one_line_with_the_remedy(tmp_path: Path, corpus: Path) -> None:
    sizes = ["model.n_embd=1024", "model.n_layer=8", "data.batch_size=64"]
    outcome = fit_here(words("pretraining", corpus, tmp_path / "run", "accelerator=gpu", *sizes))
    assert outcome.code == 2, outcome.err
    assert "lower data.batch_size" in outcome.err.splitlines()[-1]
