"""Splits, balance, leaks and batches of labelled texts; the book's own split of the real messages."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import WITH_PLOTS, fit_here

from llm_lightning.data.classification import (
    NAMED,
    ClassificationDataModule,
)
from llm_lightning.data.leaks import leaked_texts
from llm_lightning.data.order import BUCKET, bucketed_order
from llm_lightning.data.records.labelled import read_labelled, texts_as_pandas_reads_them
from llm_lightning.data.splits import book_split, grouped_split, normalized, undersampled
from llm_lightning.data.text_keys import TextKeys
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.tokenizers.build import build_tokenizer

BYTES = build_tokenizer("byte")


def module(path: Path | None = None, **options: Any) -> ClassificationDataModule:
    settings = {"tokenizer": BYTES, "context_length": 256, "batch_size": 8, "eval_batches": 2, **options}
    made = ClassificationDataModule(path=None if path is None else str(path), **settings)
    made.build()
    return made


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def made_up(n: int, label: str) -> list[tuple[str, str]]:
    return [(f"{label} {chr(97 + i % 26)}{chr(97 + i // 26)} word", label) for i in range(n)]


# --- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Win 500 now!", "WIN 900  now"),
        ("a\u00a0b", "a b"),
        ("caf\u00e9", "cafe\u0301"),
        ("don't", "don t"),
        ("x ", "x"),
    ],
)
def test_what_counts_as_the_same_text(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(("one", "other"), [("yes", "no"), ("Win 5", "Win 50"), (":-)", ":-("), ("\U0001f600", "?")])
def test_what_does_not(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


def test_no_group_straddles_and_every_class_has_its_shares() -> None:
    draw = np.random.default_rng(0)
    keys = [f"key {i}" for i in draw.integers(0, 400, 1000)]
    classes = [int(key.split()[1]) % 3 for key in keys]
    parts = grouped_split(keys, classes, (0.1, 0.2), seed=5)
    assert sorted(index for part in parts.values() for index in part) == list(range(1000))
    sides = [{keys[index] for index in part} for part in parts.values()]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    whole = Counter(classes)
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        for label, count in Counter(classes[index] for index in parts[split]).items():
            assert count == pytest.approx(share * whole[label], abs=4)
    again, other = (grouped_split(keys, classes, (0.1, 0.2), seed=seed) for seed in (5, 6))
    assert all(list(parts[split]) == list(again[split]) for split in parts)
    assert not any(list(parts[split]) == list(other[split]) for split in parts)


def test_one_large_group_does_not_end_in_the_test_split() -> None:
    keys = ["same"] * 40 + [f"key {i}" for i in range(60)]
    parts = grouped_split(keys, [0] * 100, (0.1, 0.2), seed=0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "val": 10, "test": 20}
    assert set(range(40)) <= set(parts["train"])


def test_undersampling_keeps_the_order_and_all_of_the_smallest_class() -> None:
    classes = [0] * 30 + [1] * 7 + [2] * 11
    part = np.random.default_rng(1).permutation(48).tolist()
    kept = undersampled(part, classes, seed=3).tolist()
    assert Counter(classes[index] for index in kept) == {0: 7, 1: 7, 2: 7}
    assert {index for index in part if classes[index] == 1} <= set(kept)
    assert kept == [index for index in part if index in set(kept)]


def test_leaks_by_hand() -> None:
    train, test = TextKeys.of(["win", "hello "]), TextKeys.of(["win", "hello", "WIN!"])
    found = leaked_texts(train, test, np.array([1, 0, 1]), ["ham", "spam"])
    assert (found["exact"], found["trimmed"], found["normalized"], found["of"]) == (1, 2, 3, 3)
    assert found["classes"] == {
        "ham": {"exact": 0, "trimmed": 1, "normalized": 1, "of": 1},
        "spam": {"exact": 1, "trimmed": 1, "normalized": 2, "of": 2},
    }


def split_by_strings(keys: list[str], classes: list[int], seed: int) -> dict[str, list[int]]:
    """`grouped_split` with fractions of 0.1 and 0.2, as it was before it took keys of 16 bytes."""
    splits, shares = ("train", "val", "test"), {"train": 1 - (0.1 + 0.2), "val": 0.1, "test": 0.2}
    groups: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    parts: dict[str, list[int]] = {split: [] for split in splits}
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for group in groups.values():
        by_class[Counter(classes[index] for index in group).most_common(1)[0][0]].append(group)
    for label in sorted(by_class):
        members = [by_class[label][index] for index in draw.permutation(len(by_class[label]))]
        counts = dict.fromkeys(splits, 0)
        for group in sorted(members, key=len, reverse=True):
            done = sum(counts.values()) + len(group)
            split = max(splits, key=lambda name: (shares[name] * done - counts[name], shares[name]))
            counts[split] += len(group)
            parts[split] += group
    return {split: [part[index] for index in draw.permutation(len(part))] for split, part in parts.items()}


def undersampled_by_sets(part: list[int], classes: list[int], seed: int) -> list[int]:
    """`undersampled`, as it was before it took arrays."""
    members: dict[int, list[int]] = defaultdict(list)
    for index in part:
        members[classes[index]].append(index)
    least = min(map(len, members.values()))
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    kept = {i for label in sorted(members) for i in draw.permutation(members[label])[:least].tolist()}
    return [index for index in part if index in kept]


def by_strings(path: Path, balance: str) -> tuple[dict[str, list[list[Any]]], dict[str, Any]]:
    """Splits, duplicates and leaks from the strings themselves, without keys or arrays."""
    records = read_labelled(path)
    texts = [record.text for record in records]
    labels = sorted({record.label for record in records})
    classes = [labels.index(record.label) for record in records]
    parts = split_by_strings([normalized(text) for text in texts], classes, 123)
    if balance == "undersample":
        parts = {split: undersampled_by_sets(part, classes, 123) for split, part in parts.items()}
    rows = {split: [[texts[i], classes[i]] for i in part] for split, part in parts.items()}
    facts: dict[str, Any] = {
        "exact_duplicates": len(texts) - len(set(texts)),
        "normalized_duplicates": len(texts) - len({normalized(text) for text in texts}),
    }
    for split in ("val", "test"):
        for way, form in (("exact", str), ("trimmed", str.strip), ("normalized", normalized)):
            seen = {form(text) for text, _ in rows["train"]}
            facts[f"{split} {way}"] = sum(form(text) in seen for text, _ in rows[split])
    return rows, facts


@pytest.mark.parametrize("balance", ["undersample", "none"])
def test_keys_of_16_bytes_give_the_splits_digest_and_counts_of_whole_strings(tmp_path: Path, balance: str) -> None:
    draw = random.Random(3)
    words = ["win", "Win", "caf\u00e9", "cafe\u0301", "7", "9", "\U0001f600", "\u00a0now", "!"]
    rows = [(" ".join(draw.choices(words, k=draw.randrange(1, 5))), draw.choice("aab")) for _ in range(700)]
    path = write(tmp_path / "x.tsv", rows)
    data = module(path, balance=balance)
    wanted, facts = by_strings(path, balance)
    assert facts["exact_duplicates"] > 100
    assert {split: [[text, "ab".index(label)] for text, label in data.split_of(split)] for split in wanted} == wanted
    assert data.data_digest == hashlib.sha256(json.dumps([wanted, ["a", "b"]]).encode()).hexdigest()
    report = data.report()
    found = {key: report[key] for key in ("exact_duplicates", "normalized_duplicates")}
    found |= {f"{split} {way}": report["leaks"][split][way] for split in ("val", "test") for way in TextKeys._fields}
    assert found == facts
    ids = [data.train_samples[index].token_ids.tolist() for index in range(len(wanted["train"]))]  # type: ignore
    assert ids == [list(text.encode()) for text, _ in wanted["train"]]


# --- the module ------------------------------------------------------------------------------------------------------


def test_the_embedded_messages_in_three_splits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = module(name="short_messages")
    report = data.report()
    assert data.labels == ["ham", "spam"]
    sizes = {split: sum(facts["classes"].values()) for split, facts in report["splits"].items()}
    assert sizes == {split: len(data.split_of(split)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) >= 440
    for facts in report["splits"].values():
        assert facts["classes"]["ham"] == facts["classes"]["spam"]
    assert report["leaks"]["test"]["normalized"] == 0
    assert report["exact_duplicates"] == report["normalized_duplicates"] == 0
    said = caplog.text
    n = sizes["train"] // 2
    assert f"train: {n} ham, {n} spam; " in said
    assert "Test texts also in training: 0 exactly, 0 trimmed, 0 normalized" in said


def test_no_single_word_tells_the_embedded_classes_apart() -> None:
    """Else a model's accuracy would say nothing. Words, their absence, and signs."""
    records = read_labelled(NAMED["short_messages"].file)  # type: ignore[arg-type]
    is_spam = np.array([record.label == "spam" for record in records])
    words = [set(re.findall(r"\w+|[^\w\s]", record.text.casefold())) for record in records]
    best = 0.0
    for word in set().union(*words):
        has = np.array([word in each for each in words])
        share = (has == is_spam).mean()
        best = max(best, share, 1 - share)
    assert 0.5 < best < 0.7  # 90% is the most that is allowed
    lengths = np.array([len(record.text) for record in records])
    by_length = max(((lengths >= limit) == is_spam).mean() for limit in range(200))
    assert by_length < 0.75


def test_duplicates_never_stand_on_two_sides(tmp_path: Path) -> None:
    rows = made_up(60, "ham") + made_up(40, "spam")
    again = [(text.upper() + "!", label) for text, label in rows[::3]]
    data = module(write(tmp_path / "x.tsv", rows + again))
    assert data.report()["leaks"]["test"]["normalized"] == 0
    assert data.report()["normalized_duplicates"] == len(again)
    sides = [{normalized(text) for text, _ in data.split_of(split)} for split in ("train", "val", "test")]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_texts_that_differ_in_digits_alone_can_be_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forms = {"in a sentence": "Is {} an even number?", "alone": "{}", "one class of two": "{} words"}
    for form, text in forms.items():
        rows = [(text.format(number), ("even", "odd")[number % 2]) for number in range(100, 200)]
        rows += made_up(100, "odd") if form == "one class of two" else []
        for balance in ("undersample", "none"):
            caplog.clear()
            data = module(write(tmp_path / "x.tsv", rows), balance=balance)
            assert "differ only in their digits may appear in two splits" in caplog.text, form
            sides = {split: data.split_of(split) for split in ("train", "val", "test")}
            assert all({label for _, label in side} == {"even", "odd"} for side in sides.values()), form
            assert data.report()["leaks"]["test"]["exact"] == 0, form
            assert data.report()["leaks"]["test"]["normalized"] > 0, form
    caplog.clear()
    module(write(tmp_path / "x.tsv", made_up(60, "even") + made_up(60, "odd")))
    assert "digits" not in caplog.text, "where digits need not count, they do not"
    equal = [("Is 7 an even number?", ("even", "odd")[number % 2]) for number in range(100)]
    for balance in ("undersample", "none"):
        with pytest.raises(ValueError, match=r"split has no text of class 'even'.*give more texts"):
            module(write(tmp_path / "x.tsv", equal), balance=balance)


def test_a_file_of_ones_own_wins_over_the_embedded_set(tmp_path: Path) -> None:
    rows = made_up(50, "good") + made_up(50, "bad") + made_up(50, "neither")
    data = module(write(tmp_path / "x.tsv", rows), balance="none")
    assert data.labels == ["bad", "good", "neither"]
    assert "x.tsv" in data.describe()
    named = module(tmp_path / "x.tsv", labels=["neither", "good", "bad"])
    assert named.labels == ["neither", "good", "bad"]
    assert {label for _, label in named.split_of("test")} == {"neither", "good", "bad"}


def test_the_split_does_not_depend_on_the_seed_of_training() -> None:
    one, other = module(seed=1), module(seed=2)
    assert [one.split_of(split) for split in ("train", "val", "test")] == [
        other.split_of(split) for split in ("train", "val", "test")
    ]
    assert one.data_digest == other.data_digest
    assert one.data_digest != module(split_seed=1).data_digest


def test_long_texts_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = module(max_length=20)
    assert max(len(data.train_samples[i].token_ids) for i in range(len(data.train_samples))) == 20  # type: ignore
    assert data.report()["splits"]["train"]["cut"] > 200
    assert "cut to 20" in caplog.text


@pytest.mark.parametrize(("pad_to", "width"), [("longest_train", None), ("context", 256), (100, 100)])
def test_fixed_padding(pad_to: Any, width: int | None) -> None:
    data = module(pad_to=pad_to)
    longest = max(len(BYTES.encode(text)) for text, _ in data.split_of("train"))
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape[1] == data.pad_to == (width or longest)
    assert (batch.input_ids[0, batch.lengths[0] :] == data.pad_id).all()


def test_a_tokenizer_is_trained_on_training_texts_alone() -> None:
    seen: list[str] = []

    def make(texts: Any) -> Any:
        seen.extend(texts)
        return BYTES

    data = module(tokenizer=make)
    assert seen == [text for text, _ in data.split_of("train")]


def test_a_second_start_reads_splits_and_tokenises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = [(f"Is {number} even?", ("even", "odd")[number % 2]) for number in range(100, 200)]
    path = write(tmp_path / "x.tsv", numbers)
    first = module(path)
    for name in ("record_store.labelled._write", "labelled_split.grouped_split", "labelled_parts.digest_of"):
        monkeypatch.setattr(f"llm_lightning.data.{name}", None)
    monkeypatch.setattr(type(BYTES), "encode_document", None)
    caplog.clear()
    second = module(path)
    assert "differ only in their digits may appear in two splits" in caplog.text
    assert (second.data_digest, second.report()) == (first.data_digest, first.report())
    batches = zip(first.train_dataloader(), second.train_dataloader(), strict=True)
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in batches)
    assert module(path, verify=True).data_digest == first.data_digest
    (rows,) = (tmp_path / "cache" / "records").glob("*-split-*/train")
    times = rows.stat()
    rows.write_bytes(rows.read_bytes()[::-1])
    os.utime(rows, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(TypeError):  # it is made again, which this test prevents
        module(path, verify=True)


# --- validation and test texts of one's own --------------------------------------------------------------------------

TRAIN = [*made_up(30, "ham"), *made_up(30, "spam"), ("Buy 5 now", "spam"), ("see you", "ham")]


def test_own_files_are_used_whole_and_nothing_is_cut_off_for_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    val = [("new one", "spam"), ("another", "spam"), ("a third", "ham")]
    hard = [("hard one", "spam"), ("hard two", "spam")]
    files = {"val_path": write(tmp_path / "val.tsv", val), "test_path": tmp_path / "test.jsonl"}
    rows = [{"Text": text, "Label": label} for text, label in made_up(3, "ham")]
    files["test_path"].write_text("\n".join(map(json.dumps, rows)))
    sets = {"hard": str(write(tmp_path / "hard.tsv", hard))}
    data = module(write(tmp_path / "x.tsv", TRAIN), **{k: str(v) for k, v in files.items()}, val_sets=sets)
    assert sorted(data.split_of("train")) == sorted(TRAIN)
    assert (data.split_of("val"), data.split_of("val/hard")) == (val, hard)
    assert data.split_of("test") == made_up(3, "ham")
    assert list(data.eval_samples) == ["val", "val/hard", "train_eval"]
    assert list(data.test_samples) == ["test"]
    said = caplog.text
    assert "val (data.val_path, used whole): 1 ham, 2 spam; " in said
    assert "val/hard (data.val_sets.hard, used whole): 0 ham, 2 spam; " in said
    assert "val/hard has no text of class ham: " in said
    assert "Not used: data.val_fraction and data.test_fraction; data.val_path and data.test_path" in said
    assert "no column 'text' (data.text_column): 'Text' is read" in said


def test_with_one_own_file_the_other_split_is_still_cut_off_and_balanced(tmp_path: Path) -> None:
    rows = made_up(100, "ham") + made_up(50, "spam")
    val = str(write(tmp_path / "val.tsv", made_up(9, "spam")))
    data = module(write(tmp_path / "x.tsv", rows), val_path=val, test_fraction=0.2)
    counts = {split: Counter(label for _, label in data.split_of(split)) for split in ("train", "val", "test")}
    assert counts == {
        "train": {"ham": 40, "spam": 40},
        "val": {"spam": 9},
        "test": {"ham": 10, "spam": 10},
    }
    everything = module(tmp_path / "x.tsv", val_path=val, balance="none")
    assert len(everything.split_of("train")) + len(everything.split_of("test")) == 150
    plain = module(tmp_path / "x.tsv", val_sets={"one": val})
    assert len(plain.split_of("val")) == 10
    assert plain.split_of("train") == module(tmp_path / "x.tsv").split_of("train")


def test_leaks_from_own_files_are_counted_exactly(tmp_path: Path) -> None:
    val = [
        ("Buy 5 now", "spam"),  # as in training
        ("Buy 5 now ", "spam"),  # but for white space at the end
        ("buy 9 now!", "spam"),  # but for case, digits and punctuation
        ("see you", "spam"),  # as in training, where it is of the other class
        ("See  you", "ham"),
        ("nowhere else", "ham"),
    ]
    hard = [("ham aa word", "ham"), ("unheard of", "ham"), (" see you", "ham")]
    own = {
        "val_path": str(write(tmp_path / "val.tsv", val)),
        "val_sets": {"hard": str(write(tmp_path / "h.tsv", hard))},
    }
    data = module(write(tmp_path / "x.tsv", TRAIN), balance="none", test_path=str(tmp_path / "x.tsv"), **own)
    leaks = data.report()["leaks"]
    assert leaks["val"] == {
        "exact": 2, "trimmed": 3, "normalized": 5, "of": 6,
        "classes": {
            "ham": {"exact": 0, "trimmed": 0, "normalized": 1, "of": 2},
            "spam": {"exact": 2, "trimmed": 3, "normalized": 4, "of": 4},
        },
    }  # fmt: skip
    ways = ("exact", "trimmed", "normalized", "of")
    assert [leaks["val/hard"][way] for way in ways] == [1, 2, 2, 3]
    assert [leaks["test"][way] for way in ways] == [62, 62, 62, 62]
    assert list(leaks) == ["val", "val/hard", "test"]


def test_labels_of_own_files_are_those_of_training(tmp_path: Path) -> None:
    numbered = [(text, str(1 + (label == "spam"))) for text, label in made_up(30, "ham") + made_up(30, "spam")]
    val = str(write(tmp_path / "val.tsv", [("x", "2.0"), ("y", "1"), ("z", "1.0")]))
    data = module(write(tmp_path / "x.tsv", numbered), val_path=val)
    assert data.split_of("val") == [("x", "2"), ("y", "1"), ("z", "1")]
    folded = str(write(tmp_path / "case.tsv", [("x", "HAM"), ("y", "Spam")]))
    data = module(write(tmp_path / "x.tsv", TRAIN), val_path=folded, fold_labels=True)
    assert [label for _, label in data.split_of("val")] == ["ham", "spam"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "spma",
            r"val.tsv:3: the label 'spma' \(2 records of data.val_path with unknown labels\) .*: ham, spam; did you ",
        ),
        ("Spam", r"val.tsv:3: the label 'Spam' .* set data.fold_labels=true"),
        ("7", r"val.tsv:3: the label '7' .*: ham, spam; correct it, or give training texts of this class"),
    ],
)
def test_a_label_that_training_does_not_have_is_named_with_its_line(tmp_path: Path, label: str, message: str) -> None:
    val = write(tmp_path / "val.tsv", [("a", "ham"), ("b", label), ("c", label)])
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "x.tsv", TRAIN), val_path=str(val))


def test_splits_of_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"train": TRAIN, "validation": TRAIN[:3], "test": TRAIN[3:5]}
    for split, part in rows.items():
        made = datasets.Dataset.from_dict({"text": [text for text, _ in part], "label": [label for _, label in part]})
        made.to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    data = module(name=None, hf_dataset=str(tmp_path / "set"), hf_val_split="validation", hf_test_split="test")
    assert (data.split_of("val"), data.split_of("test")) == (TRAIN[:3], TRAIN[3:5])
    assert len(data.split_of("train")) == len(TRAIN)
    assert data.report()["leaks"]["val"]["exact"] == 3


def test_bad_records_are_left_out_of_every_file_and_said_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = tmp_path / "x.tsv", tmp_path / "val.jsonl"
    write(train, [*TRAIN, *[("no label", "")] * 12])
    val.write_text('{"text": null, "label": "ham"}\n{"text": "good", "label": "ham"}\n')
    for _ in range(2):
        caplog.clear()
        data = module(train, val_path=str(val), bad_records="quarantine")
        assert "13 bad records left out (data.bad_records=quarantine) (the first 10): " in caplog.text
        assert f"{train}:64: the label is ''" in caplog.text
    report = data.report()
    assert report["quarantined"] == len(data.quarantined) == 13
    reason = "the label is ''; it must be a word or a number"
    assert report["quarantined_first"] == [f"{train}:{line}: {reason}" for line in range(64, 74)]
    assert data.quarantined[-1] == (f"{val}:1", "column 'text' holds NoneType, not text")
    assert data.split_of("val") == [("good", "ham")]
    assert data.report()["records"] == len(TRAIN)
    assert "quarantined" not in module().report()
    with pytest.raises(ValueError, match=r"12 bad records \(the first 10 of 12\)"):
        module(train)


@pytest.mark.slow
def test_a_run_measures_every_named_set(tmp_path: Path) -> None:
    hard = write(tmp_path / "hard.tsv", [("ham zz", "ham"), ("word ham", "spam"), ("nothing", "spam")])
    only = write(tmp_path / "only.tsv", made_up(4, "spam"))
    files = [
        f"data.path={write(tmp_path / 'x.tsv', TRAIN)}",
        f"data.val_path={write(tmp_path / 'val.tsv', [*made_up(3, 'ham'), *made_up(3, 'spam')])}",
        f"data.test_path={tmp_path / 'val.tsv'}",
        f"data.val_sets={{hard: {hard}, only-spam: {only}}}",
    ]
    settings = [word for word in WITH_PLOTS if "samples" not in word]
    folder = tmp_path / "run"
    outcome = fit_here(
        [*settings, "task=classification", *files, "monitor=val/hard/accuracy", f"hydra.run.dir={folder}"]
    )
    assert outcome.code == 0, outcome.err
    metrics, summary = read_metrics(folder / "metrics.csv"), json.loads((folder / "summary.json").read_text())
    for stage, n in (("val", 6), ("val/hard", 3), ("val/only-spam", 4)):
        _, accuracy = metrics[f"{stage}/accuracy"][-1]
        matrix = np.array(summary["confusion"][stage])
        assert matrix.sum() == n == sum(summary["data"]["splits"][stage]["classes"].values())
        assert accuracy == pytest.approx(matrix.trace() / n)
    assert summary["data"]["leaks"]["val"]["exact"] == 6
    plots = {file.name for file in (folder / "plots").iterdir()}
    assert {"val_confusion.png", "val-hard_confusion.png", "val-hard_roc.png", "val-only-spam_confusion.png"} <= plots
    assert "val-only-spam_roc.png" not in plots, "there is no curve of one class"


# --- batches ---------------------------------------------------------------------------------------------------------


def test_buckets_hold_every_sample_once_at_similar_lengths_in_the_classes_proportion() -> None:
    draw = np.random.default_rng(0)
    classes = (draw.random(1000) < 0.25).astype(int)
    lengths = draw.integers(5, 40, 1000) + 60 * classes
    order = bucketed_order(lengths.tolist(), classes.tolist(), seed=1, epoch=0)
    assert sorted(order.tolist()) == list(range(1000))
    assert not np.array_equal(order, bucketed_order(lengths.tolist(), classes.tolist(), seed=1, epoch=1))
    for size in (4, 8, 16, BUCKET):
        batches = [order[start : start + size] for start in range(0, 1000 // size * size, size)]
        spam = [classes[batch].sum() for batch in batches]
        assert max(spam) <= -(-size // 4) + 1
        if size >= 8:
            assert min(spam) >= 1
        padded = sum(len(batch) * lengths[batch[classes[batch] == 0]].max(initial=0) for batch in batches)
        plain = np.random.default_rng(2).permutation(1000).reshape(-1, 4)
        unsorted = sum(len(batch) * lengths[batch[classes[batch] == 0]].max(initial=0) for batch in plain)
        if size == 4:
            assert padded < 0.85 * unsorted


def test_a_batch_of_the_embedded_messages_has_both_classes_and_little_padding() -> None:
    data = module()
    used = real = 0
    for batch in data.train_dataloader():
        assert batch.input_ids.shape[1] % 8 == 0
        assert batch.n_targets < 8 or 0 < batch.labels.sum() < len(batch.labels)
        used += batch.input_ids.numel()
        real += int(batch.lengths.sum())
    plain = module(bucket=False)
    unsorted = sum(batch.input_ids.numel() for batch in plain.train_dataloader())
    assert real <= used < 0.95 * unsorted  # both classes in a batch cost padding


def test_evaluation_visits_every_text_once() -> None:
    data = module()
    seen = [int(i) for loader in data.test_dataloader() for batch in loader for i in batch.sample_ids]
    assert sorted(seen) == list(range(len(data.test_samples["test"])))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (made_up(30, "ham"), {}, r"all 30 records have the label 'ham'; there must be at least two"),
        (
            made_up(30, "ham") + made_up(30, "spma"),
            {"labels": ["ham", "spam"]},
            r"x.tsv:32: unknown label 'spma' \(30 records.*did you mean 'spam'\? data.labels: ham, spam",
        ),
        (
            made_up(30, "ham") + made_up(30, "spam"),
            {"labels": ["spam"]},
            r"unknown label 'ham' \(30 records with unknown labels\); data.labels: spam",
        ),
        (made_up(30, "ham") + made_up(30, "spam"), {"labels": ["ham", "spam", "ham"]}, r"names .ham. twice"),
        (
            made_up(30, "ham") + made_up(30, "spam"),
            {"labels": ["ham", "spam", "other"]},
            r"no record has the label 'other' of data.labels; leave it out",
        ),
        (
            made_up(60, "ham") + made_up(2, "spam"),
            {},
            r"the val split has no text of class 'spam'.*raise data.val_fraction",
        ),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, rows: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(write(tmp_path / "x.tsv", rows), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sms_spm"}, r"data.name=sms_spm is unknown: did you mean sms_spam\?"),
        ({"name": None}, r"give data.path=FILE"),
        ({"split": "random"}, r"data.split='random' must be grouped or book"),
        ({"split": "book"}, r"data.split=book is the book's split of data.name=sms_spam; use data.split=grouped"),
        ({"balance": "over"}, r"data.balance='over' must be undersample or none"),
        ({"val_fraction": 0.0}, r"must be positive and sum to less than 1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"sum to less than 1"),
        (
            {"val_path": "x.tsv", "test_fraction": 1.0},
            r"data.test_fraction=1.0 must be positive and sum to less than 1",
        ),
        (
            {"split": "book", "name": "sms_spam", "test_path": "x.tsv"},
            r"data.split=book cuts off its own validation and test texts; leave out data.test_path",
        ),
        ({"max_length": 0}, r"data.max_length=0 must be at least 1"),
        ({"pad_to": "longest"}, r"data.pad_to='longest' must be longest_train"),
        ({"pad_to": 0}, r"data.pad_to=0 must be at least 1"),
        ({"pad_to": 300}, r"data.pad_to=300 exceeds model.context_length=256"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


# --- the real messages -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_books_split_of_the_real_messages(data_dir: Path) -> None:
    """Sizes, ids and the longest text of the book; and how much of its test split stands in training."""
    file = data_dir / "SMSSpamCollection.tsv"
    records = list(texts_as_pandas_reads_them(file, ("label", "text"), []))
    classes = [int(record.label == "spam") for record in records]
    parts = book_split(classes, (0.1, 0.2), 123)
    assert {split: len(part) for split, part in parts.items()} == {"train": 1045, "val": 149, "test": 300}
    ham = [index for index in range(len(classes)) if classes[index] == 0]
    import pandas

    drawn = pandas.Series(ham, index=ham).sample(747, random_state=123).tolist()
    assert drawn[:5] == [4307, 4138, 4831, 4461, 5440]  # published
    used = [index for part in parts.values() for index in part]
    assert {index for index in used if classes[index] == 0} == set(drawn)
    assert sum(classes[index] for index in used) == 747

    data = module(file, name="sms_spam", split="book", tokenizer=build_tokenizer("gpt2"), pad_to="longest_train")
    report = data.report()
    assert data.pad_to == 120  # published
    assert report["splits"]["train"]["mean_tokens"] == pytest.approx(30.41, abs=0.005)
    assert (report["splits"]["val"]["most_tokens"], report["splits"]["test"]["most_tokens"]) == (71, 92)
    assert report["records"] == 5572
    assert report["records_over_several_lines"]
    leak = report["leaks"]["test"]
    assert leak["exact"] / leak["of"] == pytest.approx(0.12, abs=0.005)
    assert leak["trimmed"] / leak["of"] == pytest.approx(0.13, abs=0.005)
    spam = leak["classes"]["spam"]
    assert spam["trimmed"] / spam["of"] == pytest.approx(0.25, abs=0.02), "a quarter of the spam"


def test_the_grouped_split_of_the_real_messages_leaks_nothing(data_dir: Path) -> None:
    data = module(data_dir / "SMSSpamCollection.tsv", name="sms_spam")
    report = data.report()
    assert report["records"] == 5574
    assert report["exact_duplicates"] > 400
    assert all(report["leaks"][split][way] == 0 for split in ("val", "test") for way in ("exact", "normalized"))
    for facts in report["splits"].values():
        assert facts["classes"]["ham"] == facts["classes"]["spam"]


def test_texts_and_digest_need_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    built = module()
    monkeypatch.setattr(type(built.tokenizer), "encode_array", None)
    read = ClassificationDataModule(tokenizer=built.tokenizer, context_length=16, batch_size=4)
    read.read()
    assert read.data_digest == built.data_digest
    assert [read.split_of(name) for name in ("train", "val", "test")] == [
        built.split_of(name) for name in ("train", "val", "test")
    ]


# --- size ------------------------------------------------------------------------------------------------------------

PREPARE = """
import resource, sys
from llm_lightning.data.classification import ClassificationDataModule
from llm_lightning.tokenizers.build import build_tokenizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
data = ClassificationDataModule(
    tokenizer=build_tokenizer("byte"), context_length=128, batch_size=32, path=sys.argv[1], name=None
)
data.build()
next(iter(data.train_dataloader()))
print(peak() - before, len(data.train_samples))
"""


@pytest.mark.slow
def test_many_texts_take_little_memory(tmp_path: Path) -> None:
    """At 200,000 texts of 100 characters: as Python strings, lists and sets they took 211 MiB above the imports."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(2, 10))) for _ in range(3000)]
    with (tmp_path / "x.jsonl").open("w") as file:
        for number in range(200_000):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=15)), "label": "ab"[number % 2]}) + "\n")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "x.jsonl")]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(found[0]) < 100, "MiB"
    assert int(found[1]) == pytest.approx(140_000, rel=0.01)
