"""The same records in seven forms: one digest, and losses equal to the bit."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import SETTINGS, fit_here

from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints

Record = dict[str, str]
STEPS = 3


def lines(rows: list[Record] | list[dict[str, list[Record]]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_json(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(records, indent=1))


def as_jsonl(path: Path, records: list[Record]) -> None:
    path.write_text(lines(records), "utf-8")


def as_gzip(path: Path, records: list[Record]) -> None:
    path.write_bytes(gzip.compress(lines(records).encode()))


def as_csv(path: Path, records: list[Record]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(records)


def as_parquet(path: Path, records: list[Record]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


def as_sharegpt(path: Path, records: list[Record]) -> None:
    turns = (("human", "instruction"), ("gpt", "output"))
    rows = [{"conversations": [{"from": name, "value": row[key]} for name, key in turns]} for row in records]
    path.write_text(lines(rows), "utf-8")


def as_messages(path: Path, records: list[Record]) -> None:
    turns = (("user", "instruction"), ("assistant", "output"))
    rows = [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in records]
    path.write_text(lines(rows), "utf-8")


FORMS: dict[str, Callable[[Path, list[Record]], None]] = {
    "a.json": as_json,
    "b.jsonl": as_jsonl,
    "c.csv": as_csv,
    "d.parquet": as_parquet,
    "e.jsonl.gz": as_gzip,
    "sharegpt.jsonl": as_sharegpt,
    "messages.jsonl": as_messages,
}


def made() -> list[Record]:
    """50 records with what a table has to quote, over several lines, with equal questions and letters of two bytes."""
    return [
        {
            "instruction": f'Say "{number % 45}", twice;\nas in: a, b\n\n\t{"é" * (number % 7)}|',
            "output": f"{number}, {number}" + "\nso it is." * (number % 3),
        }
        for number in range(50)
    ]


def of_the_book(folder: Path) -> list[Record]:
    rows = json.loads((folder / "instruction-data.json").read_text("utf-8"))
    return [
        {"instruction": row["instruction"] + (f"\n{row['input']}" if row["input"] else ""), "output": row["output"]}
        for row in rows
    ]


def assert_one_digest(folder: Path, records: list[Record]) -> None:
    digests = {}
    for name, write in FORMS.items():
        write(folder / name, records)
        data = InstructionDataModule(
            tokenizer=build_tokenizer("byte"), context_length=1024, path=str(folder / name), name=None, batch_size=8,
            template="chatml",
        )  # fmt: skip
        data.read()
        assert data.report()["records"] == len(records)
        digests[name] = data.data_digest
        if name == "a.json":
            parts = [data.conversations_of(split) for split in ("train", "val", "test")]
            read = [(one.turns[0].instruction, one.turns[0].response) for part in parts for one in part]
            assert sorted(read) == sorted((row["instruction"], row["output"]) for row in records)
    assert len(set(digests.values())) == 1, digests


def assert_one_training(folder: Path, *settings: str) -> None:
    words = [word for word in SETTINGS if "samples" not in word and "max_steps" not in word]
    words += ["task=sft", "data.template=chatml", "callbacks.samples=null", "callbacks.responses=null", "logger=csv"]
    words += [f"trainer.max_steps={STEPS}", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", *settings]
    losses, digests, weights = {}, {}, {}
    for name in FORMS:
        run = folder / f"run {name}"
        outcome = fit_here([*words, f"data.path={folder / name}", f"hydra.run.dir={run}"])
        assert (outcome.code, outcome.err) == (0, "")
        metrics = read_metrics(run / "metrics.csv")
        losses[name] = {key: metrics[key] for key in ("train/loss", "val/loss", "train/eval_loss", "test/loss")}
        digests[name] = checkpoints.read_header(run / "checkpoints" / "last.ckpt")["lineage"]["data"]
        state = checkpoints.load(run / "checkpoints" / "last.ckpt")["state_dict"]
        weights[name] = {key: tensor.numpy().tobytes() for key, tensor in state.items()}
    first = next(iter(FORMS))
    assert len(losses[first]["train/loss"]) == STEPS
    for name in FORMS:
        assert (digests[name], losses[name], weights[name]) == (digests[first], losses[first], weights[first]), name


def test_made_records_in_seven_forms(tmp_path: Path) -> None:
    assert_one_digest(tmp_path, made())


@pytest.mark.slow
def test_made_records_give_one_loss(tmp_path: Path) -> None:
    assert_one_digest(tmp_path, made())
    assert_one_training(tmp_path, "model.context_length=256")


def test_one_letter_more_is_another_digest(tmp_path: Path) -> None:
    records = made()
    changed = [*records[:-1], {**records[-1], "output": records[-1]["output"] + "!"}]
    as_csv(tmp_path / "c.csv", changed)
    as_messages(tmp_path / "messages.jsonl", records)
    digests = []
    for name in ("c.csv", "messages.jsonl"):
        data = InstructionDataModule(
            tokenizer=build_tokenizer("byte"), context_length=256, path=str(tmp_path / name), name=None, batch_size=8
        )
        data.read()
        digests.append(data.data_digest)
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_the_books_records_in_seven_forms(tmp_path: Path, data_dir: Path) -> None:
    records = of_the_book(data_dir)
    assert len(records) == 1100
    assert_one_digest(tmp_path, records)


@pytest.mark.slow
def test_the_books_records_give_one_loss(tmp_path: Path, data_dir: Path) -> None:
    for name, write in FORMS.items():
        write(tmp_path / name, of_the_book(data_dir))
    assert_one_training(tmp_path, "model.context_length=1024")
