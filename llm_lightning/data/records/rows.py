"""Rows of a file or a hub dataset, and records made of them; problems are collected over all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.find import Found, PathWords, find_files
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import RECORD_FORMS, FileRow, rows_of_files
from llm_lightning.data.hugging_face import HubDataset, hugging_face_file

Source = PathWords | HubDataset
"""`data.path` (see `find_files`) or a dataset of the hub."""
Made = TypeVar("Made")


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


def collected(
    source: Source, options: FileOptions, make: Callable[[Mapping[str, Any], str], Made], needed: str
) -> tuple[list[Made], int]:
    """Make something of every record of a source.

    Args:
        make: called with record and place; raises ValueError with what is wrong, or SkippedError.
        needed: in each record, for error messages.

    Returns:
        what was made, and the number of records skipped.
    """
    label, rows = open_records(source, options)
    made: list[Made] = []
    bad, n_skipped, n_rows = BadRecords(), 0, 0
    for row in rows:
        n_rows += 1
        try:
            if row.wrong is not None:
                raise ValueError(row.wrong)
            made.append(make(row.record, row.place))
        except SkippedError:
            n_skipped += 1
        except ValueError as error:
            bad.add(row.short, error)
    bad.refuse(label, n_records=n_rows)
    if not made:
        raise ValueError(f"{label} holds no records; give a file with {needed} in each")
    return made, n_skipped


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
