"""Records of a source, read and checked once: conversations in a file of the cache, with what decides on their split.

    files -> their sha256 -> rows -> form -> conversations, one a line; hashes of prompt and group; counts

The folder is named by the files' names and content and by everything that decides on how they are read. While path,
size, time and inode of the files are as before, nothing of them is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_lightning.data.control_words import WordCount, without_end
from llm_lightning.data.files.bad_records import BadRecord, BadRecords
from llm_lightning.data.files.find import Found
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.leaks import prompt_key
from llm_lightning.data.record_store.snapshot import Snapshot
from llm_lightning.data.records.rows import SKIPPED, RecordForm, Source, conversations, open_records
from llm_lightning.data.templates.conversation import (
    Conversation,
    answers_of,
    as_stored,
    from_stored,
    with_answers,
)
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.columns import Columns, Writer, key_of, made_once

FORMAT = 1
"""Of the folders; raised when what is in them changes."""
HASH = 16
"""Bytes of a hash: two of 2 million records are equal by chance once in 10^26 times."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Args:
        form: makes a conversation of a record.
        options: how its files are read.
        strip_eot: strip control tokens that are spelt out from the ends of answers.
        bad_records: `refuse` or `quarantine`.
    """

    form: RecordForm
    options: FileOptions
    strip_eot: bool = False
    bad_records: str = "refuse"

    def describe(self) -> dict[str, Any]:
        """Plain values that decide on what is read."""
        form = {"kind": type(self.form).__name__, "version": self.form.version, **asdict(self.form)}  # type: ignore[call-overload]
        options = asdict(self.options)
        return {"form": form, "options": options, "strip_eot": self.strip_eot, "bad_records": self.bad_records}


class RecordStore(Sequence[Conversation]):
    """The records of one source, in its order. Only what is asked for is in memory.

    Attributes:
        label: what the source was named by.
        prompts: (n, 16) uint8, equal for equal prompts, see `prompt_key`.
        groups: (n, 16) uint8, equal for records of one group; 0 where there is none.
        has_equal_answers: (n,) bool.
        counts: what was changed or left out, under words for a reader.
        control_words: control tokens that answers spell out, and how often.
        quarantined: the records that could not be read.
    """

    def __init__(self, label: str, columns: Columns) -> None:
        self.label, self._columns = label, columns
        self.prompts, self.groups = columns.mapped("prompts"), columns.mapped("groups")
        self.has_equal_answers = columns.mapped("has_equal_answers").view(bool)
        self._ends = columns.mapped("ends")
        facts = columns.facts
        self.n_skipped: int = facts["skipped"]
        self.counts = Counter[str](facts["counts"])
        self.control_words = Counter[str](facts["control_words"])
        self.quarantined = [BadRecord(*one) for one in facts["quarantined"]]

    @property
    def folder(self) -> Path:
        """Where what is made of the records is kept, too."""
        return self._columns.folder

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        return from_stored(self.line(index))

    def line(self, index: int) -> bytes:
        """A record as it is stored."""
        start = int(self._ends[index - 1]) if index else 0
        return self._columns.read("records", start, int(self._ends[index]))

    def __getstate__(self) -> dict[str, Any]:
        return {"label": self.label, "columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["label"], state["columns"])  # type: ignore[misc]


def open_store(source: Source, reading: Reading, *, verify: bool = False) -> RecordStore:
    """The records of a source; read now, or as they were read before.

    Args:
        verify: read and hash everything again.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of everything that is wrong, the first ten.
    """
    seen = Snapshot.of(source, verify=verify)
    files = [str(file) for file in seen.found.files]
    spec = {"format": FORMAT, "files": files, "content": seen.content, **reading.describe()}

    def write(writer: Writer) -> dict[str, Any]:
        facts = _write(writer, source, seen.found, reading)
        seen.check()
        return facts

    return RecordStore(seen.found.label, made_once(cache_dir() / "records" / key_of(spec), write, verify=verify))


def _write(writer: Writer, source: Source, found: Found, reading: Reading) -> dict[str, Any]:
    label, rows = open_records(source, reading.options, found=found)
    bad, counts, spelt = BadRecords(reading.bad_records), Counter[str](), WordCount()
    records, ends = writer.column("records", np.uint8), writer.column("ends", np.int64)
    prompts, groups = writer.column("prompts", np.uint8, HASH), writer.column("groups", np.uint8, HASH)
    equal = writer.column("has_equal_answers", np.uint8)
    n = end = 0
    shown = tqdm(conversations(rows, reading.form, bad, counts), desc="reading", unit=" records", disable=None, delay=1)
    for one in _checked(shown, reading.strip_eot, spelt):
        line = as_stored(one).encode() + b"\n"
        records.extend(line)
        n, end = n + 1, end + len(line)
        ends.add(end)
        prompts.extend(_hash(prompt_key(one)))
        groups.extend(_hash(one.group) if one.group else bytes(HASH))
        equal.add(one.has_equal_answers)
    skipped = counts.pop(SKIPPED, 0)
    bad.refuse(label, n_records=n + skipped + bad.n)
    if not n:
        raise ValueError(f"{label} holds no records; give a file with {reading.form.needed} in each")
    return {
        "skipped": skipped,
        "counts": dict(counts),
        "control_words": dict(spelt.found),
        "quarantined": [list(one) for one in bad.quarantined],
    }


def _checked(records: Iterator[Conversation], strip_eot: bool, spelt: WordCount) -> Iterator[Conversation]:
    """The records, control tokens at the ends of their answers stripped if asked for, those that are left counted."""
    for record in records:
        one = with_answers(record, without_end) if strip_eot else record
        for answer in answers_of(one):
            spelt.add(answer)
            spelt.end()
        yield one


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH).digest()
