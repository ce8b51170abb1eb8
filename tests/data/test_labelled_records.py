"""Labelled files are read strictly: every record intact, or one error that names file, line and remedy."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.record_store.labelled import open_labelled
from llm_lightning.data.records.labelled import LabelledReading, read_labelled, texts_as_pandas_reads_them
from llm_lightning.data.splits import normalized


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(path: Path, **options: object) -> list[tuple[str, str]]:
    return [(record.text, record.label) for record in read_labelled(path, **options)]  # type: ignore[arg-type]


def test_words_that_look_like_missing_values_are_texts(tmp_path: Path) -> None:
    words = ["NA", "null", "NaN", "None", "N/A", "-", "1e5", "007"]
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        content = f"text{separator}label\n" + "".join(f"{word}{separator}a\n" for word in words)
        assert pairs(put(tmp_path / name, content)) == [(word, "a") for word in words]


def test_a_tsv_has_no_quotes_and_keeps_spaces(tmp_path: Path) -> None:
    rows = [('"unbalanced', "a"), (" leading and trailing ", "b"), ('say ""this""', "a"), ("a, b", "b")]
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    assert pairs(put(tmp_path / "x.tsv", content)) == rows
    windows = put(tmp_path / "crlf.tsv", content.replace("\n", "\r\n"))
    assert pairs(windows) == rows


def test_csv_as_the_standard_library_writes_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    letters = "ab ,\"\n\r;\t\u00e9\U0001f600'"
    rows = [("".join(draw.choices(letters, k=draw.randrange(1, 20))) + "x", draw.choice("yz")) for _ in range(500)]
    written = io.StringIO(newline="")
    writer = csv.writer(written)
    writer.writerows([("text", "label"), *rows])
    file = put(tmp_path / "x.csv", written.getvalue())
    assert pairs(file, options=FileOptions(newlines="keep")) == rows
    assert pairs(file) == [(text.replace("\r\n", "\n").replace("\r", "\n"), label) for text, label in rows]


def test_jsonl_with_labels_of_any_plain_kind(tmp_path: Path) -> None:
    records = [("a\nb", "x"), ("b", 3), ("c", True)]
    content = "\n\n".join(json.dumps({"body": text, "kind": label, "other": [1]}) for text, label in records)
    found = pairs(put(tmp_path / "x.jsonl", content), text_column="body", label_column="kind")
    assert found == [("a\nb", "x"), ("b", "3"), ("c", "true")]


def test_other_columns_and_the_place_of_each_record(tmp_path: Path) -> None:
    file = put(tmp_path / "x.csv", 'id,label,text\n1,a,"two\nlines"\n2,b,one\n')
    assert [record.place for record in read_labelled(file)] == [f"{file}:2", f"{file}:4"]


def test_a_byte_order_mark_belongs_to_no_column(tmp_path: Path) -> None:
    assert pairs(put(tmp_path / "x.csv", "\ufefftext,label\nhello,a\n")) == [("hello", "a")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "txt,lbl\na,b\n", r"no column 'text' \(data.text_column\) and"),
        ("x.tsv", "text\tlabel\na\tb\tc\n", r"line 2: 3 columns, more than the 2 of the header"),
        ("x.tsv", "text\tlabel\nok\ta\nonly\n", r"line 3: 1 column, fewer than the 2"),
        ("x.csv", 'text,label\nok,a\n"open,b\n', r"line 3: quotes are not balanced"),
        ("x.csv", "text,text\na,b\n", r"line 1: the column 'text' occurs twice"),
        ("x.tsv", "text\tlabel\n  \ta\n", r"line 2: the text is empty"),
        ("x.tsv", "text\tlabel\na\0b\ta\n", r"line 2: the text holds a NUL byte"),
        ("x.tsv", "text\tlabel\na\t\n", r"line 2: the label is ''"),
        ("x.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', r"line 2: not JSON"),
        ("x.jsonl", '["a"]\n', r"line 1: a JSON list, not an object"),
        ("x.jsonl", '{"text": 3, "label": "x"}\n', r"line 1: column 'text' holds int, not text"),
        ("x.jsonl", '{"text": "a", "label": [1]}\n', r"line 1: the label is \[1\]"),
        ("x.jsonl", '{"text": "a", "text": "b", "label": "x"}\n', r"line 1: field 'text' occurs twice"),
        ("x.csv", "text,label\n", r"holds no records"),
        ("x.csv", "", r"holds no"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = put(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_labelled(file)
    assert str(file) in str(error.value)


def test_all_bad_lines_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    file = put(tmp_path / "x.tsv", "text\tlabel\na\tb\n" + "x\n" * 25)
    with pytest.raises(ValueError, match=r"25 bad records \(the first 10 of 25\)") as error:
        read_labelled(file)
    assert str(error.value).count("line ") == 10


@pytest.mark.parametrize(("name", "place"), [("empty_label.csv", "line 62"), ("null_text.jsonl", "line 61")])
def test_the_cases_with_bad_records_read_with_quarantine(data_dir: Path, name: str, place: str) -> None:
    folder = data_dir.parent / "cases" / "cls_formats"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    wanted = dict(line.split("\t")[:2] for line in (folder / "wanted.tsv").read_text().splitlines())
    bad = BadRecords("quarantine")
    found = read_labelled(folder / name, bad=bad)
    assert (len(found) + 1, len(bad.quarantined)) == (int(wanted[name]), 1)
    assert bad.quarantined[0].place == f"{folder / name}:{place.removeprefix('line ')}"
    assert {record.label for record in found} == {"praise", "complaint"}


def test_a_store_gives_the_texts_labels_keys_and_places_of_the_records(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = ["a", "A!", " \u00e9", "\U0001f600", "7 ", "9"]
    for name in ("x.jsonl", "y.jsonl"):
        rows = [
            {"text": "".join(draw.choices(words, k=5)) + "x", "label": draw.choice(["1", "1.0", "2"])}
            for _ in range(60)
        ]
        put(tmp_path / name, "\n".join(map(json.dumps, rows)))
    files = [str(tmp_path / name) for name in ("x.jsonl", "y.jsonl")]
    records = read_labelled(files)
    for _ in range(2):
        store = open_labelled(files, LabelledReading())
        assert list(store.texts()) == [record.text for record in records]
        assert [store.labels[code] for code in store.codes] == [record.label for record in records]
        assert store.counts() == Counter(record.label for record in records)
        assert store.first_place("2") == next(record.place for record in records if record.label == "2")
        assert len(store.notes) == 1
        assert "labels such as 1 and 1.0 are one class" in store.notes[0]
        ways = {"exact": str, "trimmed": str.strip, "normalized": normalized}
        for way, form in ways.items():
            found = [bytes(key) for key in getattr(store.keys, way)]
            alike = [form(record.text) for record in records]
            assert [found.index(key) for key in found] == [alike.index(text) for text in alike], way


def test_a_store_is_made_again_when_files_or_settings_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "x.jsonl", '{"text": "one", "label": "A"}\n{"text": "two", "label": "b"}\n')
    first = open_labelled(str(file), LabelledReading())
    assert open_labelled(str(file), LabelledReading(fold_labels=True)).labels == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr("llm_lightning.data.record_store.labelled._write", None)  # nothing is written again
        assert open_labelled(str(file), LabelledReading()).folder == first.folder
    put(file, '{"text": "1st", "label": "A"}\n{"text": "two", "label": "b"}\n')
    assert list(open_labelled(str(file), LabelledReading()).texts()) == ["1st", "two"]


@pytest.mark.parametrize("looked_at", [2, 1000])
def test_the_columns_are_chosen_by_all_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: int) -> None:
    monkeypatch.setattr("llm_lightning.data.records.labelled.LOOKED_AT", looked_at)
    rows = [{"Text": f"text {n}", "label": "ab"[n % 2]} for n in range(5)]
    file = put(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    assert pairs(file) == [(row["Text"], row["label"]) for row in rows]
    put(file, "\n".join(map(json.dumps, [*rows, {"text": "here", "label": "a"}])))
    with pytest.raises(ValueError, match=r"5 bad records: line 1: no column 'text' \(data.text_column\)"):
        read_labelled(file)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: byte 14 \(0xe9\)"):
        read_labelled(put(tmp_path / "x.tsv", b"text\tlabel\ncaf\xe9\ta\n"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv does not exist .*; check .*data\.path"):
        read_labelled(tmp_path / "nowhere.csv")


def test_a_hugging_face_set_by_its_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["bad", "good"], "label": [0, 1]}, features=features)
    made.to_parquet(str(tmp_path / "set" / "train.parquet"))
    found = read_labelled(HubDataset(str(tmp_path / "set")))
    assert [(record.text, record.label) for record in found] == [("bad", "neg"), ("good", "pos")]


def test_reading_as_pandas_does_merges_quoted_lines(tmp_path: Path) -> None:
    file = put(tmp_path / "x.tsv", 'a\tone\nb\t"two\na\tthree"\nb\tNA\n')
    merged: list[str] = []
    records = list(texts_as_pandas_reads_them(file, ("label", "text"), merged))
    assert [(record.label, record.text) for record in records] == [("a", "one"), ("b", "two\na\tthree"), ("b", "NA")]
    assert merged == [f"{file}:2-3"]
    assert [record.place for record in records] == [f"{file}:{line}" for line in (1, 2, 4)]


@pytest.mark.slow
def test_all_messages_of_the_real_file(data_dir: Path) -> None:
    file = data_dir / "SMSSpamCollection.tsv"
    strict = read_labelled(file, columns=("label", "text"))
    assert len(strict) == 5574
    assert sum(record.label == "spam" for record in strict) == 747
    by_hand = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    assert [[record.label, record.text] for record in strict] == by_hand
    merged: list[str] = []
    lenient = list(texts_as_pandas_reads_them(file, ("label", "text"), merged))
    assert len(lenient) == 5572
    assert sum(place.count("-") for place in merged) >= 1
