"""Texts that a model is asked about: the lines of files of text, or a column of files of records."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llm_lightning.data.files.bad_records import BadRecords, checked_text
from llm_lightning.data.files.find import Found, PathWords, find_files
from llm_lightning.data.files.form import FileForm, form_of
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.files.rows import FileRow, rows_of_files
from llm_lightning.data.files.text import TextFile

log = logging.getLogger(__name__)


class Line(NamedTuple):
    """A line of a text."""

    text: str
    """without its end"""
    place: str
    """`file, line 12`"""


def lines_of(path: PathWords, options: FileOptions) -> Iterator[Line]:
    """Read the lines of files of text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file holds records, or what is no text.
    """
    for file in find_files(path).files:
        form = form_of(file, asked=options.format, encoding=options.encoding)
        if form.form != "text":
            raise ValueError(
                f"{file} holds records ({form.form}), not one text a line; data.format=text takes its lines as they are"
            )
        yield from _lines(file, form)


def texts_of(path: PathWords, options: FileOptions, *, column: str, label_column: str = "label") -> list[str]:
    """Read texts: one in each line of files of text, or in a column of files of records of any form.

    A file of text whose first line names the column between tabs is a table.

    Args:
        column: that holds the text; where there is none of that name, see `_column`.
        label_column: holds no text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong.
    """
    found = find_files(path)
    if not all(_has_lines(file, options, column) for file in found.files):
        return _column_of(found, options, column, label_column)
    texts = []
    for line in lines_of(path, options):
        if not line.text.strip():
            raise ValueError(f"{line.place} is empty; every line is one text")
        texts.append(line.text)
    return texts


def _lines(file: Path, form: FileForm) -> Iterator[Line]:
    for number, line in enumerate(TextFile(file, form).lines(), start=1):
        yield Line(line.removesuffix("\n"), f"{file}, line {number}")


def _has_lines(file: Path, options: FileOptions, column: str) -> bool:
    if file.is_dir():  # saved by `datasets`
        return False
    form = form_of(file, asked=options.format, encoding=options.encoding)
    if form.form != "text":
        return False
    first = next(_lines(file, form), Line("", ""))
    return column not in first.text.split(options.separator or "\t") or column == first.text


def _column_of(found: Found, options: FileOptions, column: str, label_column: str) -> list[str]:
    rows = list(rows_of_files(found, options, fields=(column,)))
    name = _column(found.label, rows, column, label_column)
    texts, bad = [], BadRecords()
    for row in rows:
        try:
            if row.wrong is not None:
                raise ValueError(row.wrong)
            texts.append(checked_text(row.record, name))
        except ValueError as error:
            bad.add(row.short, error)
    bad.refuse(found.label, n_records=len(rows))
    if not rows:
        raise ValueError(f"{found.label} holds no records; give a file with a text in each")
    return texts


def _column(source: str, rows: Sequence[FileRow], wanted: str, label_column: str) -> str:
    """The wanted column, one that differs in case, or the only one that is there beside the labels.

    Raises:
        ValueError: if there is no such column, said once for all records.
    """
    there = list(dict.fromkeys(name for row in rows if row.wrong is None for name in row.record))
    same = [name for name in there if name.casefold() == wanted.casefold()]
    others = [name for name in there if name.casefold() != label_column.casefold()]
    if wanted in there or not there:
        return wanted
    if len(same) == 1 or (len(others) == 1 and wanted == "text"):  # no column was typed
        name = (same or others)[0]
        log.info("%s: no column %r (data.text_column): %r is read", source, wanted, name)
        return name
    raise ValueError(
        f"{source}: there is no column {wanted!r} (data.text_column); there are {', '.join(map(repr, there))}; name "
        f"it, as data.text_column={(others or there)[0]}, or set data.header=false if the first line of a table is a "
        "record"
    )
