"""Labelled texts, read strictly from CSV, TSV, JSONL or a Hugging Face dataset.

Every record knows its place; problems are collected over the whole file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.data.reading import JSONL_SUFFIXES, BadRecords, TextFile, json_lines
from llm_lightning.terminal import counted

SUFFIXES = (".csv", ".tsv", *JSONL_SUFFIXES)


class LabelledText(NamedTuple):
    """One record."""

    text: str
    label: str
    place: str
    """file:line"""


def read_labelled(
    path: str | Path, *, text_column: str = "text", label_column: str = "label", columns: Sequence[str] | None = None
) -> list[LabelledText]:
    """Read a labelled file. No text means a missing value: "NA" and "null" are texts like others.

    Args:
        path: `.csv` (RFC 4180, with quotes), `.jsonl`, `.ndjson`; anything else is tab-separated, without quotes.
        text_column, label_column: columns or fields that are read; others are ignored.
        columns: names of the columns in a file without a header line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file; check the path (of a run: data.path)")
    if path.suffix.lower() in JSONL_SUFFIXES:
        rows: Rows = json_lines(path, (text_column, label_column))
    else:
        rows = _table_rows(path, "".join(TextFile(path)), columns, quoted=path.suffix.lower() == ".csv")
    return _collected(path, rows, text_column, label_column)


def read_like_pandas(path: str | Path, columns: Sequence[str]) -> tuple[list[LabelledText], list[str]]:
    """Read a tab-separated file as `pandas.read_csv(path, sep="\\t", header=None)` does, quotes and all.

    A text that begins with a quotation mark then goes on, over line ends, to the next one.

    Returns:
        the records, and the places of those that span several lines of the file.
    """
    import pandas

    path = Path(path)
    frame = pandas.read_csv(path, sep="\t", header=None, names=list(columns), keep_default_na=False, dtype=str)
    records, merged, line = [], [], 1
    for row in frame.to_dict("records"):
        n_lines = 1 + str(row["text"]).count("\n")
        records.append(LabelledText(row["text"], row["label"], f"{path}:{line}"))
        if n_lines > 1:
            merged.append(f"{path}:{line}-{line + n_lines - 1}")
        line += n_lines
    return records, merged


def read_hugging_face(dataset: HubDataset, text_column: str, label_column: str) -> list[LabelledText]:
    """Read a dataset of the hub, through the cache; a class index becomes the name that the dataset gives it.

    Raises:
        ValueError: if the dataset, its split or a column cannot be read.
    """
    columns = (text_column, label_column)
    rows = json_lines(hugging_face_file(dataset, columns), columns)
    return _collected(Path(dataset.name) / dataset.split, rows, *columns)


Rows = Iterator[tuple[int, Any, "str | None"]]
"""(line, record, what is wrong with it)"""


def _collected(path: Path, rows: Rows, text_column: str, label_column: str) -> list[LabelledText]:
    records: list[LabelledText] = []
    bad = BadRecords()
    for line, record, wrong in rows:
        reason = wrong or _problem(record, text_column, label_column)
        if reason is not None:
            bad.add(f"line {line}", reason)
        else:
            records.append(LabelledText(str(record[text_column]), _label(record[label_column]), f"{path}:{line}"))
    bad.refuse(path)
    if not records:
        raise ValueError(f"{path} holds no records; give a file with a text and a label in each line")
    return records


def _problem(record: Mapping[str, Any], text_column: str, label_column: str) -> str | None:
    for setting, column in (("data.text_column", text_column), ("data.label_column", label_column)):
        if column not in record:
            return f"no column {column!r} ({setting}); there are {', '.join(map(repr, record)) or 'none'}"
    text, label = record[text_column], record[label_column]
    if not isinstance(text, str):
        return f"column {text_column!r} holds {type(text).__name__}, not text"
    if not text.strip():
        return "the text is empty"
    if "\0" in text:
        return "the text holds a NUL byte; is the file damaged, or UTF-16?"
    if not isinstance(label, (str, int, bool)) or not _label(label):
        return f"the label is {label!r}; it must be a word or a whole number"
    return None


def _label(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _table_rows(path: Path, text: str, columns: Sequence[str] | None, *, quoted: bool) -> Rows:
    rows = _quoted(text) if quoted else _tabbed(text)
    names = list(columns) if columns else None
    for number, cells, wrong in rows:
        if wrong is not None:
            yield number, None, wrong
        elif names is None:
            names = [cell.strip() for cell in cells]
            if len(set(names)) < len(names):
                raise ValueError(f"{path}, line {number}: a column occurs twice in the header: {', '.join(names)}")
        elif len(cells) != len(names):
            what = "more" if len(cells) > len(names) else "fewer"
            yield number, None, f"{counted(len(cells), 'column')}, {what} than the {len(names)} of the header"
        else:
            yield number, dict(zip(names, cells, strict=True)), None


def _tabbed(text: str) -> Iterator[tuple[int, list[str], str | None]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r").split("\t"), None


def _quoted(text: str) -> Iterator[tuple[int, list[str], str | None]]:
    before = csv.field_size_limit(1 << 30)  # a text may exceed 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells, None
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, [], f"quotes are not balanced from here on ({error}); double a quotation mark inside quotes"
    finally:
        csv.field_size_limit(before)
