"""The book's recipes reach the book's losses, on the book's text."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from safetensors.torch import save_file
from tiny_run import train_here

from llm_lightning.data.records.labelled import read_labelled
from llm_lightning.experiments.settings.checks import check_overrides
from llm_lightning.experiments.settings.compose import config_dirs
from llm_lightning.experiments.sweep.words import list_jobs
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import apply_lora
from llm_lightning.weights.families.gpt2 import to_hf
from llm_lightning.weights.releases import RELEASES

ROOT = Path(__file__).resolve().parents[2]


def run(experiment: str, data_dir: Path, folder: Path, *more: str) -> dict[str, list[tuple[int, float]]]:
    """The curves of the experiment; its checkpoints (2 GB each) are removed."""
    arguments = [f"experiment={experiment}", f"data.path={data_dir / 'the-verdict.txt'}", f"hydra.run.dir={folder}"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments, *more]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["parameters"]["total"] == 162_419_712
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    return read_metrics(folder / "metrics.csv")


PUBLISHED = {1: (9.817, 9.924), 6: (8.066, 8.332), 11: (6.619, 7.042), 16: (6.046, 6.596)}
"""The notebook of chapter 5: steps done -> training and validation loss."""


@pytest.mark.soak
def test_chapter_5_begins_as_the_book(data_dir: Path, tmp_path: Path) -> None:
    """The book evaluates one step later than we do, and so between our losses lie its own."""
    curves = run("book/ch05", data_dir, tmp_path / "run", "trainer.max_steps=16")
    assert {lr for _, lr in curves["lr"]} == {4e-4}
    for column, name in enumerate(("train/eval_loss", "val/loss")):
        found = {step + 1: loss for step, loss in curves[name]}
        assert list(found) == [5, 10, 15, 16]
        for done in (5, 10, 15):
            assert PUBLISHED[done + 1][column] < found[done] < PUBLISHED[done - 4][column], (name, done)
        assert found[16] == pytest.approx(PUBLISHED[16][column], abs=0.1)


@pytest.mark.soak
def test_chapter_5(data_dir: Path, tmp_path: Path) -> None:
    """Published 0.569 / 6.373; the author accepts below 1 / 7; other seeds gave up to 1.08."""
    curves = run("book/ch05", data_dir, tmp_path / "run")
    assert [step for step, _ in curves["train/loss"]] == list(range(90))
    assert curves["train/eval_loss"][-1][1] < 1.2
    assert curves["val/loss"][-1][1] < 7
    assert {lr for _, lr in curves["lr"]} == {4e-4}


@pytest.mark.soak
def test_appendix_d(data_dir: Path, tmp_path: Path) -> None:
    """Published 1.312 / 6.158, and the learning rate at four steps."""
    curves = run("book/appendix_d", data_dir, tmp_path / "run")
    assert curves["train/eval_loss"][-1][1] < 1.5
    assert curves["val/loss"][-1][1] < 7
    rates = dict(curves["lr"])
    published = {0: 1e-5, 26: 9.633e-4, 27: 1e-3, 134: 1.0209e-5}
    assert {step: rates[step] for step in published} == pytest.approx(published, rel=1e-4)


# --- chapter 6: the table of variants --------------------------------------------------------------------------------

SWEEP = yaml.safe_load((ROOT / "conf" / "sweep" / "book_ch06_table.yaml").read_text())["hydra"]["sweeper"]
HEADS = {  # and widths of the weights that the rows start from
    "gpt2-small": (12, 768),
    "gpt2-medium": (16, 1024),
    "gpt2-large": (20, 1280),
    "gpt2-xl": (25, 1600),
}
TRAINED = {  # of GPT-2 small: the head 1,538; a block 7,087,872; final norm 1,536; the book's adapters 2,666,528
    "02_first_token": 7_090_946,
    "03_head_alone": 1_538,
    "04_last_two_blocks": 7_090_946 + 7_087_872,
    "05_all": 124_441_346,
    "11_lora": 2_666_528,
    "17_no_causal_mask": 7_090_946,
}
ALL_LAYERS = {"01_last_block", *TRAINED}
"""Rows that start from all 12 layers; the others have two, which takes a sixth of the time and fits AdamW for xl."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Random weights of a size of GPT-2 with so many layers, in a file as the hub has it."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def of(name: str, n_layer: int) -> Path:
        n_head, n_embd = HEADS[name]
        torch.manual_seed(0)
        config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        path = folder / f"{name}_{n_layer}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in to_hf(GPT(config).state_dict(), config).items()}, path)
        return path

    return of


@pytest.fixture(scope="module")
def few_messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 400 of the real messages, 50 to 60 of them spam."""
    folder = os.environ.get("LLM_LIGHTNING_DATA")
    if not folder:
        pytest.skip("needs real data: set LLM_LIGHTNING_DATA to the folder that holds it")
    path = tmp_path_factory.mktemp("messages") / "few.tsv"
    records = read_labelled(Path(folder) / "SMSSpamCollection.tsv", columns=("label", "text"))[:400]
    path.write_text("".join(f"{record.label}\t{record.text}\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.soak if at % 5 else pytest.mark.slow) for at, row in enumerate(SWEEP["jobs"])],
)
def test_rows_of_the_table_run(
    row: str, weights: Callable[[str, int], Path], few_messages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the words of its job, with random weights of its size in place of the download."""
    [job] = list_jobs({**SWEEP, "only": row, "max_jobs": 1}, [], config_dirs(None, ROOT / "conf"))
    settings = {"init_from": "gpt2-small", **SWEEP["jobs"][row]}
    arguments = [
        *job.words,
        f"data.path={few_messages}",
        f"hydra.run.dir={tmp_path / 'run'}",
        "trainer.max_steps=3",
        "trainer.val_check_interval=null",  # these messages make shorter epochs than the rows' own intervals
        "trainer.check_val_every_n_epoch=1",
        "trainer.limit_val_batches=2",
        "+trainer.limit_test_batches=2",
        "data.eval_batches=1",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
    ]
    if settings["init_from"] is not None:
        arguments.append(f"init_from={weights(settings['init_from'], 12 if row in ALL_LAYERS else 2)}")
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(few_messages.parent / "cache"))  # rows share what is frozen
    outcome = train_here(arguments)
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert 0 <= summary["metrics"]["test/accuracy"] <= 1
    if row in TRAINED:
        assert summary["parameters"]["trainable"] == TRAINED[row]
    curves = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [step for step, _ in curves["train/loss"]] == [0, 1, 2]
    shutil.rmtree(tmp_path / "run" / "checkpoints")


# --- chapter 7: instruction tuning ------------------------------------------------------------------------------------

CHAPTER_7 = sorted(path.stem for path in (ROOT / "conf" / "experiment" / "book").glob("ch07*.yaml"))


@pytest.mark.slow
def test_chapter_7_and_its_exercises_train_as_many_parameters_as_the_book() -> None:
    assert CHAPTER_7 == ["ch07", "ch07_alpaca52k", "ch07_lora", "ch07_masked", "ch07_phi3"]
    settings = check_overrides(["experiment=book/ch07_lora"], ROOT / "conf")
    assert settings.model.tied_head is False
    assert settings.init_from == "gpt2-medium"
    medium = GPTConfig(**RELEASES["gpt2-medium"].config)
    with torch.device("meta"):
        model = GPT(replace(medium, tied_head=settings.model.tied_head))
        assert model.num_parameters() == 406_286_336
        apply_lora(model, instantiate(settings.lora))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_898_384
    assert instantiate(settings.lora).scale == 16


def three_steps(folder: Path, *arguments: str) -> dict[str, Any]:
    """The summary of three steps with random weights of two layers of GPT-2 medium's width."""
    config = GPTConfig(n_layer=2, n_head=16, n_embd=1024)
    torch.manual_seed(0)
    given = folder / "given.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in to_hf(GPT(config).state_dict(), config).items()}, given)
    outcome = train_here(
        [
            *arguments,
            f"init_from={given}",
            f"hydra.run.dir={folder / 'run'}",
            "trainer.max_steps=3",
            "trainer.val_check_interval=3",
            "trainer.limit_val_batches=1",
            "+trainer.limit_test_batches=1",
            "data.eval_batches=1",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            "callbacks.samples.max_new_tokens=2",
        ]
    )
    assert outcome.code == 0, outcome.err
    shutil.rmtree(folder / "run" / "checkpoints")
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTER_7)
def test_chapter_7_runs(name: str, data_dir: Path, tmp_path: Path) -> None:
    """On the book's records, cut as the book cuts them."""
    path = data_dir / "instruction-data.json"
    few = ["callbacks.responses.max_new_tokens=2", "callbacks.responses.max_records=4"]
    summary = three_steps(tmp_path, f"experiment=book/{name}", f"data.path={path}", *few)
    assert {split: part["records"] for split, part in summary["data"]["splits"].items()} == {
        "train": 935,
        "val": 55,
        "test": 110,
    }
    assert summary["data"]["leaks"] == {"val": {"prompts": 4, "of": 55}, "test": {"prompts": 2, "of": 110}}
    assert len(json.loads((tmp_path / "run" / "responses.json").read_text())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [[], ["lora=default"]], ids=["full", "lora"])
def test_preference_tuning_runs(adapters: list[str], data_dir: Path, tmp_path: Path) -> None:
    """On the book's pairs; it starts at ln 2 and at margin 0, as the notebook's first line before any step."""
    path = data_dir / "instruction-data-with-preference.json"
    summary = three_steps(tmp_path, "experiment=book/dpo", f"data.path={path}", *adapters)
    assert sum(part["pairs"] for part in summary["data"]["splits"].values()) == 1100 - 6
    curves = read_metrics(tmp_path / "run" / "metrics.csv")
    assert curves["train/loss"][0][1] == pytest.approx(0.6931471824645996, abs=1e-6)
    assert curves["train/reward_margin"][0][1] == pytest.approx(0, abs=1e-6)
    assert curves["train/loss"][2][1] != curves["train/loss"][0][1]
