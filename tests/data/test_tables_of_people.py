"""Labelled tables as people have them: each is read whole, or refused once with the setting that reads it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_lightning.data.classification import ClassificationDataModule
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.data.records.labelled import in_order, read_labelled
from llm_lightning.tokenizers.byte import ByteTokenizer

PAIRS = [
    (f"The chair {('annoyed', 'pleased')[n % 2]} me on visit {n}", ("complaint", "praise")[n % 2]) for n in range(60)
]


class Case(NamedTuple):
    """A file, what is read of it with settings, and what is said without them."""

    content: str | bytes
    wanted: list[tuple[str, str]] = PAIRS
    refused: str | None = None
    settings: dict[str, Any] | None = None
    """that read it; None: there are none"""
    said: str | None = None


def table(
    pairs: list[tuple[str, str]] = PAIRS, header: str = "text,label", end: str = "\n", separator: str = ","
) -> str:
    return end.join([header.replace(",", separator), *(f"{text}{separator}{label}" for text, label in pairs), ""])


def renamed(**labels: str) -> list[tuple[str, str]]:
    return [(text, labels[label]) for text, label in PAIRS]


def objects(pairs: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in pairs]


def lines(pairs: list[tuple[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects(pairs))


def quoted(pairs: list[tuple[str, str]], separator: str) -> str:
    written = io.StringIO()
    csv.writer(written, delimiter=separator, lineterminator="\n").writerows([("text", "label"), *pairs])
    return written.getvalue()


SPOKEN = [(f'{text}, she said "fine"', label) for text, label in PAIRS]
CAFE = [(f"Café “{text}”", label) for text, label in PAIRS]
PARTED = [(f"{text}\u2028{text}", label) for text, label in PAIRS]
NUMBERS = renamed(complaint="0", praise="1")
FLOATS = renamed(complaint="0.0", praise="1.0")
MIXED = [(text, label if n < 30 else f"{label}.0") for n, (text, label) in enumerate(NUMBERS)]
SCALE = [(f"{text} {n}", str(n % 11)) for n, (text, _) in enumerate(PAIRS)]
IN_CASE = [(text, label.title() if n < 12 and label == "praise" else label) for n, (text, label) in enumerate(PAIRS)]

CASES = {
    "backslash_quotes.csv": Case(
        "text,label\n" + "".join(f'"She said \\"{text}\\" twice",{label}\n' for text, label in PAIRS),
        refused="line 2: quotes are not balanced .*, also where a backslash stands before it",
    ),
    "capital_header.csv": Case(table(header="Text,Label"), said="no column 'text' (data.text_column): 'Text' is read"),
    "one_other.csv": Case(table(header="message,label"), said="no column 'text' (data.text_column): 'message' is read"),
    "two_others.csv": Case(
        "label,title,message\n" + "".join(f"{label},,{text}\n" for text, label in PAIRS),
        refused=r"there is no column 'text' \(data.text_column\); there are 'label', 'title', 'message'; name it, as",
        settings={"text_column": "message"},
    ),
    "case_labels.csv": Case(
        table(IN_CASE),
        refused=r"'Praise' \(6 records\) and 'praise' \(24 records\) differ only in .* set data.fold_labels=true",
        settings={"fold_labels": True},
    ),
    "cp1252.csv": Case(
        table(CAFE).encode("cp1252"), CAFE, "set data.encoding=cp1252", {"options": {"encoding": "cp1252"}}
    ),
    "cr_only.csv": Case(table(end="\r")),
    "cr_only.tsv": Case(table(end="\r", separator="\t")),
    "empty_label.csv": Case(table([*PAIRS, ("no label here", "")]), refused="1 bad record: line 62: the label is ''"),
    "float_labels.csv": Case(table(FLOATS), FLOATS),
    "float_labels.jsonl": Case(lines([(text, float(label)) for text, label in NUMBERS]), FLOATS),
    "mixed_labels.csv": Case(table(MIXED), NUMBERS, said="labels such as 0 and 0.0 and 1 and 1.0 are one class"),
    "scale.csv": Case(table(SCALE), SCALE),
    "lines.json": Case(lines(PAIRS), said="lines.json is read as jsonl, which its content is"),
    "list_label.jsonl": Case(
        lines([(text, [label]) for text, label in PAIRS]),
        refused=r"all 60 records are bad, the first: line 1: the label is \['complaint'\]; it must be a word",
    ),
    "null_text.jsonl": Case(
        lines([*PAIRS, (None, "praise")]),  # type: ignore[list-item]
        refused="1 bad record: line 61: column 'text' holds NoneType, not text",
    ),
    "no_header.csv": Case(
        "".join(f"{label},{text}\n" for text, label in PAIRS),
        refused="or set data.header=false if the first line of a table is a record",
        settings={"options": {"header": False}, "text_column": "2", "label_column": "1"},
    ),
    "quoted.tsv": Case(quoted(SPOKEN, "\t"), SPOKEN, "set data.quotes=true, or", {"options": {"quotes": True}}),
    "reviews.csv.gz": Case(gzip.compress(table().encode())),
    "reviews.json": Case(json.dumps(objects(PAIRS))),
    "reviews_indented.json": Case(json.dumps(objects(PAIRS), indent=1)),
    "semicolon.csv": Case(
        table(separator=";"), refused="set \"data.separator=';'\"", settings={"options": {"separator": ";"}}
    ),
    "sep_line.csv": Case("sep=,\n" + table()),
    "space_quotes.csv": Case(
        '"text", "label"\n' + "".join(f'"{text}", "{label}"\n' for text, label in PAIRS),
        refused="line 1: a quotation mark stands behind a space, so that it encloses nothing; remove the spaces",
    ),
    "tabs.csv": Case(
        table(separator="\t"), refused=r"set \"data.separator='\\t'\"", settings={"options": {"separator": "\\t"}}
    ),
    "trailing_comma.csv": Case("text,label,\n" + "".join(f"{text},{label},\n" for text, label in PAIRS)),
    "with_index.csv": Case(",text,label\n" + "".join(f"{n},{one[0]},{one[1]}\n" for n, one in enumerate(PAIRS))),
    "two_unnamed.csv": Case(",,text,label\n" + "".join(f"{n},{n},{one[0]},{one[1]}\n" for n, one in enumerate(PAIRS))),
    "u2028.csv": Case(table(PARTED), PARTED),
    "unicode_text.txt": Case(table(separator="\t", end="\r\n").encode("utf-16")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_table_of_people(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    case, file = CASES[name], tmp_path / name
    file.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    settings = dict(case.settings or {})
    options = FileOptions(**settings.pop("options", {}))
    if case.refused is not None:
        with pytest.raises(ValueError, match=case.refused) as error:
            read_labelled(file)
        assert "\n" not in str(error.value)
    if case.refused is None or case.settings is not None:
        with caplog.at_level(logging.INFO):
            found = read_labelled(file, options=options, **settings)
        assert [(one.text, one.label) for one in found] == case.wanted
        assert case.said is None or caplog.text.count(case.said) == 1


def test_classes_that_are_numbers_are_in_their_order() -> None:
    assert in_order({label for _, label in SCALE}) == [str(n) for n in range(11)]


# --- other cases that failed -----------------------------------------------------------------------------------------

DATA = {"tokenizer": ByteTokenizer(), "context_length": 64, "batch_size": 4}


@pytest.mark.parametrize("how", ["list", "commas", "glob", "folder"])
def test_several_files_in_every_task(tmp_path: Path, how: str) -> None:
    """A list and a glob were a TypeError."""
    for start, name in ((0, "a.jsonl"), (30, "b.jsonl")):
        rows = [
            {"text": one.text, "label": one.label, "instruction": f"q{n}", "output": one.label}
            for n, one in list(enumerate(map(Labelled._make, PAIRS)))[start : start + 30]
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    path = {"list": files, "commas": ",".join(files), "glob": f"{tmp_path}/*.jsonl", "folder": str(tmp_path)}[how]
    classified = ClassificationDataModule(path=path, **DATA)
    classified.read()
    assert sum(len(classified.split_of(split)) for split in ("train", "val", "test")) == 60
    asked = InstructionDataModule(path=path, **DATA)
    asked.read()
    assert sum(len(asked.conversations_of(split)) for split in ("train", "val", "test")) == 60
    read = PretrainingDataModule(path=path, **DATA)
    read.build()
    assert "60 documents" in read.describe()


class Labelled(NamedTuple):
    text: str
    label: str


def test_a_text_that_was_converted_as_if_it_were_latin1(tmp_path: Path) -> None:
    """The advice was to convert UTF-16 so; what came of it was trained on, NULs and all."""
    file = tmp_path / "x.txt"
    file.write_bytes("A small fox ran home.\n".encode("utf-16").decode("latin1").encode())
    with pytest.raises(
        ValueError, match=r"x.txt looks like UTF-16 without a byte-order mark; set data.encoding=utf-16-le"
    ):
        PretrainingDataModule(path=str(file), **DATA).build()
