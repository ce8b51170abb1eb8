"""Preference records, what is scored of them, what becomes of those that are too long; packed pairs are padded ones.

From text on also against TRL's DPO trainer and the book's collate function.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_kinds import KINDS, of_kind
from torch import Tensor, nn

from llm_lightning.data.pairs import (
    PairSample,
    PreferenceBatch,
    collate_packed_pairs,
    collate_padded_pairs,
    packed_pairs_length,
)
from llm_lightning.data.preference import PreferenceDataModule, Scoring
from llm_lightning.data.record_store.tokens import Pieces
from llm_lightning.data.records.preference import read_preferences
from llm_lightning.data.templates.conversation import Turn
from llm_lightning.losses import preference_loss, sequence_log_probs, token_log_probs
from llm_lightning.models.attention import Context
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import ConstantConfig
from llm_lightning.tasks.dpo import DPOModule
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.families.gpt2 import to_hf

BYTES, GPT2 = build_tokenizer("byte"), build_tokenizer("gpt2")
SHORT = "[{input}]Q{instruction}\nA{response}|"
"""Each letter is a token: Q, the instruction, a line break and A, the answer and its end."""

Record = dict[str, Any]


def write(path: Path, records: Sequence[Any]) -> Path:
    """One record a line, in an array or, by its name, as JSONL."""
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]")
    return path


def plain(instruction: str, chosen: str = "yes", rejected: str = "no", given: str = "", **more: str) -> Record:
    return {"instruction": instruction, "input": given, "chosen": chosen, "rejected": rejected, **more}


def says(*contents: str, system: str | None = None) -> list[Record]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def answer(content: str) -> list[Record]:
    return [{"role": "assistant", "content": content}]


def module(path: Path, **options: Any) -> PreferenceDataModule:
    settings = {"context_length": 64, "template": SHORT, "batch_size": 4, "eval_batches": 2, "max_dropped": 1.0}
    settings |= {"tokenizer": BYTES, "split": "order", "val_fraction": 0.1, "test_fraction": 0.1, **options}
    made = PreferenceDataModule(path=str(path), **settings)
    made.build()
    return made


def in_letters(ids: Sequence[int]) -> str:
    return "".join("$" if token == 256 else chr(token) for token in ids)


def rows_of(data: PreferenceDataModule) -> dict[int, tuple[str, str, str]]:
    """sample -> (prompt, chosen, rejected), the end of text written as $."""
    return {
        one.sample_id: (in_letters(one.prompt_ids), in_letters(one.chosen_ids), in_letters(one.rejected_ids))
        for one in data.train_samples  # type: ignore[attr-defined]
    }


def scored(data: PreferenceDataModule, index: int) -> tuple[str, str]:
    """The tokens of which the log-probability counts: of the chosen and of the rejected answer."""
    batch = data.collate([data.train_samples[index]])
    return tuple(in_letters(part.tolist()) for part in batch.labels.split(batch.lengths.tolist()))  # type: ignore[return-value]


# --- reading ----------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Record, tuple[Turn, ...], str | None]] = {
    "alpaca": (plain("a", "c", "r", "b"), (Turn("a", "b", "c"),), None),
    "prompt": ({"prompt": "a", "chosen": "c", "rejected": "r"}, (Turn("a", "", "c"),), None),
    "messages": (
        {"messages": says("a", "b", "d", system="S"), "chosen": "c", "rejected": "r"},
        (Turn("a", "", "b"), Turn("d", "", "c")),
        "S",
    ),
    "implicit": (
        {"chosen": says("a", "b", "d", "c", system="S"), "rejected": says("a", "b", "d", "r", system="S")},
        (Turn("a", "", "b"), Turn("d", "", "c")),
        "S",
    ),
    "explicit": (
        {"prompt": says("a", system="S"), "chosen": answer("c"), "rejected": answer("r")},
        (Turn("a", "", "c"),),
        "S",
    ),
    "text_and_answers": ({"prompt": "a", "chosen": answer("c"), "rejected": answer("r")}, (Turn("a", "", "c"),), None),
    "all_at_once": (
        {"prompt": "x", "messages": says("y", "z"), "chosen": says("a", "c"), "rejected": says("a", "r")},
        (Turn("a", "", "c"),),
        None,
    ),
    "empty_system": ({"prompt": says("a", system=""), "chosen": "c", "rejected": "r"}, (Turn("a", "", "c"),), ""),
}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str, name: str) -> None:
    """The last is how UltraFeedback comes: where both answers are whole conversations, nothing else is looked at."""
    record, turns, system = FORMS[form]
    [pair], skipped = read_preferences(write(tmp_path / name, [{**record, "group": "g"}]))
    assert skipped == 0
    assert (pair.turns, pair.rejected, pair.turns[-1].response) == (turns, "r", "c")
    assert (pair.system, pair.group) == (system, "g")
    assert pair.place == f"{tmp_path / name}:{2 if name == 'x.json' else 1}"


def test_columns_of_other_names(tmp_path: Path) -> None:
    record = {"question": "a", "better": "c", "worse": "r", "input": "not meant"}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse", "input": None}
    [pair], _ = read_preferences(write(tmp_path / "x.json", [record]), columns=columns)
    assert (pair.turns, pair.rejected) == ((Turn("a", "", "c"),), "r")
    with pytest.raises(ValueError, match=r"data.columns: unknown field 'output'; there are instruction, input, prompt"):
        read_preferences(tmp_path / "x.json", columns={"output": "better"})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a", "chosen": "c"}, r"no field 'rejected'; there are .*\(choose with data.columns.rejected"),
        ({"instruction": "a", "rejected": "c"}, r"no field 'chosen'; there are"),
        ({"chosen": "c", "rejected": "r"}, r"no field 'instruction'; there are"),
        (plain("a") | {"chosen": 3}, r"field 'chosen' holds 3, not text"),
        (plain("a") | {"rejected": None}, r"the rejected answer is empty; data.empty_answer=skip"),
        (plain(" "), r"the prompt is empty"),
        (plain("a", " \n"), r"the chosen answer is empty; data.empty_answer=skip leaves such records out"),
        (plain("a", "c", ""), r"the rejected answer is empty"),
        (plain("a", "c", "\ud800"), r"field 'rejected' holds half a surrogate pair"),
        (plain("a") | {"chosen": says("a", "c")}, r"chosen and rejected must both be text, or both lists of messages"),
        (
            {"chosen": says("a"), "rejected": says("a")},
            r"the messages of chosen must end with assistant, not with user",
        ),
        ({"chosen": says("a", "c"), "rejected": says("b", "r")}, r"must be alike up to their last message"),
        ({"chosen": says("a", "c"), "rejected": answer("r")}, r"must be alike up to their last message"),
        ({"chosen": [], "rejected": []}, r"field 'chosen' holds list, not text|both lists of messages"),
        ({"chosen": answer("c"), "rejected": answer("r")}, r"no field 'instruction'"),
        (
            {"messages": says("a", "b"), "chosen": "c", "rejected": "r"},
            r"the messages of 'messages' must end with user",
        ),
        ({"messages": [], "chosen": "c", "rejected": "r"}, r"field 'messages' must be a list of messages"),
        ({"messages": "a", "chosen": "c", "rejected": "r"}, r"field 'messages' must be a list of messages"),
        ({"messages": ["a"], "chosen": "c", "rejected": "r"}, r"message 1 must be an object with 'role'"),
        (
            {"prompt": [*answer("a"), *says("b")], "chosen": "c", "rejected": "r"},
            r"the conversation begins with the assistant; data.irregular=mend",
        ),
        (
            {"messages": says("a", system="S"), "chosen": "c", "rejected": "r", "system": "T"},
            r"a system message is both in the messages and under 'system'",
        ),
        ({"messages": says("a", "b", " "), "chosen": "c", "rejected": "r"}, r"the prompt of turn 2 is empty"),
        ("text", r"a JSON str, not an object"),
    ],
)
def test_bad_records_are_named_with_file_and_line(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "x.jsonl", [plain("a"), record, plain("b")])
    with pytest.raises(ValueError, match=rf"x\.jsonl: 1 bad record: .*(x\.jsonl:2|line 2): .*({message})"):
        read_preferences(path)


def test_of_many_bad_records_ten_are_named_and_all_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [plain("a"), *[plain("b", "")] * 12])
    with pytest.raises(ValueError, match=r"12 bad records \(the first 10 of 12\): "):
        read_preferences(path)
    found, skipped = read_preferences(path, empty_answer="skip")
    assert ([one.turns[0].instruction for one in found], skipped) == (["a"], 12)
    with pytest.raises(ValueError, match=r"holds no records; give a file with a prompt, a chosen and a rejected answ"):
        read_preferences(write(tmp_path / "y.json", [plain("b", "")]), empty_answer="skip")
    with pytest.raises(FileNotFoundError, match=r"does not exist .*; check .*data\.path"):
        read_preferences(tmp_path / "none.json")


# --- what is scored ---------------------------------------------------------------------------------------------------


def first_of(tmp_path: Path, record: Record, **options: Any) -> tuple[str, str]:
    """What is scored of a record."""
    return scored(module(write(tmp_path / "x.json", [record, *[plain(f"{i}") for i in range(9)]]), **options), 0)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("cde$", "f$")),
        ({"score_eos": False}, ("cde", "f")),
        ({"score_header": True}, ("Acde$", "Af$")),  # without the line break before A
        ({"score_header": True, "score_eos": False}, ("Acde", "Af")),
        ({"score_header": True, "template": "{instruction}{response}"}, ("cde$", "f$")),
    ],
)
def test_answers_and_their_ends_are_scored(
    tmp_path: Path, options: Any, expected: tuple[str, str], packing: bool
) -> None:
    assert first_of(tmp_path, plain("ab", "cde", "f"), packing=packing, **options) == expected


def test_of_a_conversation_the_last_answer_alone_is_scored(tmp_path: Path) -> None:
    record = {"messages": says("a", "b", "d"), "chosen": "c", "rejected": "r"}
    path = write(tmp_path / "x.json", [record, *[plain(f"{i}") for i in range(9)]])
    data = module(path)
    assert rows_of(data)[0] == ("Qa\nAb$|Qd\nA", "c$", "r$")
    assert scored(data, 0) == ("c$", "r$")


# --- identical pairs, splits ------------------------------------------------------------------------------------------


def test_pairs_with_the_same_answer_twice_are_counted_and_left_out(tmp_path: Path, caplog: Any) -> None:
    """After the split, whose borders they do not move."""
    caplog.set_level(logging.INFO)
    records = [plain(f"q{i}", f"c{i}") for i in range(40)]
    records[3]["rejected"], records[30]["rejected"], records[39]["rejected"] = "c3", " c30\n", "c39 "
    data = module(write(tmp_path / "x.json", records))
    assert {split: len(data.records[split]) for split in ("train", "val", "test")} == {
        "train": 30,
        "val": 3,
        "test": 4,
    }
    assert [one.turns[0].instruction for one in data.conversations_of("test")] == ["q32", "q33", "q34", "q35"]
    report = data.report()
    assert (report["identical"], report["records"], report["dropped"]) == (3, 40, 0)
    assert "40 records: 0 without answer and 3 with the same answer twice left out" in caplog.text
    with pytest.raises(ValueError, match=r"no val pair of two different answers fits into 64 tokens"):
        module(write(tmp_path / "y.json", [plain(f"{i}", "a", "a" if i >= 36 else "b") for i in range(40)]))


def test_no_prompt_and_no_group_stands_in_two_splits(tmp_path: Path) -> None:
    records = [plain(wording, f"{i}", group=f"{i // 2}") for i in range(40) for wording in (f"Say {i}", f"say  {i}!")]
    data = module(write(tmp_path / "x.json", records), split="grouped")
    sides = [{one.group for one in data.conversations_of(split)} for split in ("train", "val", "test")]
    assert sum(map(len, sides)) == 20 == len(set.union(*sides))
    assert data.report()["leaks"]["test"]["prompts"] == 0


# --- too long ---------------------------------------------------------------------------------------------------------

LIMIT = 10
LONG = [
    plain("abc", "xyz", "uv"),  # 6 + 4 tokens: fits
    plain("abcd", "xyzw", "u"),  # 7 + 5, one too many
    plain("abc", "u", "1234567"),  # 6 + 8, three too many, by the rejected answer: nothing of the question is left
    plain("a", "123456789", "u"),  # 4 + 10, the same
    plain("a", "u", "1234567890"),  # 11 tokens leave no room for a prompt
    plain("abcdefgh", "u", "v"),  # a prompt that alone fills the limit
    plain("abcd", "xyzw", "xyzv"),  # 7 + 5: the first four tokens, which are left of them, differ
    plain("abcd", "xyzwu", "xyzwv"),  # the same, they do not
]


def limited(tmp_path: Path, **options: Any) -> PreferenceDataModule:
    path = write(tmp_path / "x.json", [*LONG, *[plain(f"{i}", "y", "n") for i in range(32)]])
    return module(path, max_length=LIMIT, **{"max_cut": 1, **options})


@pytest.mark.parametrize(
    ("too_long", "counts", "rows"),
    [
        (
            "cut_prompt",
            (4, 0, 3),
            {
                0: ("Qabc\nA", "xyz$", "uv$"),
                1: ("Qbcd\nA", "xyzw$", "u$"),
                5: ("Qcdefgh\nA", "u$", "v$"),
                6: ("Qbcd\nA", "xyzw$", "xyzv$"),
                7: ("Qcd\nA", "xyzwu$", "xyzwv$"),
            },
        ),
        ("drop", (0, 0, 7), {0: ("Qabc\nA", "xyz$", "uv$")}),
        (
            "cut_answer",
            (0, 5, 2),
            {
                0: ("Qabc\nA", "xyz$", "uv$"),
                1: ("Qabcd\nA", "xyzw", "u$"),
                2: ("Qabc\nA", "u$", "12345"),
                3: ("Qa\nA", "1234567", "u$"),
                4: ("Qa\nA", "u$", "1234567"),
                6: ("Qabcd\nA", "xyzw", "xyzv"),
            },
        ),
    ],
)
def test_what_becomes_of_pairs_that_are_too_long(
    tmp_path: Path, too_long: str, counts: tuple[int, int, int], rows: dict[int, tuple[str, str, str]]
) -> None:
    data = limited(tmp_path, too_long=too_long)
    report = data.report()
    assert {index: row for index, row in rows_of(data).items() if index < len(LONG)} == rows
    assert (report["prompts_cut"], report["answers_cut"], report["dropped"]) == counts
    assert report["splits"]["train"]["pairs"] == 32 - counts[2] == len(data.train_samples)  # type: ignore[arg-type]
    assert report["splits"]["train"]["most_tokens"] <= LIMIT + 1
    for batch in data.train_dataloader():
        assert batch.lengths.min() > 0
    assert len(data.records["train"]) == 32, "also what is not trained on can be answered"


@pytest.mark.parametrize("too_long", ["cut_prompt", "drop", "cut_answer"])
def test_more_losses_than_allowed_are_refused(tmp_path: Path, too_long: str) -> None:
    report = limited(tmp_path, too_long=too_long).report()
    lost = report["dropped"] + report["answers_cut"]
    limited(tmp_path, too_long=too_long, max_dropped=lost / 40)
    with pytest.raises(
        ValueError, match=rf"{lost} of 40 records do not fit into 10 tokens \(\d dropped, \d answers cut"
    ):
        limited(tmp_path, too_long=too_long, max_dropped=round((lost - 0.3) / 40, 4))


def test_a_header_is_scored_as_far_as_something_predicts_it(tmp_path: Path) -> None:
    data = module(write(tmp_path / "x.json", [plain(f"{i}") for i in range(10)]), score_header=True)
    assert scored(data, 1) == ("Ayes$", "Ano$")
    parts = [("A:", "header"), ("b", "response"), ("c", "rejected")]
    alone = Pieces.of((np.frombuffer(text.encode(), np.uint8), kind) for text, kind in parts)
    pair = Scoring(score_header=True).whole(0, alone)
    assert (pair.prompt_ids.tolist(), pair.n_header) == ([65, 58], 1)


# --- packed and padded ------------------------------------------------------------------------------------------------

SMALL = GPTConfig(vocab_size=61, context_length=25, n_layer=2, n_head=2, n_embd=16)


@torch.no_grad()
def randomized(config: GPTConfig = SMALL, seed: int = 0, std: float = 0.3) -> GPT:
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=std, generator=generator)
    return model


def random_pairs(
    sizes: Sequence[tuple[int, int, int]], *, preamble: int = 0, same: int = 0, n_header: int = 0, seed: int = 0
) -> list[PairSample]:
    """Pairs of (prompt, chosen, rejected) tokens; prompts begin with `preamble` common ones, answers with `same`."""
    draw = np.random.default_rng(seed)
    common = draw.integers(0, SMALL.vocab_size, preamble)
    pairs = []
    for index, lengths in enumerate(sizes):
        prompt, chosen, rejected = (draw.integers(0, SMALL.vocab_size, length) for length in lengths)
        prompt[:preamble] = common[: len(prompt)]
        rejected[:same] = chosen[: min(same, len(rejected))]
        rejected[-1] = (chosen[-1] + 1) % SMALL.vocab_size
        pairs.append(PairSample(index, prompt, chosen, rejected, min(n_header, len(prompt) - 1)))
    return pairs


BATCHES = {
    "ragged": random_pairs([(7, 4, 9), (3, 12, 2), (1, 1, 1), (11, 3, 3), (20, 1, 6)]),
    "preamble": random_pairs([(7, 4, 9), (6, 12, 2), (8, 1, 1), (11, 3, 3)], preamble=6),
    "same_prompt": random_pairs([(6, 4, 9), (6, 5, 2), (6, 1, 1)], preamble=6),
    "same_beginnings": random_pairs([(7, 4, 9), (6, 8, 5), (8, 6, 6)], preamble=3, same=4),
    "header": random_pairs([(7, 4, 9), (6, 8, 5), (8, 2, 6)], preamble=5, same=1, n_header=3),
    "one": random_pairs([(5, 3, 4)]),
    "one_token_each": random_pairs([(1, 1, 1), (2, 1, 1)]),
}


def of_batch(model: GPT, batch: PreferenceBatch) -> Tensor:
    """(2B,) summed log-probabilities."""
    hidden = model.hidden_states(batch.input_ids, Context.of(batch.packing))
    picked = hidden.flatten(0, 1).index_select(0, batch.output_positions)
    log_probs = token_log_probs(picked, model.head_weight(), batch.labels)
    return sequence_log_probs(log_probs, batch.branch, len(batch.lengths))


def one_by_one(model: GPT, samples: Sequence[PairSample]) -> Tensor:
    """The same, each sequence by itself through the whole model."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for sample in samples:
            ids = torch.from_numpy(np.concatenate([sample.prompt_ids, getattr(sample, side)]))
            log_probs = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            sums.append(log_probs[len(sample.prompt_ids) - 1 - sample.n_header :].sum())
    return torch.stack(sums)


def values_and_gradients(model: GPT, found: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """With another weight for each sequence."""
    model.zero_grad()
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype).cos()).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LAYOUTS: dict[str, Callable[[Sequence[PairSample]], PreferenceBatch]] = {
    "padded": lambda samples: collate_padded_pairs(samples, pad_id=0, context_length=SMALL.context_length),
    "packed": lambda samples: collate_packed_pairs(samples, pad_id=0),
    "unshared": lambda samples: collate_packed_pairs(samples, pad_id=0, share_prefix=False),
}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Every difference as a share of the largest gradient of its tensor."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (ours[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("form", ["plain", "untied", "checkpointing", "llama", "qwen3"])
@pytest.mark.parametrize("name", BATCHES)
def test_all_layouts_give_what_each_sequence_gives_by_itself(
    name: str, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    config = of_kind(SMALL, form) if form in KINDS else replace(SMALL, tied_head=form != "untied")
    model = randomized(config).to(dtype).train()
    model.activation_checkpointing = form == "checkpointing"
    samples = BATCHES[name]
    expected, gradients = values_and_gradients(model, one_by_one(model, samples))
    batches = {layout: make(samples) for layout, make in LAYOUTS.items()}
    for layout, batch in batches.items():
        found, ours = values_and_gradients(model, of_batch(model, batch))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0, msg=layout)
        # In float32 the gradient of a key's norm is the little that is left of terms that cancel: seen 3e-5.
        loose = 10 if form == "qwen3" and dtype == torch.float32 else 1
        assert_same_gradients(ours, gradients, loose * tolerance)
        for field in ("labels", "branch", "lengths"):
            assert torch.equal(getattr(batch, field), getattr(batches["padded"], field)), field
        assert (batch.n_targets, batch.sample_ids) == (len(samples), tuple(range(len(samples))))
        assert batch.keys == tuple(sample.key for sample in samples)
        assert len(batch.labels) == len(batch.branch) == len(batch.output_positions) == batch.lengths.sum()
        assert torch.equal(batch.branch.bincount(), batch.lengths)


def test_packed_pairs_hold_what_is_shared_once() -> None:
    """By hand: the prompt is 1 2 3; both answers begin with 4, the chosen one goes on with 5 6, the other with 7."""
    one = PairSample(5, np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([4, 7]))
    other = PairSample(8, np.array([1, 2, 9]), np.array([4]), np.array([5, 6]))
    batch = collate_packed_pairs([one, other], pad_id=0)
    # chosen 1 2 3 4 5; rejected adds nothing; of the second pair 9, and 5 of its rejected answer.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 5, 0]]
    assert batch.labels.tolist() == [4, 5, 6, 4, 4, 7, 5, 6]
    assert batch.branch.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 1, 2, 2]
    assert (batch.n_targets, batch.sample_ids) == (2, (5, 8))
    packing = batch.packing
    assert packing is not None
    assert packing.output_positions.tolist() == [2, 3, 4, 5, 2, 3, 5, 6], "3 and 4 twice, 4 with two labels"
    assert packing.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 0]
    assert [row[:n].tolist() for row, n in zip(packing.rows, (5, 4, 3, 4), strict=True)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
        [0, 1, 5],
        [0, 1, 5, 6],
    ]
    assert packed_pairs_length([one, other]) == 7
    assert packed_pairs_length([one, other], share_prefix=False) == 5 + 4 + 3 + 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_pairs_costs_nothing(layout: str) -> None:
    """Of a process that ran out of data before the others; it still takes part in the backward pass."""
    batch = LAYOUTS[layout]([])
    assert (batch.n_targets, batch.sample_ids, batch.keys) == (0, (), ())
    assert batch.lengths.shape == batch.labels.shape == (0,)
    model = randomized().train()
    found = of_batch(model, batch)
    found.sum().backward()
    assert found.shape == (0,)
    assert not any(p.grad.any() for p in model.parameters())  # type: ignore[union-attr]


def test_the_key_names_tokens_and_what_is_scored() -> None:
    one = PairSample(0, np.array([1, 2]), np.array([3]), np.array([4, 5]))
    others = [
        one._replace(prompt_ids=np.array([1, 3])),
        one._replace(chosen_ids=np.array([4])),
        one._replace(rejected_ids=np.array([4, 6])),
        one._replace(n_header=1),
        one._replace(prompt_ids=np.array([1]), chosen_ids=np.array([2, 3])),
        one._replace(chosen_ids=np.array([3, 4]), rejected_ids=np.array([5])),
    ]
    assert one._replace(sample_id=9, prompt_ids=np.array([1, 2], dtype=np.int32)).key == one.key
    assert len({one.key, *(other.key for other in others)}) == 7


# --- layouts and order ------------------------------------------------------------------------------------------------


def ragged(n: int = 100) -> list[Record]:
    draw = np.random.default_rng(1)
    return [
        plain("q" * int(draw.integers(1, 12)), *("a" * int(i) for i in draw.permutation(30)[:2] + 1)) for _ in range(n)
    ]


def test_what_packing_saves_is_measured(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", ragged(200))
    data = module(path)
    assert data.is_packed
    assert data.report()["packed"] is True
    padded = module(path, packing=False)
    assert not padded.is_packed
    n_packed = n_padded = 0
    for batch, same in zip(data.train_dataloader(), padded.train_dataloader(), strict=True):
        assert batch.sample_ids == same.sample_ids
        samples = [data.train_samples[index] for index in batch.sample_ids]  # type: ignore[attr-defined]
        n_packed += packed_pairs_length(samples)
        assert batch.input_ids.size(1) == -(-packed_pairs_length(samples) // 8) * 8
        n_padded += len(same.input_ids) * max(len(s.token_ids) - 1 for pair in samples for s in pair.sequences)
    assert data.report()["saved_by_packing"] == pytest.approx(1 - n_packed / n_padded, abs=1e-4)
    shared = data.report()["saved_by_packing"]
    assert module(path, share_prefix=False).report()["saved_by_packing"] < 0.5 * shared


def test_of_equal_lengths_nothing_is_saved_without_sharing(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [plain("q", "a", "b")] * 40)
    assert module(path).is_packed
    data = module(path, share_prefix=False)
    assert not data.is_packed
    assert data.report()["saved_by_packing"] == 0


def test_pairs_are_mixed_by_weight(tmp_path: Path) -> None:
    """32 and 8 pairs are for training: an epoch of 40 takes 30 of the first, and each of the second 5/4 times."""
    names = {"long": 40, "short": 10}
    for name, n in names.items():
        write(tmp_path / f"{name}.json", [plain(f"{name} {i}") for i in range(n)])
    mixture = [{"name": n, "path": str(tmp_path / f"{n}.json"), "weight": w} for n, w in (("long", 3), ("short", 1))]
    data = PreferenceDataModule(
        tokenizer=BYTES, context_length=64, template=SHORT, batch_size=4, mixture=mixture, split="grouped",
        val_fraction=0.1, test_fraction=0.1,
    )  # fmt: skip
    data.build()
    assert {name: part["per_epoch"] for name, part in data.report()["mixture"].items()} == {"long": 30, "short": 10}
    seen = [index for batch in data.train_dataloader() for index in batch.sample_ids]
    assert Counter(data.records["train"][index].turns[0].instruction.split()[0] for index in seen) == {
        "long": 30, "short": 10,
    }  # fmt: skip


@pytest.mark.parametrize("bucket", [True, False])
def test_every_epoch_shows_every_pair_once(tmp_path: Path, bucket: bool) -> None:
    data = module(write(tmp_path / "x.json", ragged(150)), bucket=bucket)
    seen = []
    for epoch in range(2):
        loader = data.train_dataloader()
        data.set_epoch(epoch)
        seen.append([index for batch in loader for index in batch.sample_ids])
        assert sorted(seen[-1]) == list(range(120))
    assert seen[0] != seen[1]
    evaluated = [index for batch in data.val_dataloader()[0] for index in batch.sample_ids]
    assert sorted(evaluated) == list(range(15))
    lengths = [sum(len(s.token_ids) for s in one.sequences) for one in data.eval_samples["val"]]  # type: ignore[attr-defined]
    assert ([lengths[i] for i in evaluated] == sorted(lengths)) == bucket


# --- what is told and refused -----------------------------------------------------------------------------------------


def test_report_description_and_preview(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    records = [plain("ab", "cde", "f"), *[plain(f"{i}", "y", "no") for i in range(19)]]
    data = module(write(tmp_path / "x.json", records))
    report = data.report()
    assert report["splits"]["train"] == {
        "pairs": 16,
        "mean_prompt": (5 + 10 * 4 + 5 * 5) / 16,
        "mean_chosen": (4 + 15 * 2) / 16,
        "mean_rejected": (2 + 15 * 3) / 16,
        "chosen_longer": 1 / 16,
        "most_tokens": 9,
    }
    assert json.loads(json.dumps(report)) == report, "plain values, for summary.json"
    assert "train: 16 pairs; chosen answers have 2.1 tokens, rejected ones 2.9; the chosen one is longer" in caplog.text
    assert data.describe() == f"{tmp_path / 'x.json'}: 16 train, 2 val, 2 test pairs; template data.template, packed"
    assert data.preview(1) == (
        "--- record 0, chosen: 9 tokens, loss on 4\nQab\nA>>cde<|endoftext|><<"
        "\n--- record 0, rejected: 7 tokens, loss on 2\nQab\nA>>f<|endoftext|><<\u00b7\u00b7"
    )
    assert data.sample_prompts(1) == [[*b"Q17\nA"]]


def test_the_digest_names_pairs_template_and_what_is_scored(tmp_path: Path) -> None:
    records = [plain(f"q{i}") for i in range(10)]
    path = write(tmp_path / "x.json", records)
    first = module(path).data_digest
    assert module(write(tmp_path / "y.json", records)).data_digest == first
    changed = write(tmp_path / "z.json", [*records[:9], plain("q9", "yes", "nope")])
    others = [module(changed), module(path, score_eos=False), module(path, score_header=True)]
    others += [module(path, template="Q{instruction}[{input}]A{response}|")]
    assert len({first, *(one.data_digest for one in others)}) == 5


def test_a_tokenizer_is_trained_on_training_texts_alone(tmp_path: Path) -> None:
    seen: list[str] = []

    def make(texts: Any) -> Any:
        seen.extend(texts)
        return BYTES

    module(write(tmp_path / "x.json", [plain(f"{i}", f"c{i}", f"r{i}") for i in range(20)]), tokenizer=make)
    assert seen == [text for i in range(16) for text in (f"Q{i}\nAc{i}", f"r{i}")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "random"}, r"data.split='random' must be one of grouped, order"),
        ({"too_long": "cut"}, r"data.too_long='cut' must be one of cut_prompt, drop, cut_answer"),
        ({"packing": "yes"}, r"data.packing='yes' must be one of auto, true, false"),
        ({"val_fraction": 0.0}, r"data.val_fraction=0.0 and data.test_fraction=0.1 must be positive"),
        ({"max_dropped": 1.5}, r"data.max_dropped=1.5 must be between 0 and 1"),
        ({"name": "book_preference"}, r"data.name=book_preference is unknown: did you mean book_preferences\?"),
        ({"empty_answer": "keep"}, r"data.empty_answer='keep' must be one of refuse, skip"),
        ({"template": "{instruction}{response}x", "split": "order"}, r"x.json:2 has an input, but template data.templ"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "x.json", [plain(f"{i}", given="b") for i in range(20)]), **options)


def test_the_embedded_pairs_are_read() -> None:
    data = PreferenceDataModule(tokenizer=GPT2, context_length=256, batch_size=8)
    data.build()
    report = data.report()
    assert (report["identical"], report["dropped"], report["prompts_cut"]) == (0, 0, 0)
    assert report["leaks"]["test"]["prompts"] == report["leaks"]["val"]["prompts"] == 0


@pytest.mark.slow
@pytest.mark.skipif("LLM_LIGHTNING_DATA" not in os.environ, reason="needs real data: set LLM_LIGHTNING_DATA")
def test_the_books_pairs() -> None:
    path = Path(os.environ["LLM_LIGHTNING_DATA"]) / "instruction-data-with-preference.json"
    options = {"template": "alpaca", "context_length": 1024, "batch_size": 8}
    data = module(path, tokenizer=GPT2, val_fraction=0.05, score_eos=False, score_header=True, **options)
    report = data.report()
    assert (report["records"], report["identical"], report["dropped"], report["prompts_cut"]) == (1100, 6, 0, 0)
    pairs = {split: [one.record for one in data.records[split]] for split in ("train", "val", "test")}
    records = json.loads(path.read_text())
    borders = {"train": (0, 935), "test": (935, 1045), "val": (1045, 1100)}
    for split, (start, end) in borders.items():
        assert pairs[split] == [one for one in records[start:end] if one["chosen"].strip() != one["rejected"].strip()]


# --- TRL and the book -------------------------------------------------------------------------------------------------

CONFIG = GPTConfig(vocab_size=50257, context_length=128, n_layer=2, n_head=2, n_embd=32)
TEXTS = [
    ("Name a colour.", "", "Blue, please.", "Blue, you fool"),
    ("Spell the number.", "12", "twelve, which is a dozen", "12"),
    ("Repeat the line\nword by word.", "one\ntwo", "one\ntwo", "one\ntwo\nthree, and many more words than that"),
    ("Why?", "", "Because a longer answer than the others makes this batch ragged.", "Because."),
    ("Only for testing.", "", "no", "yes"),
    ("Only for validation.", "", "no", "yes"),
]
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)


def question(instruction: str, context: str) -> str:
    """The book's format_input."""
    return PREAMBLE + instruction + (f"\n\n### Input:\n{context}" if context else "")


def texts_data(folder: Path, **options: Any) -> tuple[PreferenceDataModule, PreferenceBatch]:
    """The first four records are for training, in their order: all in one batch."""
    names = ("instruction", "input", "chosen", "rejected")
    path = write(folder / "texts.json", [dict(zip(names, row, strict=True)) for row in TEXTS])
    settings = {"tokenizer": GPT2, "template": "alpaca", "context_length": CONFIG.context_length, "shuffle": False}
    settings |= {"val_fraction": 1 / 6, "test_fraction": 1 / 6, "bucket": False, "eval_batches": 0, **options}
    data = module(path, **settings)
    batch = next(iter(data.train_dataloader()))
    assert batch.sample_ids == (0, 1, 2, 3)
    return data, batch


@pytest.mark.peer
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_losses_and_gradients_are_those_of_trl(tmp_path: Path, monkeypatch: Any, packing: bool) -> None:
    """From text on, policy and reference both drawn at random. TRL ends every answer itself, as ours are."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from llm_lightning.weights.hf_export import export_hf

    policy, reference = randomized(CONFIG, seed=1, std=0.2), randomized(CONFIG, seed=2, std=0.2)
    for name, model in (("policy", policy), ("reference", reference)):
        export_hf(model, CONFIG, GPT2, tmp_path / name)
    rows = [
        {"prompt": question(*row[:2]) + "\n\n### Response:\n", "chosen": row[2], "rejected": row[3]}
        for row in TEXTS[:4]
    ]
    load = transformers.GPT2LMHeadModel.from_pretrained
    trainer = trl.DPOTrainer(
        model=load(tmp_path / "policy", dtype=torch.float32),
        ref_model=load(tmp_path / "reference", dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "policy"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.3,
            per_device_train_batch_size=4,
            max_length=CONFIG.context_length,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            disable_dropout=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    given = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    _, batch = texts_data(tmp_path, packing=packing)
    assert torch.equal(given["completion_mask"].sum(1), batch.lengths)
    assert torch.equal(given["input_ids"][given["completion_mask"].bool()], batch.labels)
    with torch.no_grad():
        references = of_batch(reference, batch).split(4)
    for kind, theirs in {"sigmoid": "sigmoid", "ipo": "ipo", "average": "sigmoid_norm"}.items():
        trainer.loss_types = [theirs]
        trainer.model.zero_grad()
        expected = trainer.compute_loss(trainer.model, given)
        expected.backward()
        sums, lengths = of_batch(policy, batch).split(4), batch.lengths.split(4)
        found = preference_loss(*sums, *references, *lengths, kind=kind, beta=0.3)
        policy.zero_grad()
        found.loss.mean().backward()
        torch.testing.assert_close(found.loss.mean(), expected, rtol=1e-5, atol=1e-6, msg=kind)
        ours = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        ours["lm_head.weight"] = ours["token_embedding.weight"]
        peers = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert_same_gradients(to_hf(ours, CONFIG), peers, 5e-5)  # float32, of differences of sums
    summed = preference_loss(*sums, *references, *lengths, kind="sigmoid", beta=0.3)
    assert (summed.chosen_reward - summed.rejected_reward).abs().min() > 0.05, "not where all is alike"
    module = DPOModule(
        model=policy, tokenizer=GPT2, optimizer=AdamWConfig(lr=1e-3), scheduler=ConstantConfig(), beta=0.3
    )
    module.reference = module.reference_provider.frozen = reference
    found = module.step_output(batch).metrics
    for ours, theirs in {  # TRL: of sums, whatever the loss
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "chosen_log_prob": "logps/chosen",
        "rejected_log_prob": "logps/rejected",
    }.items():
        total, count = found[ours]
        # Log-probabilities are sums of float32; rewards are differences of such sums.
        expected = pytest.approx(trainer._metrics["eval"][theirs][0], rel=1e-5, abs=2e-5)
        assert (total / count).item() == expected, ours


def book_log_probs(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """ch07/04, compute_logprobs: the mean over what the mask lets through."""
    labels, logits, mask = labels[:, 1:], logits[:, :-1], mask[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (picked * mask).sum(-1) / mask.sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_with_the_books_settings_the_loss_is_the_books(tmp_path: Path, packing: bool) -> None:
    """ch07/04, custom_collate_fn and compute_dpo_loss written out: no end of text, "### Response:" is scored."""
    policy, reference = (randomized(CONFIG, seed=seed, std=0.2).double() for seed in (1, 2))
    means = {}
    for number, side in ((2, "chosen"), (3, "rejected")):
        rows, masks = [], []
        for row in TEXTS[:4]:
            prompt = question(*row[:2])
            ids = torch.tensor(GPT2.encode(f"{prompt}\n\n### Response:\n{row[number]}"))
            mask = torch.ones(len(ids), dtype=torch.bool)
            mask[: len(GPT2.encode(prompt)) + 2] = False
            rows.append(ids)
            masks.append(mask)
        ids, mask = nn.utils.rnn.pad_sequence(rows, True, 50256), nn.utils.rnn.pad_sequence(masks, True, False)
        means |= {(side, name): book_log_probs(model(ids), ids, mask)
                  for name, model in (("policy", policy), ("reference", reference))}  # fmt: skip
    logits = means["chosen", "policy"] - means["rejected", "policy"]
    logits = logits - (means["chosen", "reference"] - means["rejected", "reference"])
    expected = -F.logsigmoid(0.1 * logits)

    _, batch = texts_data(tmp_path, packing=packing, score_eos=False, score_header=True)
    sums = [one for model in (policy, reference) for one in of_batch(model, batch).split(4)]
    found = preference_loss(*sums, *batch.lengths.split(4), kind="average", beta=0.1)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    margin = (found.chosen_reward - found.rejected_reward) / 0.1
    torch.testing.assert_close(margin, logits.detach(), rtol=1e-9, atol=1e-12)
