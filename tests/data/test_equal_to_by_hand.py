"""Samples of the book's records and of the embedded sets, against arithmetic on the tokens of tiktoken's GPT-2."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data import instruction, preference
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.preference import PreferenceDataModule
from llm_lightning.tokenizers.build import build_tokenizer

GPT2 = build_tokenizer("gpt2")
END = 50256
LIMIT = 75
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
HEADER = "\n\n### Response:\n"
SETS = ("book", "embedded")

Row = tuple[int, list[int], list[bool]]


def records_of(name: str, embedded: Any, book: str, data_dir: Path) -> tuple[Path, list[dict[str, str]]]:
    path = data_dir / book if name == "book" else Path(embedded)
    records = json.loads(path.read_text(encoding="utf-8"))
    n_train = int(round(len(records) * 0.85, 6))
    return path, records[:n_train]


def asked(record: dict[str, str]) -> tuple[list[int], int]:
    """Token ids of the prompt, and how many of them are not of its header."""
    given = f"\n\n### Input:\n{record['input']}" if record.get("input") else ""
    question = f"{PREAMBLE}### Instruction:\n{record['instruction']}{given}"
    return GPT2.encode(question + HEADER), len(GPT2.encode(question))


def built(kind: Any, path: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"context_length": 1024, "template": "alpaca", "split": "order", "max_dropped": 1.0}
    made = kind(path=str(path), tokenizer=GPT2, batch_size=8, max_length=LIMIT, **settings, **options)
    made.build()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("too_long", ["drop", "cut_answer"])
def test_conversations(name: str, too_long: str, data_dir: Path) -> None:
    path, records = records_of(name, instruction.NAMED["short_answers"], "instruction-data.json", data_dir)
    for loss_on, ends in product(("response", "header", "all"), ("all", "first")):
        wanted: list[Row] = []
        for number, record in enumerate(records):
            prompt, n_question = asked(record)
            ids = [*prompt, *GPT2.encode(record["output"]), END]
            if len(ids) > LIMIT + 1 and too_long == "drop":
                continue
            first = {"response": len(prompt), "header": n_question, "all": 0}[loss_on]
            targets = [at >= first for at in range(len(ids))][: LIMIT + 1]
            if any(targets[1:]):
                wanted.append((number, ids[: LIMIT + 1], targets[1:]))
        data = built(InstructionDataModule, path, loss_on=loss_on, eos_targets=ends, too_long=too_long)
        rows = (data.train_samples[index] for index in range(len(data.train_samples)))
        found = [(one.sample_id, one.token_ids.tolist(), one.label_mask.tolist()) for one in rows]
        assert found == wanted, (loss_on, ends)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("too_long", ["drop", "cut_answer"])
def test_pairs(name: str, too_long: str, data_dir: Path) -> None:
    source = (preference.NAMED["short_preferences"], "instruction-data-with-preference.json")
    path, records = records_of(name, *source, data_dir)
    different = [one for one in records if one["chosen"].strip() != one["rejected"].strip()]
    for score_eos in (True, False):
        wanted = []
        for number, record in enumerate(different):
            prompt, _ = asked(record)
            answers = [GPT2.encode(record[key]) + [END] * score_eos for key in ("chosen", "rejected")]
            room = LIMIT + 1 - len(prompt)
            if max(map(len, answers)) > room and too_long == "drop":
                continue
            answers = [one[: max(room, 0)] for one in answers]
            if answers[0] and answers[1] and answers[0] != answers[1]:
                wanted.append((number, prompt, *answers))
        data = built(PreferenceDataModule, path, score_eos=score_eos, too_long=too_long)
        rows = (data.train_samples[index] for index in range(len(data.train_samples)))
        found = [
            (one.sample_id, *(ids.tolist() for ids in (one.prompt_ids, one.chosen_ids, one.rejected_ids)))
            for one in rows
        ]
        assert found == wanted, score_eos
