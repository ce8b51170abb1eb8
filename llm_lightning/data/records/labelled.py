"""Labelled texts: a text and a class in each record of a table, of JSON, of parquet or of a dataset of the hub.

Every record knows its place; problems are collected over the whole source, and what concerns all records is said once.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.find import Found, words
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import FileRow
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.records.rows import Source, open_records
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted

SETTINGS = {"text": "data.text_column", "label": "data.label_column"}
LOOKED_AT = 1000
"""Records in which both columns are looked for before all are."""

log = logging.getLogger(__name__)


class LabelledText(NamedTuple):
    """One record."""

    text: str
    label: str
    place: str
    """file:line"""


@dataclass(frozen=True)
class LabelledReading:
    """How labelled texts are read. No text means a missing value: "NA" and "null" are texts like others.

    Args:
        options: how files are read.
        text_column, label_column: columns or fields that are read; others are ignored.
        columns: names of the columns of a table without a header line.
        fold_labels: take labels that differ only in case for one.
    """

    options: FileOptions = AS_THEY_ARE
    text_column: str = "text"
    label_column: str = "label"
    columns: tuple[str, ...] | None = None
    fold_labels: bool = False

    @property
    def wanted(self) -> dict[str, str]:
        return {"text": self.text_column, "label": self.label_column}


def read_labelled(source: Source, *, bad: BadRecords | None = None, **reading: Any) -> list[LabelledText]:
    """Read labelled texts into memory.

    Args:
        source: files of records of any form, or a dataset of the hub.
        bad: what is wrong is added here, and refused or left out by its policy; default: refused.
        reading: see `LabelledReading`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    notes: list[str] = []
    records = list(labelled_texts(source, LabelledReading(**reading), bad or BadRecords(), notes))
    new = one_spelling(source, Counter(record.label for record in records), notes)
    for note in notes:
        log.info(note)
    return [record._replace(label=new.get(record.label, record.label)) for record in records] if new else records


def labelled_texts(
    source: Source, reading: LabelledReading, bad: BadRecords, notes: list[str], *, found: Found | None = None
) -> Iterator[LabelledText]:
    """The records of a source, one at a time; see `read_labelled`.

    Args:
        notes: what a reader should know is added here, a line each.
        found: its files, where they are known.
    """
    name, rows, chosen = _open(source, reading, notes, found)
    n_rows = 0
    for row in tqdm(rows, desc="reading", unit=" records", disable=None, delay=1):
        n_rows += 1
        reason = row.wrong or _problem(row.record, chosen)
        if reason is not None:
            bad.add(row.short, reason, row.place)
            continue
        text, label = row.record[chosen["text"]], _label(row.record[chosen["label"]])
        yield LabelledText(text, label.casefold() if reading.fold_labels else label, row.place)
    bad.refuse(name, n_records=n_rows)
    if not n_rows:
        raise ValueError(f"{name} holds no records; give a file with a text and a label in each line")


def texts_as_pandas_reads_them(path: str | Path, columns: Sequence[str], merged: list[str]) -> Iterator[LabelledText]:
    """The records of `pandas.read_csv(path, sep="\\t", header=None)`, quotes and all.

    A text that begins with a quotation mark then goes on, over line ends, to the next one.

    Args:
        merged: the places of records that span several lines of the file are added here.
    """
    import pandas

    path = Path(path)
    frame = pandas.read_csv(path, sep="\t", header=None, names=list(columns), keep_default_na=False, dtype=str)
    line = 1
    for row in frame.to_dict("records"):
        n_lines = 1 + str(row["text"]).count("\n")
        yield LabelledText(row["text"], row["label"], f"{path}:{line}")
        if n_lines > 1:
            merged.append(f"{path}:{line}-{line + n_lines - 1}")
        line += n_lines


def _open(
    source: Source, reading: LabelledReading, notes: list[str], found: Found | None
) -> tuple[str, Iterator[FileRow], dict[str, str]]:
    """(name of the source, its rows, columns to read)."""
    wanted = reading.wanted
    fields = list(wanted.values())
    opened = partial(open_records, source, reading.options, fields=fields, columns=reading.columns, found=found)
    name, rows = opened()
    first = list(islice(rows, LOOKED_AT))
    there = _columns_of(first)
    rows = chain(first, rows)
    if len(first) == LOOKED_AT and not set(wanted.values()) <= there.keys():
        there = _columns_of(rows)  # another column is taken only if no record has the wanted one
        _, rows = opened()
    return name, rows, _chosen_columns(name, list(there), wanted, notes)


def _columns_of(rows: Iterable[FileRow]) -> dict[str, None]:
    """The names of all columns, in the order in which they first occur."""
    return {name: None for row in rows if row.wrong is None for name in row.record}


def _chosen_columns(source: str, there: Sequence[str], wanted: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """The columns to read: the wanted ones, one that differs in case, or the only one that is left.

    Raises:
        ValueError: if there is no such column, said once for all records.
    """
    chosen = {what: name for what, name in wanted.items() if name in there}
    for what, name in wanted.items():
        same = [one for one in there if one.casefold() == name.casefold()]
        if what not in chosen and len(same) == 1:
            chosen[what] = same[0]
    missing = [what for what in wanted if what not in chosen]
    left = [name for name in there if name not in chosen.values()]
    if len(missing) == len(left) == 1 and chosen and wanted[missing[0]] == missing[0]:  # no column was typed
        chosen[missing[0]] = left[0]
        missing = []
    if missing and there:
        what = " and ".join(f"{wanted[one]!r} ({SETTINGS[one]})" for one in missing)
        hint = "" if len(missing) == 2 else did_you_mean(wanted[missing[0]], left, "{!r}")
        raise ValueError(
            f"{source}: there is no column {what}; {hint}there are {', '.join(map(repr, there))}; name it, as "
            f"{SETTINGS[missing[0]]}={left[0] if left else there[0]}, or set data.header=false if the first line of a "
            "table is a record"
        )
    for what, name in chosen.items():
        if name != wanted[what]:
            notes.append(f"{source}: no column {wanted[what]!r} ({SETTINGS[what]}): {name!r} is read")
    return {**wanted, **chosen}


def _problem(record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    for what, column in columns.items():
        if column not in record:
            return f"no column {column!r} ({SETTINGS[what]}); there are {', '.join(map(repr, record)) or 'none'}"
    text, label = record[columns["text"]], record[columns["label"]]
    if not isinstance(text, str):
        return f"column {columns['text']!r} holds {type(text).__name__}, not text"
    if not text.strip():
        return "the text is empty"
    if "\0" in text:
        return "the text holds a NUL byte; is the file damaged, or UTF-16?"
    if not isinstance(label, (str, int, float)) or not _label(label):
        return f"the label is {label!r}; it must be a word or a number"
    return None


def _label(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def one_spelling(source: Source, counts: Mapping[str, int], notes: list[str]) -> dict[str, str]:
    """New names of labels, so that 1 and 1.0 become one; for `notes` see `labelled_texts`.

    Args:
        counts: label -> its number of records.

    Raises:
        ValueError: if labels differ only in their case.
    """
    name = source.name if isinstance(source, HubDataset) else ", ".join(words(source))
    folded: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        folded[label.casefold()].append(label)
    in_case = next((labels for labels in folded.values() if len(labels) > 1), None)
    if in_case is not None:
        spelled = " and ".join(f"{label!r} ({counted(counts[label], 'record')})" for label in in_case)
        raise ValueError(
            f"{name}: the labels {spelled} differ only in their case; set data.fold_labels=true to take them for one"
        )
    whole = {label: number for label in counts if (number := whole_number(label)) is not None}
    twice = {number for number, n in Counter(whole.values()).items() if n > 1}
    new = {label: number for label, number in whole.items() if number in twice}
    if new:
        notes.append(f"{name}: labels such as {' and '.join(sorted(new))} are one class")
    return new


def whole_number(label: str) -> str | None:
    """`1` for 1, 1.0 and 1.00; None for what is no whole number."""
    try:
        number = float(label)
    except ValueError:
        return None
    return str(int(number)) if number.is_integer() else None


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their indices: numbers by value, else by the alphabet."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)
