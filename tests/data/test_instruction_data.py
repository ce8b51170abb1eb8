"""Instruction records, their splits, what is learnt of them, and what becomes of those that are too long."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.records.instruction import read_instructions
from llm_lightning.data.splits import order_split
from llm_lightning.data.templates.conversation import Turn
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.tokenizers.byte import ByteTokenizer

BYTES = build_tokenizer("byte")
SHORT = "[{input}]Q{instruction}A{response}|"
"""Each letter is a token: a record without input has one for Q, the instruction, A, the answer and the end."""

Record = dict[str, Any]


def write(path: Path, records: Sequence[Any]) -> Path:
    """One record a line, in an array or, by its name, as JSONL."""
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]")
    return path


def module(path: Path, **options: Any) -> InstructionDataModule:
    settings = {"context_length": 64, "template": SHORT, "batch_size": 4, "eval_batches": 2, "max_dropped": 1.0}
    settings |= {"tokenizer": BYTES, "split": "order", "val_fraction": 0.1, "test_fraction": 0.1, **options}
    made = InstructionDataModule(path=str(path), **settings)
    made.build()
    return made


def plain(instruction: str, output: str = "yes", given: str = "", **more: str) -> Record:
    return {"instruction": instruction, "input": given, "output": output, **more}


def talk(*contents: str, system: str | None = None) -> Record:
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    return {"messages": [{"role": "system", "content": system}, *messages] if system is not None else messages}


def first_of(tmp_path: Path, record: Record, **options: Any) -> tuple[str, str]:
    """(all tokens, learnt tokens) of a record, the end of text written as $, what is not learnt as dots."""
    data = module(write(tmp_path / "x.json", [record, *[plain(f"other {i}") for i in range(9)]]), **options)
    return shown(data, 0)


def shown(data: InstructionDataModule, index: int) -> tuple[str, str]:
    sample = data.train_samples[index]
    labels = data.collate([sample]).labels[0].tolist()[: len(sample.token_ids) - 1]
    letter = {IGNORE_INDEX: ".", 256: "$"}
    return (
        "".join(letter.get(token, chr(token)) for token in sample.token_ids.tolist()),
        "".join(letter.get(label) or chr(label) for label in [IGNORE_INDEX, *labels]),
    )


def outputs_of(data: InstructionDataModule) -> dict[str, set[str]]:
    return {
        split: {one.turns[-1].response for one in data.conversations_of(split)} for split in ("train", "val", "test")
    }


# --- splits -----------------------------------------------------------------------------------------------------------


def test_split_by_order_is_train_test_validation(tmp_path: Path) -> None:
    data = module(write(tmp_path / "x.json", [plain(f"q{i}", f"a{i}") for i in range(20)]), test_fraction=0.2)
    order = [[one.turns[0].response for one in data.conversations_of(split)] for split in ("train", "test", "val")]
    assert order == [[f"a{i}" for i in part] for part in (range(14), range(14, 18), range(18, 20))]
    parts = order_split(1100, (0.05, 0.1))
    assert {split: (part[0], part[-1] + 1) for split, part in parts.items()} == {
        "train": (0, 935),
        "test": (935, 1045),
        "val": (1045, 1100),
    }


def chained(n_chains: int, length: int) -> list[Record]:
    """Chains of records, each tied to the next by its prompt or its group in turn; a record's output is its chain."""
    records = []
    for chain in range(n_chains):
        for link in range(length):
            prompt, group = f"chain {chain} prompt {(link + 1) // 2}", f"chain {chain} group {link // 2}"
            wording = prompt.upper() + "?!" if link % 2 else prompt
            records.append(plain(wording, f"{chain}", group=group))
    order = np.random.default_rng(0).permutation(len(records))
    return [records[index] for index in order]


@pytest.mark.parametrize("seed", range(3))
def test_no_chain_of_prompts_and_groups_stands_on_two_sides(tmp_path: Path, seed: int) -> None:
    data = module(write(tmp_path / "x.jsonl", chained(20, 5)), split="grouped", split_seed=seed)
    sides = outputs_of(data)
    assert sum(len(side) for side in sides.values()) == 20 == len(set.union(*sides.values()))
    assert {split: len(side) for split, side in sides.items()} == {"train": 16, "val": 2, "test": 2}
    assert data.report()["leaks"] == {"val": {"prompts": 0, "of": 10}, "test": {"prompts": 0, "of": 10}}


def test_equal_prompts_stay_together_without_a_group_and_other_numbers_are_other_prompts(tmp_path: Path) -> None:
    records = [plain(wording, f"{i}") for i in range(30) for wording in (f"Add {i}", f"add  {i}!")]
    path = write(tmp_path / "x.json", records)
    sides = outputs_of(module(path, split="grouped"))
    assert {split: len(side) for split, side in sides.items()} == {"train": 24, "val": 3, "test": 3}
    assert len(set.union(*sides.values())) == 30
    # What the input says is part of the prompt.
    other = [plain("Add", f"{i}", f"{i}") for i in range(30)]
    assert module(write(tmp_path / "y.json", other), split="grouped").report()["leaks"]["test"]["prompts"] == 0


def test_leaks_of_a_split_by_order_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prompts = [*(f"q{i}" for i in range(14)), "Q3.", "new", "q0", "q99", "q1", "q2"]
    records = [plain(prompt) for prompt in prompts]
    report = module(write(tmp_path / "x.json", records), test_fraction=0.2, val_fraction=0.1).report()
    assert report["leaks"] == {"test": {"prompts": 2, "of": 4}, "val": {"prompts": 2, "of": 2}}
    assert "Test prompts also in training: 2 of 4" in caplog.text


def test_the_split_hangs_on_split_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [plain(f"prompt {i}", f"{i}") for i in range(40)])
    one, same, other = (
        module(path, split="grouped", **options) for options in ({"seed": 1}, {"seed": 2}, {"split_seed": 7})
    )
    assert outputs_of(one) == outputs_of(same) != outputs_of(other)
    assert one.data_digest == same.data_digest != other.data_digest


def test_the_digest_names_records_and_template(tmp_path: Path) -> None:
    records = [plain(f"q{i}") for i in range(10)]
    first = module(write(tmp_path / "x.json", records)).data_digest
    assert module(write(tmp_path / "y.json", records)).data_digest == first
    assert module(tmp_path / "x.json", template="Q{instruction}[{input}]A{response}|").data_digest != first
    assert module(write(tmp_path / "z.json", [*records[:9], plain("q9", "no")])).data_digest != first


# --- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_on", "learnt"),
    [("response", ".....cde$"), ("header", "....Acde$"), ("all", ".QabAcde$")],
)
def test_loss_on(tmp_path: Path, loss_on: str, learnt: str) -> None:
    """The first token of a sequence is never learnt."""
    assert first_of(tmp_path, plain("ab", "cde", "i"), loss_on=loss_on) == ("iQabAcde$", learnt)


@pytest.mark.parametrize(
    ("options", "learnt"),
    [
        ({}, "...b$....dd$....f$"),
        ({"loss_on": "header"}, "..Ab$...Add$...Af$"),
        ({"loss_on": "all"}, ".aAb$|QcAdd$|QeAf$"),
        ({"eos_targets": "first"}, "...b$....dd.....f."),
        ({"eos_targets": "first", "loss_on": "all"}, ".aAb$|QcAdd.|QeAf."),
    ],
)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_every_answer_of_a_conversation_is_learnt(tmp_path: Path, options: Any, learnt: str, packing: bool) -> None:
    """`|` follows an answer, and stands between two turns alone."""
    whole, found = first_of(tmp_path, talk("a", "b", "c", "dd", "e", "f"), packing=packing, **options)
    assert whole == "QaAb$|QcAdd$|QeAf$"
    assert found == learnt


def test_an_empty_answer_that_is_kept_teaches_its_end(tmp_path: Path) -> None:
    assert first_of(tmp_path, plain("ab", ""), empty_output="keep") == ("QabA$", "....$")


# --- too long ---------------------------------------------------------------------------------------------------------

LIMIT = 8
LENGTHS = [plain("abc", "xyz"), plain("abcdef", "xyz"), plain("a", "1234567"), plain("a", "12345678")]
"""With 8 tokens of input and one more as the last label: fits, 3 too many, 2 too many, an answer that leaves no room
for any prompt; and 26 short ones."""


def limited(tmp_path: Path, **options: Any) -> InstructionDataModule:
    path = write(tmp_path / "x.json", [*LENGTHS, *[plain(f"{i}", "y") for i in range(26)]])
    return module(path, max_length=LIMIT, **options)


@pytest.mark.parametrize(
    ("too_long", "counts", "rows"),
    [
        ("cut_prompt", (1, 0, 2), {0: ".....xyz$", 1: ".....xyz$"}),
        ("drop", (0, 0, 3), {0: ".....xyz$"}),
        ("cut_answer", (0, 3, 0), {0: ".....xyz$", 1: "........x", 2: "...123456", 3: "...123456"}),
    ],
)
def test_what_becomes_of_records_that_are_too_long(
    tmp_path: Path, too_long: str, counts: tuple[int, int, int], rows: dict[int, str]
) -> None:
    data = limited(tmp_path, too_long=too_long)
    report = data.report()
    assert (report["prompts_cut"], report["answers_cut"], report["dropped"]) == counts
    assert (report["limit"], report["too_long"], report["records"]) == (LIMIT, too_long, 30)
    assert report["splits"]["train"]["records"] == 24 - counts[2] == len(data.train_samples)  # type: ignore[arg-type]
    assert len(data.conversations_of("train")) == 24, "also what is not trained on can be answered"
    # A sample is named by its record.
    found = {sample.sample_id: shown(data, index) for index, sample in enumerate(data.train_samples)}
    assert {index: learnt for index, (_, learnt) in found.items() if index < 4} == rows
    assert all(len(whole) <= LIMIT + 1 for whole, _ in found.values())


def test_what_the_template_writes_is_never_cut(tmp_path: Path) -> None:
    """One word, so that it is cut before a letter; of the third record no letter of the question would be left."""
    data = limited(tmp_path)
    assert [shown(data, index)[0] for index in range(3)] == ["QabcAxyz$", "QdefAxyz$", "Q0Ay$"]


@pytest.mark.parametrize(
    ("max_length", "tokens", "learnt", "counts"),
    [
        (11, "QaAb$|QcAde$", "...b$....de$", (0, 0)),
        (10, "QcAde$", "...de$", (0, 1)),
    ],
)
def test_of_a_conversation_the_earlier_turns_are_cut_first(
    tmp_path: Path, max_length: int, tokens: str, learnt: str, counts: tuple[int, int]
) -> None:
    """Where an answer goes with them, that is counted."""
    records = [talk("a", "b", "c", "de"), *[plain(f"{i}", "y") for i in range(9)]]
    data = module(write(tmp_path / "x.json", records), max_length=max_length)
    assert shown(data, 0) == (tokens, learnt)
    assert (data.report()["prompts_cut"], data.report()["answers_cut"]) == counts


@pytest.mark.parametrize(
    ("too_long", "n_long", "message"),
    [
        (
            "cut_prompt",
            2,
            r"2 of 30 records do not fit into 8 tokens \(2 dropped, 0 answers cut\), more than data.max_dropped",
        ),
        ("drop", 3, r"3 of 30 records do not fit into 8 tokens \(3 dropped, 0 answers cut\)"),
        (
            "cut_answer",
            3,
            r"3 of 30 .* \(0 dropped, 3 answers cut\), more than data.max_dropped=0.09 allows: half of them need 5 "
            r"tokens, 95% 11, the longest 11; set model.context_length",
        ),
    ],
)
def test_more_losses_than_allowed_are_refused(tmp_path: Path, too_long: str, n_long: int, message: str) -> None:
    limited(tmp_path, too_long=too_long, max_dropped=n_long / 30)
    with pytest.raises(ValueError, match=message):
        limited(tmp_path, too_long=too_long, max_dropped=round((n_long - 0.3) / 30, 4))


def test_more_cut_prompts_than_allowed_are_refused_with_the_context_that_would_hold_them(tmp_path: Path) -> None:
    """Of 30 records 28 have Q, two letters or one, A, y and an end; two questions of 6 letters need 12 tokens."""
    records = [plain("abcdef", "xyz")] * 2 + [plain(f"{i}", "y") for i in range(28)]
    path = write(tmp_path / "x.json", records)
    assert module(path, max_length=LIMIT, max_cut=2 / 30).report()["prompts_cut"] == 2
    message = (
        r"2 of 30 records do not fit into 8 tokens without a cut in their prompt, more than data.max_cut=0.05 allows: "
        r"half of them need 5 tokens, 95% 11, the longest 11; set model.context_length .* to 11, or raise data.max_cut"
    )
    with pytest.raises(ValueError, match=message):
        module(path, max_length=LIMIT)
    assert module(path, max_length=11).report()["prompts_cut"] == 0


def test_the_losses_of_a_set_of_its_own_count_by_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [plain(f"{i}", "y") for i in range(60)])
    hard = write(tmp_path / "hard.json", [plain("a", "y"), plain("a", "12345678")])
    module(path, max_length=LIMIT, val_sets={"hard": str(hard)})
    with pytest.raises(ValueError, match=r"data.val_sets.hard: 1 of 2 records do not fit into 8 tokens \(1 dropped"):
        module(path, max_length=LIMIT, val_sets={"hard": str(hard)}, max_dropped=0.05)


def test_a_preview_ends_with_what_was_cut_most(tmp_path: Path) -> None:
    records = [plain(f"{i}", "y") for i in range(40)]
    records[3], records[7], records[9] = (plain("abc" * n, "xyz") for n in (2, 4, 3))
    text = module(write(tmp_path / "x.json", records), max_length=LIMIT, max_cut=0.1).preview(1)
    assert [line for line in text.splitlines() if line.startswith("---")] == [
        "--- record 0: 5 tokens, loss on 2",
        "--- record 7, cut from 18 tokens: 9 tokens, loss on 4",
        "--- record 9, cut from 15 tokens: 9 tokens, loss on 4",
    ]


def test_a_record_is_lost_once(tmp_path: Path) -> None:
    """Its prompt alone fills the limit, so that no answer is left: dropped, and nothing else."""
    records = [plain("a prompt of many letters"), *[plain(f"{i}", "y") for i in range(29)]]
    path = write(tmp_path / "x.json", records)
    report = module(path, max_length=LIMIT, too_long="cut_answer").report()
    assert (report["prompts_cut"], report["answers_cut"], report["dropped"]) == (0, 0, 1)


def test_a_split_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    records = [*[plain(f"{i}", "y") for i in range(9)], plain("a", "12345678")]
    with pytest.raises(ValueError, match="no val record fits into 8 tokens; raise"):
        module(write(tmp_path / "x.json", records), max_length=LIMIT)


def test_max_length_never_exceeds_the_context(tmp_path: Path) -> None:
    data = module(
        write(tmp_path / "x.json", LENGTHS[:2] * 10), max_length=100, max_cut=1, packing=False, context_length=LIMIT
    )
    assert data.report()["limit"] == LIMIT
    assert max(batch.input_ids.size(1) for batch in data.train_dataloader()) <= LIMIT


# --- batches ----------------------------------------------------------------------------------------------------------


def ragged(n: int = 100) -> list[Record]:
    draw = np.random.default_rng(1)
    return [plain("q" * int(draw.integers(1, 12)), "a" * int(draw.integers(1, 30))) for _ in range(n)]


def unshared(path: Path, **options: Any) -> InstructionDataModule:
    """As for a model with dropout, which computes no preamble only once."""
    return module(path, share_prefix=False, **options)


def test_packing_is_chosen_by_what_it_saves(tmp_path: Path) -> None:
    even = write(tmp_path / "even.json", [plain("q", "a")] * 40)
    assert not unshared(even).is_packed
    assert module(even).is_packed, "all that stands before the answers is the same"
    path = write(tmp_path / "ragged.json", ragged())
    mixed = unshared(path, bucket=False)
    assert mixed.is_packed
    assert mixed.report()["packed"] is True
    assert mixed.report()["saved_by_packing"] > 0.2
    assert not module(path, packing=False, bucket=False).is_packed
    assert unshared(even, packing=True).is_packed
    # In every batch 3 of 4 records have 24 tokens of input, and one has 25: 3% of padding.
    nearly = write(tmp_path / "nearly.json", [plain("q", "a" * (21 if i % 4 else 22)) for i in range(40)])
    data = unshared(nearly, shuffle=False, bucket=False)
    assert data.report()["saved_by_packing"] == pytest.approx(0.03)
    assert not data.is_packed


def test_padding_by_hand_and_less_of_it_in_buckets(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", ragged(200))
    sorted_, mixed = unshared(path, packing=False), unshared(path, packing=False, bucket=False)
    for data in (sorted_, mixed):
        real = places = 0
        data.set_epoch(0)
        for batch in data.train_dataloader():
            lengths = [len(data.train_samples[index].token_ids) - 1 for index in batch.sample_ids]  # type: ignore[index]
            real, places = real + sum(lengths), places + len(lengths) * max(lengths)
            assert batch.input_ids.size(1) in range(max(lengths), max(lengths) + 8)
        assert data.report()["saved_by_packing"] == pytest.approx(1 - real / places, abs=1e-4)
    assert sorted_.report()["saved_by_packing"] < 0.5 * mixed.report()["saved_by_packing"]


@pytest.mark.parametrize("bucket", [True, False])
def test_every_epoch_shows_every_record_once(tmp_path: Path, bucket: bool) -> None:
    data = module(write(tmp_path / "x.json", ragged(150)), bucket=bucket)
    seen = []
    for epoch in range(2):
        loader = data.train_dataloader()
        data.set_epoch(epoch)
        seen.append([index for batch in loader for index in batch.sample_ids])
        assert sorted(seen[-1]) == list(range(120))
    assert seen[0] != seen[1]
    evaluated = [index for batch in data.val_dataloader()[0] for index in batch.sample_ids]
    lengths = [len(data.eval_samples["val"][index].token_ids) for index in evaluated]
    assert sorted(evaluated) == list(range(15))
    assert (lengths == sorted(lengths)) == bucket


def test_without_shuffling_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    data = module(write(tmp_path / "x.json", ragged(40)), shuffle=False)
    assert [index for batch in data.train_dataloader() for index in batch.sample_ids] == list(range(32))


def test_both_layouts_hold_the_same_tokens_and_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", ragged(40))
    padded, packed = (next(iter(module(path, packing=packing).train_dataloader())) for packing in (False, True))
    assert padded.sample_ids == packed.sample_ids
    assert padded.n_targets == packed.n_targets == (padded.labels != IGNORE_INDEX).sum()
    assert torch.equal(padded.labels[padded.labels != IGNORE_INDEX], packed.labels[packed.labels != IGNORE_INDEX])
    assert (packed.input_ids.size(0), padded.packing) == (1, None)


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_report_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    records = [plain("ab", "c"), plain("a", "bcd", "xyz"), *[plain("ab", "c")] * 18, plain("q", ""), plain("q", " ")]
    data = module(write(tmp_path / "x.json", records), empty_output="skip", loss_on="response")
    report = data.report()
    assert (report["records"], report["skipped"], report["split"], report["limit"]) == (20, 2, "order", 64)
    assert report["splits"]["train"] == {
        "records": 16,
        "mean_tokens": (15 * 6 + 10) / 16,
        "most_tokens": 10,
        "targets": 15 * 2 + 4,
    }
    assert report["splits"]["val"] == {"records": 2, "mean_tokens": 6, "most_tokens": 6, "targets": 4}
    assert "train: 16 records; 6.2 tokens each, at most 10; loss on 34 tokens" in caplog.text
    assert "20 records: 2 without answer left out, 0 prompts and 0 answers cut to 64 tokens, 0 dropped" in caplog.text
    assert data.describe() == f"{tmp_path / 'x.json'}: 16 train, 2 val, 2 test records; template data.template, packed"
    assert json.loads(json.dumps(report)) == report, "plain values, for summary.json"


def test_sample_prompts_are_those_of_the_first_validation_records(tmp_path: Path) -> None:
    records = [*[plain(f"{i}") for i in range(17)], plain("a" * 40, "b"), plain("bc", "d"), talk("e", "f", "g", "h")]
    data = module(write(tmp_path / "x.json", records), context_length=20, val_fraction=0.15)
    found = data.sample_prompts(5)
    assert found == [[*b"QbcA"], [*b"QeAf", 256, *b"|QgA"]], "no answer, and no prompt without room for one"
    assert data.sample_prompts(1) == found[:1]


def test_the_preview_marks_what_is_learnt(tmp_path: Path) -> None:
    records = [plain("ab", "cde"), talk("a", "b", "c", "d"), *[plain(f"{i}") for i in range(18)]]
    data = module(write(tmp_path / "x.json", records))
    assert data.preview(2) == (
        "--- record 0: 8 tokens, loss on 4\nQabA>>cde<|endoftext|><<" + "\u00b7" * 9
        + "\n--- record 1: 11 tokens, loss on 4\nQaA>>b<|endoftext|><<|QcA>>d<|endoftext|><<" + "\u00b7" * 6
    )  # fmt: skip


def test_a_tokenizer_is_trained_on_training_texts_alone(tmp_path: Path) -> None:
    seen: list[str] = []

    def make(texts: Any) -> Any:
        seen.extend(texts)
        return BYTES

    data = module(write(tmp_path / "x.json", [plain(f"{i}", f"a{i}") for i in range(20)]), tokenizer=make)
    assert seen == [f"Q{i}Aa{i}" for i in range(16)]
    assert data.tokenizer is BYTES


# --- what is refused --------------------------------------------------------------------------------------------------


class Endless(ByteTokenizer):
    """Bytes without an end of text."""

    vocab_size = 256
    eot_id = None  # type: ignore[assignment]


def test_a_tokenizer_needs_an_end_of_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no end-of-text token, with which an answer ends; use another one"):
        module(write(tmp_path / "x.json", [plain(f"{i}") for i in range(20)]), tokenizer=Endless())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (plain("a", "b", "c"), r"x.json:4 has an input, but template data.template has no \{input\} slot"),
        (
            talk("a", "b", system="S") | {"group": "g"},
            r"x.json:4 has a system message, but template data.template has no \{system\} slot",
        ),
    ],
)
def test_nothing_of_a_record_is_left_out_in_silence(tmp_path: Path, record: Record, message: str) -> None:
    path = write(tmp_path / "x.json", [plain("a"), plain("b"), record, *[plain("c")] * 7])
    with pytest.raises(ValueError, match=message):
        module(path, template="Q{instruction}A{response}")
    module(path, template="[{system}][{input}]Q{instruction}A{response}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "random"}, r"data.split='random' must be one of grouped, order"),
        ({"loss_on": "answer"}, r"data.loss_on='answer' must be one of response, header, all"),
        ({"eos_targets": "none"}, r"data.eos_targets='none' must be one of all, first"),
        ({"too_long": "cut"}, r"data.too_long='cut' must be one of cut_prompt, drop, cut_answer"),
        ({"packing": "yes"}, r"data.packing='yes' must be one of auto, true, false"),
        ({"val_fraction": 0.0}, r"data.val_fraction=0.0 and data.test_fraction=0.1 must be positive and sum to less"),
        ({"test_fraction": -0.1}, r"data.test_fraction=-0.1 must be positive"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"sum to less than 1"),
        ({"max_dropped": 1.5}, r"data.max_dropped=1.5 must be between 0 and 1"),
        ({"max_dropped": -0.1}, r"data.max_dropped=-0.1 must be between 0 and 1"),
        ({"max_length": 1}, r"data.max_length=1 must be at least 2"),
        ({"batch_size": 0}, r"data.batch_size=0 must be at least 1"),
        ({"name": "book_instruction"}, r"data.name=book_instruction is unknown: did you mean book_instructions\?"),
        ({"empty_output": "drop"}, r"data.empty_output='drop' must be one of refuse, skip, keep"),
        ({"template": "alpacca"}, r"data.template='alpacca' is unknown: did you mean alpaca\?"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "x.json", [plain(f"{i}") for i in range(20)]), **options)


def test_too_few_records_and_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 records leave none for test; give more, or raise data.test_fraction"):
        module(write(tmp_path / "x.json", [plain(f"{i}") for i in range(3)]))
    data = InstructionDataModule(tokenizer=BYTES, context_length=64, name=None, batch_size=4)
    with pytest.raises(ValueError, match=r"data.name and data.path are both null; give data.path=FILE"):
        data.build()


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_records_and_messages_are_read(tmp_path: Path, name: str) -> None:
    records = [plain("a", "b", "c", group="g", system="S"), talk("q", "r", "s", "t", system="T"), talk("u", "v")]
    records += [talk("u", "v", system="")]
    found, skipped = read_instructions(write(tmp_path / name, records))
    assert skipped == 0
    assert [one.turns for one in found] == [
        (Turn("a", "c", "b"),),
        (Turn("q", "", "r"), Turn("s", "", "t")),
        (Turn("u", "", "v"),),
        (Turn("u", "", "v"),),
    ]
    assert [(one.system, one.group) for one in found] == [("S", "g"), ("T", ""), (None, ""), ("", "")]
    start = 2 if name == "x.json" else 1
    assert [one.place for one in found] == [f"{tmp_path / name}:{line}" for line in range(start, start + 4)]
    assert [one.record for one in found] == records


def test_columns_of_other_names(tmp_path: Path) -> None:
    record = {"question": "a", "answer": "b", "input": "not meant", "topic": "g", "rules": "S"}
    columns = {"instruction": "question", "output": "answer", "input": None, "group": "topic", "system": "rules"}
    [found], _ = read_instructions(write(tmp_path / "x.json", [record]), columns=columns)
    assert (found.turns, found.group, found.system) == ((Turn("a", "", "b"),), "g", "S")
    record = {"talk": talk("a", "b")["messages"], "messages": "not meant"}
    [found], _ = read_instructions(write(tmp_path / "y.json", [record]), columns={"messages": "talk"})
    assert found.turns == (Turn("a", "", "b"),)
    with pytest.raises(ValueError, match=r"data.columns: unknown field 'chosen'; there are instruction, input, output"):
        read_instructions(tmp_path / "x.json", columns={"chosen": "question"})


def test_a_missing_input_is_none(tmp_path: Path) -> None:
    records = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": None, "group": None}]
    found, _ = read_instructions(write(tmp_path / "x.json", records))
    assert [(one.turns, one.group) for one in found] == [((Turn("a", "", "b"),), "")] * 2


def test_empty_outputs_are_refused_skipped_or_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [plain("a"), plain("b", ""), talk("c", "d", "e", " \n"), plain("f")])
    with pytest.raises(ValueError, match=r"2 bad records: line 3: the output is empty; data.empty_output=skip lea"):
        read_instructions(path)
    with pytest.raises(ValueError, match=r"line 4: the output of turn 2 is empty"):
        read_instructions(path)
    found, skipped = read_instructions(path, empty_output="skip")
    assert ([one.turns[0].instruction for one in found], skipped) == (["a", "f"], 2)
    found, skipped = read_instructions(path, empty_output="keep")
    assert ([one.turns[-1].response for one in found], skipped) == (["yes", "", " \n", "yes"], 0)
    with pytest.raises(ValueError, match="holds no records; give a file with an instruction and an output in each"):
        read_instructions(write(tmp_path / "y.json", [plain("b", "")]), empty_output="skip")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"instruction": "a", "input": ""},
            r"no field 'output'; there are 'instruction', 'input' \(.*data.columns.output",
        ),
        ({}, r"no field 'instruction'; there are none \(.*data.columns.instruction"),
        (plain("a") | {"output": 3}, r"field 'output' holds 3, not text"),
        (plain("a") | {"output": None}, r"the output is empty; data.empty_output=skip"),
        (plain("a") | {"input": ["b"]}, r"field 'input' holds a list, not text"),
        (plain("a") | {"group": 1}, r"field 'group' holds 1, not text"),
        (plain(" \t"), r"the instruction is empty"),
        (plain("a", "\ud800"), r"field 'output' holds half a surrogate pair at character 0"),
        (talk("a", "b", " ", "c"), r"the instruction of turn 2 is empty"),
        ({"messages": "a"}, r"field 'messages' must be a list of messages with 'role' and 'content'"),
        ({"messages": []}, r"field 'messages' must be a list of messages"),
        ({"messages": ["a"]}, r"message 1 must be an object with 'role' and 'content'"),
        ({"messages": [{"content": "a"}]}, r"message 1 must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, r"message 1 has no text under 'content'"),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, r"message 1 has no text under 'content'"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            r"the conversation has no question with an answer: .* tool$",
        ),
        (
            {"messages": [*talk("a", "b")["messages"], {"role": "system", "content": "c"}]},
            r"the conversation has a system message behind the first message; data.irregular=mend",
        ),
        (talk("a"), r"the conversation has no question with an answer: its roles are user$"),
        (talk("a", "b", "c", system="S"), r"the conversation ends with the user; data.irregular=mend"),
        (
            {"messages": talk("a", "b", "c")["messages"][1:]},
            r"the conversation begins with the assistant and ends with the user; data",
        ),
        (
            {"messages": [{"role": "system", "content": "S"}]},
            r"the conversation has no question with an answer: its roles are system$",
        ),
        ("text", r"a JSON str, not an object"),
    ],
)
def test_bad_records_are_named_with_file_and_line(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "x.jsonl", [plain("a"), record, plain("b")])
    with pytest.raises(ValueError, match=rf"x\.jsonl: 1 bad record: .*(x\.jsonl:2|line 2): {message}"):
        read_instructions(path)


def test_of_many_bad_records_ten_are_named_and_all_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [plain("a"), *[plain("b", "")] * 12])
    with pytest.raises(ValueError, match=r"12 bad records \(the first 10 of 12\): ") as error:
        read_instructions(path)
    assert re.findall(r"line (\d+): ", str(error.value)) == [str(line) for line in range(3, 13)]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"does not exist .*; check .*data\.path|folder .* holds no "):
            read_instructions(path)


def test_conversations_and_digest_need_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.json", [plain(f"q{i}") for i in range(20)])
    built = module(path)
    monkeypatch.setattr(ByteTokenizer, "encode_array", None)
    read = InstructionDataModule(
        tokenizer=BYTES, context_length=64, path=str(path), batch_size=4, split="order", template=SHORT,
        val_fraction=0.1, test_fraction=0.1,
    )  # fmt: skip
    read.read()
    assert read.data_digest == built.data_digest
    assert [read.conversations_of(split) for split in ("train", "val", "test")] == [
        built.conversations_of(split) for split in ("train", "val", "test")
    ]
