"""Rows of a file or a hub dataset, and records made of them; problems are collected over all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.data.reading import BadRecords, json_lines
from llm_lightning.data.records.json import read_json_records

Row = tuple[Mapping[str, Any], str]
"""A record, and the place it comes from."""
Made = TypeVar("Made")


class SkippedError(Exception):
    """A record that is left out on purpose."""


def rows_of(source: str | Path | HubDataset) -> Iterable[Row]:
    """The records of a file (see `read_json_records`) or of a dataset of the hub, which is read through the cache.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is no record, or the dataset cannot be read.
    """
    if isinstance(source, HubDataset):
        name = f"{source.name}/{source.split}"
        return [(line.value, f"{name}: row {line.number - 1}") for line in json_lines(hugging_face_file(source), ())]
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} does not exist or is not a file; check the path (of a run: data.path)")
    return read_json_records(source)


def collected(
    source: str | Path | HubDataset, make: Callable[[Mapping[str, Any], str], Made], needed: str
) -> tuple[list[Made], int]:
    """Make something of every record of a source.

    Args:
        make: called with record and place; raises ValueError with what is wrong, or SkippedError.
        needed: in each record, for error messages.

    Returns:
        what was made, and the number of records skipped.
    """
    made: list[Made] = []
    bad, n_skipped = BadRecords(), 0
    for record, place in rows_of(source):
        try:
            made.append(make(record, place))
        except SkippedError:
            n_skipped += 1
        except ValueError as error:
            bad.add(place, error)
    label = source.name if isinstance(source, HubDataset) else source
    bad.refuse(label)
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
