"""Records of files of any form, one after the other.

data.path -> find_files -> form_of each -> json_array, json_lines, table, columnar -> FileRow
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.files.columnar import parquet_rows, saved_rows
from llm_lightning.data.files.find import Found
from llm_lightning.data.files.form import FileForm, form_of
from llm_lightning.data.files.json_array import json_array_rows
from llm_lightning.data.files.json_lines import json_line_rows
from llm_lightning.data.files.line_ends import say_changed, with_lf
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.files.row import Row
from llm_lightning.data.files.table import table_rows
from llm_lightning.data.files.text import TextFile

RECORD_FORMS = ("json", "jsonl", "csv", "tsv", "parquet")


class FileRow(NamedTuple):
    """A record of a file, or what is wrong with it."""

    record: Any
    wrong: str | None
    place: str
    """`file:12`, or `file, record 12` where records do not begin on lines of their own"""
    short: str
    """`line 12`; with the name of the file where there are several"""


def rows_of_files(
    found: Found, options: FileOptions, *, fields: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> Iterator[FileRow]:
    """Read all records of all files.

    Args:
        fields: see `json_line_rows`.
        columns: names of the columns of tables without a header.

    Raises:
        ValueError: if a file is of no form with records, or is broken beyond single records.
    """
    for file in found.files:
        prefix = f"{file.name}, " if len(found.files) > 1 else ""
        for place, record, wrong, may_hold_cr in _rows_of(file, options, fields, columns):
            full = f"{file}:{place[5:]}" if place.startswith("line ") else f"{file}, {place}"
            if may_hold_cr and wrong is None and options.newlines == "lf" and (new := with_lf(record)) is not record:
                say_changed(file)
                record = new
            yield FileRow(record, wrong, full, prefix + place)


def _rows_of(
    file: Path, options: FileOptions, fields: Sequence[str] | None, columns: Sequence[str] | None
) -> Iterable[Row]:
    if file.is_dir():
        return saved_rows(file)
    form = form_of(file, asked=options.format, encoding=options.encoding)
    if form.form == "json":
        return json_array_rows(file, form)
    if form.form == "jsonl":
        return json_line_rows(file, form, fields)
    if form.form == "parquet":
        return parquet_rows(file, form)
    if form.form == "text":
        _refuse_running_text(file, form, options)
    return table_rows(file, form, options, columns)


def _refuse_running_text(file: Path, form: FileForm, options: FileOptions) -> None:
    """A text without a known suffix may be a table with tabs, as the SMS Spam Collection is."""
    separator = options.separator or "\t"
    first = next(iter(TextFile(file, form).lines()), "")
    if separator not in first and first.strip():
        raise ValueError(
            f"{file} is running text: its first line has no tab between columns; give records as .jsonl, .json, .csv, "
            ".tsv or parquet, or say the form with data.format"
        )
