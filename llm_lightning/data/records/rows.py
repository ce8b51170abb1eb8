"""Rows of a file or a hub dataset, and records made of them; problems are collected over all rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.find import Found, PathWords, find_files
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import RECORD_FORMS, FileRow, rows_of_files
from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.terminal import counted

Source = PathWords | HubDataset
"""`data.path` (see `find_files`) or a dataset of the hub."""

log = logging.getLogger(__name__)

SKIPPED = "skipped"
"""Key of a count: records that are left out on purpose."""
NOT_READ = "not read: "
"""Begins the key of a count: records with a field that is not read."""


class RecordForm(Protocol):
    """How a record becomes a conversation: a frozen dataclass of settings, which can be called."""

    needed: ClassVar[str]
    """in each record, for error messages"""
    version: ClassVar[int]
    """is raised when the same record becomes another conversation"""

    def __call__(self, record: Mapping[str, Any], place: str, counts: Counter[str]) -> Conversation:
        """Make the conversation of a record.

        Args:
            counts: what is changed, left out or not read is counted here, under words for a reader; see `lines_of`.

        Raises:
            ValueError: with what is wrong.
            SkippedError: if the record is left out on purpose.
        """
        ...


class SkippedError(Exception):
    """A record that is left out on purpose."""


def open_records(
    source: Source,
    options: FileOptions,
    *,
    fields: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    found: Found | None = None,
) -> tuple[str, Iterator[FileRow]]:
    """The name of a source, and its rows; a dataset of the hub is read through the cache.

    Args:
        fields: that matter; see `json_line_rows`.
        columns: names of the columns of tables without a header.
        found: the files of the source, where they are known.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the dataset cannot be read.
    """
    found = found or files_of(source, fields)
    if not isinstance(source, HubDataset):
        return found.label, rows_of_files(found, options, fields=fields, columns=columns)
    rows = rows_of_files(found, AS_THEY_ARE, fields=fields or ())
    return source.name, (_of_hub(row, f"{source.name}/{source.split}") for row in rows)


def files_of(source: Source, fields: Sequence[str] | None = None) -> Found:
    """The files of a source; a dataset of the hub is one file of the cache.

    Args:
        fields: of the dataset that matter; None: all.
    """
    if isinstance(source, HubDataset):
        return Found(source.name, [hugging_face_file(source, tuple(fields or ()))])
    return find_files(source, RECORD_FORMS)


def _of_hub(row: FileRow, name: str) -> FileRow:
    """The place of a row in its dataset, from 0."""
    number = int(row.short.split()[-1]) - 1
    return row._replace(place=f"{name}: row {number}", short=f"row {number}")


def collected(source: Source, options: FileOptions, form: RecordForm) -> tuple[list[Conversation], int]:
    """Make a conversation of every record of a source.

    Returns:
        the conversations, and the number of records skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    label, rows = open_records(source, options)
    bad, counts = BadRecords(), Counter[str]()
    made = list(conversations(rows, form, bad, counts))
    bad.refuse(label, n_records=len(made) + counts[SKIPPED] + bad.n)
    for line in lines_of(counts):
        log.info("%s: %s", label, line)
    if not made:
        raise ValueError(f"{label} holds no records; give a file with {form.needed} in each")
    return made, counts[SKIPPED]


def conversations(
    rows: Iterable[FileRow], form: RecordForm, bad: BadRecords, counts: Counter[str]
) -> Iterator[Conversation]:
    """The conversations of rows, one by one; what is wrong goes to `bad`, what is changed or left out to `counts`."""
    for row in rows:
        try:
            if row.wrong is not None:
                raise ValueError(row.wrong)
            yield form(row.record, row.place, counts)
        except SkippedError:
            counts[SKIPPED] += 1
        except ValueError as error:
            bad.add(row.short, error, row.place)


def lines_of(counts: Counter[str]) -> Iterator[str]:
    """What a reader should know of the counts of a form: what was changed or left out, and in one line, what unread."""
    unread = {name.removeprefix(NOT_READ): n for name, n in counts.items() if name.startswith(NOT_READ)}
    for name, n in counts.items():
        if name != SKIPPED and not name.startswith(NOT_READ):
            yield f"{name}: {n:,}"
    if unread:
        by_number = sorted(unread.items(), key=lambda item: -item[1])
        yield NOT_READ + ", ".join(f"{name} ({counted(n, 'record')})" for name, n in by_number)
