"""Instruction data from several sources by weight, with validation and test records of their own."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.tokenizers.build import build_tokenizer

WEIGHTS = {"web": 0.7, "books": 0.2, "code": 0.1}
SIZES = {"web": 300, "books": 150, "code": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        draw = random.Random(name)
        rows = [{"instruction": f"{name} {at}", "output": "o" * draw.randint(1, 60)} for at in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def built(folder: Path, **options: Any) -> InstructionDataModule:
    entries = [{"name": name, "path": f"{folder}/{name}.jsonl", "weight": one} for name, one in WEIGHTS.items()]
    data = InstructionDataModule(
        tokenizer=build_tokenizer("byte"), context_length=128, batch_size=4, template="{instruction}:{response}",
        mixture=entries, **options,
    )  # fmt: skip
    data.build()
    return data


def epochs_of(data: InstructionDataModule, n: int) -> list[list[str]]:
    """What the training batches of each epoch hold: the source of every record, and its number."""
    loader, epochs = data.train_dataloader(), []
    for epoch in range(n):
        data.set_epoch(epoch)
        ids = [index for batch in loader for index in batch.sample_ids]
        texts = [data.tokenizer.decode(data.train_samples[index].token_ids.tolist()) for index in ids]
        epochs.append([text.partition(":")[0] for text in texts])
    return epochs


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bucket": True, "packing": True}, {"bucket": False}, {"shuffle": False}], ids=str)
def test_the_records_of_an_epoch_have_their_shares(folder: Path, options: dict[str, Any]) -> None:
    data = built(folder, **options)
    so_far: Counter[str] = Counter()
    for seen in epochs_of(data, 3):
        assert len(seen) == len(data.train_samples)
        so_far += Counter(seen)
        sources = Counter(record.partition(" ")[0] for record in seen)
        facts = data.report()["mixture"]
        for name, weight in WEIGHTS.items():
            assert abs(sources[name] / len(seen) - weight) < 0.01
            assert facts[name]["per_epoch"] == sources[name]
    for name in WEIGHTS:  # no record comes again before all of its source came
        times = [
            so_far[one.turns[0].instruction] for one in data.records["train"] if f"{name} " in one.turns[0].instruction
        ]
        assert max(times) - min(times) <= 1
        assert len(times) == data.report()["mixture"][name]["samples"]


def test_validation_and_test_are_cut_off_and_do_not_repeat(folder: Path) -> None:
    data = built(folder, val_fraction=0.1, test_fraction=0.2)
    parts = {split: {one.turns[0].instruction for one in part} for split, part in data.records.items()}
    assert list(parts) == ["train", "val", "test"]
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == sum(SIZES.values())
    assert data.report()["leaks"] == {"val": {"prompts": 0, "of": len(parts["val"])},
                                      "test": {"prompts": 0, "of": len(parts["test"])}}  # fmt: skip
    assert [len(data.records[split]) for split in parts] == [len(parts[split]) for split in parts]


def test_sets_of_its_own_are_in_order_and_leaks_from_any_source_are_counted(folder: Path) -> None:
    sets = {"z": f"{folder}/code.jsonl", "a": f"{folder}/books.jsonl"}
    data = built(folder, val_path=f"{folder}/code.jsonl", val_sets=sets, test_fraction=0.3)
    assert list(data.records) == ["train", "val", "val/z", "val/a", "test"]
    assert list(data.eval_samples) == ["val", "val/z", "val/a", "train_eval"]
    train = {one.turns[0].instruction for one in data.records["train"]}
    leaks = {split: leak["prompts"] for split, leak in data.report()["leaks"].items()}
    expected = {name: len(train & {f"{name} {at}" for at in range(SIZES[name])}) for name in ("code", "books")}
    assert leaks == {"val": expected["code"], "val/z": expected["code"], "val/a": expected["books"], "test": 0}


def test_a_preview_shows_what_the_first_epoch_begins_with(folder: Path) -> None:
    data = built(folder)
    assert data.describe().startswith("a mixture of web, books, code: ")
    first = data.train_samples[int(data.mixture.chosen(0)[0])]  # type: ignore[union-attr]
    name, _, number = data.tokenizer.decode(first.token_ids.tolist()).partition(":")[0].partition(" ")
    shown = data.preview(20)
    assert shown.splitlines()[0].partition(": ")[0].endswith(f" of {name}")
    assert f"{name} {number}:" in shown.splitlines()[1]
    assert {f" of {one}:" in shown for one in ("web", "books")} == {True}
