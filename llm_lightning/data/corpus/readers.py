"""What reads the documents of one file: running text, or records with a text each.

A document is read in chunks, so that a file may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from llm_lightning.data.control_words import documents_between
from llm_lightning.data.files.bad_records import BadRecords, checked_text
from llm_lightning.data.files.find import Found
from llm_lightning.data.files.form import PLAIN, FileForm
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import rows_of_files
from llm_lightning.data.files.text import TextFile
from llm_lightning.nearest import did_you_mean
from llm_lightning.tokenizers.base import END_OF_TEXT

DEFAULT_FIELD = "text"
LOOKED_AT = 100
"""Records whose fields show which one holds the text."""


@dataclass(frozen=True)
class Document:
    """One text, read in chunks as often as needed."""

    name: str
    chunks: Iterable[str]
    split_by: str | None = None
    """Text that decides its side of a split by document; None: its content."""


class Reader(Protocol):
    """Anything that yields the same documents each time."""

    def documents(self, bad: BadRecords | None = None) -> Iterator[Document]:
        """Yield them; count in `bad` what cannot be read, and raise ValueError if it (default: always) refuses that."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Small texts; with `names_split` their names, not their content, decide their side of a split."""

    texts: Mapping[str, str]
    names_split: bool = False

    def documents(self, bad: BadRecords | None = None) -> Iterator[Document]:
        """Yield one document per text."""
        for name, text in self.texts.items():
            yield Document(name, (text,), split_by=name if self.names_split else None)


@dataclass(frozen=True)
class WholeFile:
    """A file of running text, which is one document."""

    path: Path
    form: FileForm = PLAIN
    keeps_ends: bool = False

    def documents(self, bad: BadRecords | None = None) -> Iterator[Document]:
        """Yield the one document."""
        yield Document(str(self.path), TextFile(self.path, self.form, self.keeps_ends))


@dataclass(frozen=True)
class SplitFile:
    """A file of running text with `<|endoftext|>` between its documents; one at a time is in memory."""

    path: Path
    form: FileForm = PLAIN
    keeps_ends: bool = False

    def documents(self, bad: BadRecords | None = None) -> Iterator[Document]:
        """Yield the documents that are not empty."""
        texts = documents_between(TextFile(self.path, self.form, self.keeps_ends), END_OF_TEXT)
        for number, text in enumerate(texts, start=1):
            yield Document(f"{self.path}, document {number}", (text,))


@dataclass(frozen=True)
class Records:
    """A file of records; the string under `text_field`, or under the field that must be meant, is a document."""

    path: Path
    text_field: str
    options: FileOptions = AS_THEY_ARE

    def documents(self, bad: BadRecords | None = None) -> Iterator[Document]:
        """Yield one document per good record.

        Raises:
            ValueError: after the last record, if some were bad and `bad` refuses them; no field can be meant.
        """
        bad, field = bad or BadRecords(), self.field
        for row in rows_of_files(self._found, self.options, fields=(field,)):
            try:
                if row.wrong is not None:
                    raise ValueError(row.wrong)
                yield Document(row.place, (checked_text(row.record, field),))
            except ValueError as error:
                bad.add(row.place, error)
        bad.refuse(self.path, self.remedy)

    @property
    def remedy(self) -> str:
        """What records must be."""
        return f"each record must be an object with a string under '{self.text_field}' (data.text_field)"

    @cached_property
    def field(self) -> str:
        """The field that is read.

        Raises:
            ValueError: if the first records have no such field, and not exactly one that can be meant.
        """
        rows = islice(rows_of_files(self._found, self.options, fields=()), LOOKED_AT)
        records = [row.record for row in rows if row.wrong is None]
        return _field_meant(self.path, self.text_field, records)

    @property
    def _found(self) -> Found:
        return Found(str(self.path), [self.path])


def _field_meant(path: Path, wanted: str, records: Sequence[Mapping[str, Any]]) -> str:
    """`wanted`, if a record has it; else the field of another case, else the only one with texts."""
    there = dict.fromkeys(name for record in records for name in record)
    if wanted in there or not there:
        return wanted
    in_case = [name for name in there if name.casefold() == wanted.casefold()]
    texts = [name for name in there if _holds_texts([record.get(name) for record in records])]
    meant = in_case or (texts if wanted == DEFAULT_FIELD else [])  # another name was typed, and is a mistake
    if len(meant) == 1:
        return meant[0]
    names = ", ".join(map(repr, there))
    raise ValueError(
        f"{path}: no record has a field {wanted!r} (data.text_field); {did_you_mean(wanted, there, '{!r}')}there are "
        f"{names}; name the one with the text, as data.text_field={(texts or list(there))[0]}"
    )


def _holds_texts(values: Sequence[Any]) -> bool:
    """Whether all values that are there are strings, and not all of these are numbers."""
    found = [value for value in values if value is not None]
    return all(isinstance(value, str) for value in found) and not all(map(_is_number, found))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True
