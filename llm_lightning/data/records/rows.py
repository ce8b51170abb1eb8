"""Rows of a file or a hub dataset, and records made of them; problems are collected over all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.find import Found, PathWords, find_files
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import RECORD_FORMS, FileRow, rows_of_files
from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.data.templates.conversation import Conversation

Source = PathWords | HubDataset
"""`data.path` (see `find_files`) or a dataset of the hub."""


SKIPPED = "skipped"
"""Key of a count: records that are left out on purpose."""


class RecordForm(Protocol):
    """How a record becomes a conversation: a frozen dataclass of settings, which can be called."""

    needed: ClassVar[str]
    """in each record, for error messages"""

    def __call__(self, record: Mapping[str, Any], place: str, counts: Counter[str]) -> Conversation:
        """Make the conversation of a record.

        Args:
            counts: what is changed is counted here, under words for a reader.

        Raises:
            ValueError: with what is wrong.
            SkippedError: if the record is left out on purpose.
        """
        ...


class SkippedError(Exception):
    """A record that is left out on purpose."""


def open_records(
    source: Source, options: FileOptions, *, fields: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> tuple[str, Iterator[FileRow]]:
    """The name of a source, and its rows; a dataset of the hub is read through the cache.

    Args:
        fields: that matter; see `json_line_rows`.
        columns: names of the columns of tables without a header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the dataset cannot be read.
    """
    if not isinstance(source, HubDataset):
        found = find_files(source, RECORD_FORMS)
        return found.label, rows_of_files(found, options, fields=fields, columns=columns)
    file = hugging_face_file(source, tuple(fields or ()))
    rows = rows_of_files(Found(source.name, [file]), AS_THEY_ARE, fields=fields or ())
    return source.name, (_of_hub(row, f"{source.name}/{source.split}") for row in rows)


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


def field_names(fields: Sequence[str], columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """field -> its name in the records; None: there is none."""
    unknown = set(columns or {}) - set(fields)
    if unknown:
        raise ValueError(f"data.columns: unknown field {sorted(unknown)[0]!r}; there are {', '.join(fields)}")
    return {field: field for field in fields} | dict(columns or {})


def text_field(record: Mapping[str, Any], names: Mapping[str, str | None], field: str, *, required: bool = True) -> str:
    """A field that holds text; "" where one that is not required is missing or null.

    Raises:
        ValueError: with the reason.
    """
    name = names[field]
    if name is None or name not in record:
        if not required:
            return ""
        raise ValueError(
            f"no field {name!r}; there are {', '.join(map(repr, record)) or 'none'} (choose with data.columns.{field})"
        )
    value = record[name]
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} holds {type(value).__name__}, not text")
    return value
