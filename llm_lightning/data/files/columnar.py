"""Rows of parquet files and of folders written by `datasets.save_to_disk`; both know the names of classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.data.files.compression import open_bytes
from llm_lightning.data.files.form import FileForm
from llm_lightning.data.files.row import Row

BATCH = 1024
"""Rows that are converted at once."""


def parquet_rows(path: Path, form: FileForm) -> Iterator[Row]:
    """Read a parquet file, a batch of rows at a time.

    Raises:
        ValueError: if it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        if form.compression is None:
            file = pyarrow.parquet.ParquetFile(str(path))
        else:
            with open_bytes(path, form.compression) as stream:
                file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read()))
        names = _class_names(file.schema_arrow.metadata)
        _refuse_twice(path, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(BATCH):
            for record in batch.to_pylist():
                number += 1
                yield Row(f"record {number}", _named(record, names), None)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {str(error).splitlines()[0]}") from error


def _refuse_twice(path: Path, columns: Sequence[str]) -> None:
    """A record would silently keep the last one."""
    twice = next((name for name, n in Counter(columns).items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: the column {twice!r} occurs twice; there are {', '.join(columns)}")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_rows(folder: Path) -> Iterator[Row]:
    """Read a folder of `datasets.save_to_disk`.

    Raises:
        ValueError: if it holds several splits, or is damaged.
    """
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.name for one in folder.iterdir() if (one / "state.json").is_file())
        raise ValueError(f"{folder} holds the splits {', '.join(splits)}; name one: data.path={folder / splits[0]}")
    try:
        data = datasets.load_from_disk(str(folder))
        features = data.features
        names = {name: one.names for name, one in features.items() if isinstance(one, datasets.ClassLabel)}
        for number, record in enumerate(data, start=1):
            yield Row(f"record {number}", _named(record, names), None)
    except Exception as error:  # the library raises dozens of types
        raise ValueError(f"{folder} cannot be read as a saved dataset: {str(error).splitlines()[0]}") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """column -> names of its classes, which `datasets` writes into the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(record: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Classes by their names; fields of structs that are null are absent, since a column gives all of them."""
    return {
        name: _class_of(value, names[name]) if name in names else _without_nulls(value)
        for name, value in record.items()
    }


def _class_of(value: Any, names: list[str]) -> Any:
    """The name of a class index; -1 says that there is no class."""
    if not isinstance(value, int) or not -1 <= value < len(names):
        return value
    return None if value == -1 else names[value]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
