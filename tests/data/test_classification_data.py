"""Splits, balance, leaks and batches of labelled texts; the book's own split of the real messages."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_lightning.data.classification import (
    NAMED,
    ClassificationDataModule,
)
from llm_lightning.data.leaks import leaked_texts
from llm_lightning.data.order import BUCKET, bucketed_order
from llm_lightning.data.records.labelled import read_labelled, read_like_pandas
from llm_lightning.data.splits import book_split, grouped_split, normalized, undersampled
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
    assert parts == grouped_split(keys, classes, (0.1, 0.2), seed=5)
    assert parts != grouped_split(keys, classes, (0.1, 0.2), seed=6)


def test_one_large_group_does_not_end_in_the_test_split() -> None:
    keys = ["same"] * 40 + [f"key {i}" for i in range(60)]
    parts = grouped_split(keys, [0] * 100, (0.1, 0.2), seed=0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "val": 10, "test": 20}
    assert set(range(40)) <= set(parts["train"])


def test_undersampling_keeps_the_order_and_all_of_the_smallest_class() -> None:
    classes = [0] * 30 + [1] * 7 + [2] * 11
    part = np.random.default_rng(1).permutation(48).tolist()
    kept = undersampled(part, classes, seed=3)
    assert Counter(classes[index] for index in kept) == {0: 7, 1: 7, 2: 7}
    assert {index for index in part if classes[index] == 1} <= set(kept)
    assert kept == [index for index in part if index in set(kept)]


def test_leaks_by_hand() -> None:
    texts = {"train": [("win", 1), ("hello ", 0)], "val": [("new", 0)], "test": [("win", 1), ("hello", 0), ("WIN!", 1)]}
    found = leaked_texts(texts, ["ham", "spam"])["test"]
    assert (found["exact"], found["trimmed"], found["normalized"], found["of"]) == (1, 2, 3, 3)
    assert found["classes"] == {
        "ham": {"exact": 0, "trimmed": 1, "normalized": 1, "of": 1},
        "spam": {"exact": 1, "trimmed": 1, "normalized": 2, "of": 2},
    }


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


def test_the_books_split_of_the_real_messages(data_dir: Path) -> None:
    """Sizes, ids and the longest text of the book; and how much of its test split stands in training."""
    file = data_dir / "SMSSpamCollection.tsv"
    records, _ = read_like_pandas(file, ("label", "text"))
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
