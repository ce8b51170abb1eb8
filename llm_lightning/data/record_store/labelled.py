"""Labelled texts of a source, read and checked once, and their tokens: flat columns in files of the cache.

While path, size, time and inode of the files are as before, nothing of them is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_lightning.data.files.bad_records import BadRecord, BadRecords
from llm_lightning.data.record_store.snapshot import Snapshot
from llm_lightning.data.records.labelled import (
    LabelledReading,
    LabelledText,
    labelled_texts,
    one_spelling,
    texts_as_pandas_reads_them,
)
from llm_lightning.data.records.rows import Source
from llm_lightning.data.text_keys import SIZE, TextKeys, keys_of
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.columns import Columns, Writer, key_of, made_once
from llm_lightning.tokenizers.base import Tokenizer

FORMAT = 1
"""Of the folders; raised when what is in them changes."""


class LabelledStore:
    """The records of one source, in its order. Only what is asked for is in memory.

    Attributes:
        labels: the different labels, in the order in which they first occur.
        codes: (n,) int32: the index in `labels` of each record's label.
        keys: of the texts.
        notes: what a reader should know about the reading, a line each.
        merged: places of lines that pandas merged into one record.
        quarantined: the records that could not be read.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        facts = columns.facts
        names = [facts["renamed"].get(label, label) for label in facts["labels"]]
        self.labels = list(dict.fromkeys(names))
        number = {label: at for at, label in enumerate(self.labels)}
        self.codes = np.array([number[name] for name in names], np.int32)[columns.mapped("codes")]
        self.keys = TextKeys(*(columns.mapped(way) for way in TextKeys._fields))
        self.notes: list[str] = facts["notes"]
        self.merged: list[str] = facts["merged"]
        self.quarantined = [BadRecord(*one) for one in facts["quarantined"]]
        self._ends = columns.mapped("ends")

    @property
    def folder(self) -> Path:
        """Where what is made of the records is kept, too."""
        return self._columns.folder

    def counts(self) -> dict[str, int]:
        """label -> its number of records."""
        return dict(zip(self.labels, np.bincount(self.codes, minlength=len(self.labels)).tolist(), strict=True))

    def text(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._columns.read("texts", start, int(self._ends[index])).decode("utf-8", "surrogatepass")

    def texts(self, rows: Iterable[int] | None = None) -> Iterator[str]:
        """The texts of some records, or of all."""
        return map(self.text, range(len(self)) if rows is None else rows)

    def first_place(self, label: str) -> str:
        """The place of the first record with a label."""
        at = int(np.argmax(self.codes == self.labels.index(label)))
        file = self._columns.facts["files"][int(self._columns.mapped("files")[at])]
        return f"{file}{self._columns.mapped('numbers')[at]}"

    def __len__(self) -> int:
        return len(self.codes)


def open_labelled(
    source: Source,
    reading: LabelledReading,
    *,
    bad_records: str = "refuse",
    like_pandas: bool = False,
    verify: bool = False,
) -> LabelledStore:
    """The records of a source; read now, or as they were read before.

    Args:
        like_pandas: read the one file as `texts_as_pandas_reads_them` does.
        verify: hash the files again, and compare what is in the cache with its digest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    seen = Snapshot.of(source, list(reading.wanted.values()), verify=verify)
    found = seen.found
    how = {**asdict(reading), "bad_records": bad_records, "like_pandas": like_pandas}
    spec = ["labelled", FORMAT, found.label, [str(file) for file in found.files], seen.content, how]

    def write(writer: Writer) -> dict[str, Any]:
        bad, notes, merged = BadRecords(bad_records), list[str](), list[str]()
        if like_pandas:
            records = texts_as_pandas_reads_them(found.files[0], reading.columns or (), merged)
        else:
            records = labelled_texts(source, reading, bad, notes, found=found)
        facts = _write(writer, records)
        seen.check()
        renamed = one_spelling(source, facts.pop("counts"), notes)
        quarantined = [list(one) for one in bad.quarantined]
        return {**facts, "renamed": renamed, "notes": notes, "merged": merged, "quarantined": quarantined}

    return LabelledStore(made_once(cache_dir() / "records" / key_of(spec), write, verify=verify))


def _write(writer: Writer, records: Iterable[LabelledText]) -> dict[str, Any]:
    """Write the columns; the labels in the order of their codes, the beginnings of places, numbers of records."""
    texts, ends, codes = (
        writer.column("texts", np.uint8),
        writer.column("ends", np.int64),
        writer.column("codes", np.int32),
    )
    files, numbers = writer.column("files", np.int32), writer.column("numbers", np.int64)
    keys = [writer.column(way, np.uint8, SIZE) for way in TextKeys._fields]
    code_of, number_of, counts = dict[str, int](), dict[str, int](), Counter[str]()
    end = 0
    for text, label, place in records:
        data = text.encode("utf-8", "surrogatepass")
        texts.extend(data)
        ends.add(end := end + len(data))
        codes.add(code_of.setdefault(label, len(code_of)))
        counts[label] += 1
        file = place.rstrip("0123456789")
        files.add(number_of.setdefault(file, len(number_of)))
        numbers.add(int(place[len(file) :]))
        for column, key in zip(keys, keys_of(text), strict=True):
            column.extend(key)
    return {"labels": list(code_of), "files": list(number_of), "counts": dict(counts)}


def tokens_of_texts(store: LabelledStore, tokenizer: Tokenizer, *, verify: bool = False) -> Columns:
    """The tokens of all texts of a store: `ids`, flat, and `ends`, (n,) int64; made now, or as they were before."""
    folder = store.folder.with_name(f"{store.folder.name}-tokens-{key_of([FORMAT, tokenizer.fingerprint()])}")

    def write(writer: Writer) -> dict[str, Any]:
        ids, ends, end = writer.column("ids", tokenizer.dtype), writer.column("ends", np.int64), 0
        bar = tqdm(store.texts(), "tokenising", len(store), unit=" texts", disable=None, delay=1)
        for text in bar:
            found = tokenizer.encode_document(text)
            ids.extend(found.tobytes())
            ends.add(end := end + len(found))
        return {}

    return made_once(folder, write, verify=verify)
