"""The settings that say where data come from: the same mistake has the same message in every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.classification import ClassificationDataModule
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.preference import PreferenceDataModule
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.tokenizers.build import build_tokenizer

MODULES: dict[str, Any] = {
    "pretraining": PretrainingDataModule,
    "classification": ClassificationDataModule,
    "instruction": InstructionDataModule,
    "preference": PreferenceDataModule,
}
MIXED = ("pretraining", "instruction")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run on rows that are of use in every task."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"text {n}", "label": "ab"[n % 2], "instruction": f"question {n}", "output": f"answer {n}",
         "chosen": f"answer {n}", "rejected": f"no {n}"}
        for n in range(40)
    ]  # fmt: skip
    Path("train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("empty.jsonl").write_text("")
    return {"tokenizer": build_tokenizer("byte"), "context_length": 256, "batch_size": 2, "path": "train.jsonl"}


def built(task: str, base: dict[str, Any], **options: Any) -> BaseDataModule:
    if task == "pretraining":
        base = {**base, "context_length": 8}
    data: BaseDataModule = MODULES[task](**{**base, **options})
    data.build()
    return data


@pytest.mark.parametrize("task", MODULES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_path": "gone.jsonl"}, "data.val_path: gone.jsonl does not exist"),
        ({"test_path": ["gone.jsonl"]}, "data.test_path: gone.jsonl does not exist"),
        ({"val_sets": {"hard": "gone.jsonl"}}, "data.val_sets.hard: gone.jsonl does not exist"),
        ({"val_path": "empty.jsonl"}, "data.val_path: empty.jsonl"),
        (
            {"val_sets": {"a/b": "train.jsonl"}},
            "data.val_sets: 'a/b' is part of the names of metrics: use letters, digits, _ and -, and write a number "
            "in quotes",
        ),
        (
            {"val_path": "a", "hf_val_split": "b"},
            "data.val_path=a and data.hf_val_split=b are both set; set one of them to null",
        ),
        (
            {"hf_test_split": "b"},
            "data.hf_test_split=b is a split of data.hf_dataset, which is null; name it",
        ),
        (
            {"hf_dataset": "org/name"},
            "data.path=train.jsonl and data.hf_dataset=org/name are both set; set one of them to null",
        ),
    ],
)
def test_same_in_every_task(base: dict[str, Any], task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        built(task, base, **options)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("task", MIXED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.mixture and data.path=train.jsonl are both set; set one of them to null"),
        (
            {"path": None, "hf_dataset": "org/name"},
            "data.mixture and data.hf_dataset=org/name are both set; set one of them to null",
        ),
        ({"path": None}, "data.mixture (a): gone.jsonl does not exist"),
        (
            {"path": None, "hf_val_split": "b"},
            "data.hf_val_split=b is a split of data.hf_dataset, which is null; name it",
        ),
    ],
)
def test_same_in_every_mixture(base: dict[str, Any], task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        built(task, base, mixture=[{"name": "a", "path": "gone.jsonl", "weight": 1}], **options)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("task", MODULES)
def test_a_split_of_the_hub_that_is_not_there(base: dict[str, Any], task: str) -> None:
    Path("set").mkdir()
    Path("train.jsonl").rename("set/train.jsonl")
    with pytest.raises(ValueError, match=r"^data\.hf_val_split: cannot read the Hugging Face dataset set .*split nope"):
        built(task, base, path=None, name=None, hf_dataset="set", hf_val_split="nope")


@pytest.mark.parametrize("task", MODULES)
def test_a_set_whose_path_is_null_is_left_out(base: dict[str, Any], task: str) -> None:
    data = built(task, base, val_sets={"none": None, "some": "train.jsonl"})
    assert list(data.eval_samples) == ["val", "val/some", "train_eval"]
