"""Datasets of the Hugging Face hub, streamed once into a file of the cache."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.files.bad_records import checked_text
from llm_lightning.data.files.signature import signature_of
from llm_lightning.data.files.verified import backdate, is_as_verified, keep_verified
from llm_lightning.files.atomic import cache_dir, commit, locked, naming, sha256_of, write_atomically


class HubDataset(NamedTuple):
    """One split of a dataset of the hub, or of a local folder."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


def hugging_face_file(
    dataset: HubDataset, wanted_fields: tuple[str, ...] = (), *, check: bool = True, verify: bool = False
) -> Path:
    """Stream a dataset into one JSONL file of the cache, once; return the file.

    Args:
        wanted_fields: the text, and others; none: all. A class index is written as the name that the dataset gives it.
        check: refuse a row whose first wanted field holds no text.
        verify: hash the file even where its size and time are as they were when it was last verified.

    Raises:
        ValueError: the dataset, its split or its fields cannot be read, with the reason.
    """
    wanted = [*dataset, *wanted_fields, _local_state(Path(dataset.name))]
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    target = cache_dir() / "huggingface" / f"{Path(dataset.name).name}-{key}.jsonl"
    manifest = target.with_suffix(".sha256")
    with locked(target):
        if not _is_whole(target, manifest, verify):
            temporary = target.with_suffix(".tmp")
            try:
                with naming(target):
                    _write_rows(_rows(dataset, wanted_fields, check), temporary)
                write_atomically(manifest, sha256_of(temporary))
                backdate(temporary)
                commit(temporary, target)
                keep_verified(_record_of(target), signature_of([target]))
            finally:
                temporary.unlink(missing_ok=True)
    return target


def _is_whole(target: Path, manifest: Path, verify: bool) -> bool:
    """Whether a file of the cache is there with the digest of its manifest."""
    if not (target.exists() and manifest.exists()):
        return False
    record = _record_of(target)
    if not verify and is_as_verified(record, [target]):
        return True
    signature = signature_of([target])
    if manifest.read_text() != sha256_of(target):
        return False
    keep_verified(record, signature)
    return True


def _record_of(target: Path) -> Path:
    """The size and time of a file that was verified."""
    return target.with_suffix(".verified.json")


def _local_state(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when a data set in a local folder does; empty for the name of a hub data set."""
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _rows(dataset: HubDataset, wanted_fields: tuple[str, ...], check: bool) -> Iterator[dict[str, Any]]:
    import datasets

    if not sys.stderr.isatty():  # it draws bars into files too
        datasets.disable_progress_bars()
    name, config, split, revision = dataset
    try:
        streaming = "[" not in split  # a slice, as train[:50%], needs to know how many rows there are
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        for number, row in enumerate(rows):
            try:
                if wanted_fields and check:
                    checked_text(row, wanted_fields[0])
                yield {field: _class_name(row, field, rows.features) for field in wanted_fields or row}
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
    except Exception as error:  # the library and the hub behind it raise dozens of types, network errors included
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read the Hugging Face dataset {name} (config {config}, split {split}): {reason}; check "
            f"data.hf_dataset, data.hf_config, data.hf_split and data.text_field, or give local files with data.path"
        ) from error


def _class_name(row: Mapping[str, Any], field: str, features: Any) -> Any:
    """The value of a field; a class index as its name."""
    if field not in row:
        raise ValueError(f"no field '{field}'; its fields: {', '.join(map(repr, row))}")
    feature = features.get(field) if features is not None else None
    to_name = getattr(feature, "int2str", None)
    return to_name(row[field]) if to_name is not None and row[field] is not None else row[field]


def _write_rows(rows: Iterable[dict[str, Any]], temporary: Path) -> None:
    from tqdm import tqdm

    with temporary.open("w", encoding="utf-8") as file:
        for row in tqdm(rows, desc="downloading rows", unit=" rows", disable=None):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
