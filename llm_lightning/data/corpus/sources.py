"""Text sources: the embedded corpus, files of any form, pinned downloads, Hugging Face datasets.

Each becomes a `Source`: an ordered sequence of documents that can be read repeatedly and in constant memory. A document
is read in chunks, so that a file may be larger than memory. `Source.survey()` reads everything once and strictly: bad
text is found before training, not during it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from llm_lightning.data.control_words import WordCount, documents_between
from llm_lightning.data.files.bad_records import BadRecords, checked_text
from llm_lightning.data.files.find import Found, PathWords, find_files
from llm_lightning.data.files.form import PLAIN, FileForm, form_of
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.rows import rows_of_files
from llm_lightning.data.files.text import TextFile
from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.files.download import Pinned, download
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted
from llm_lightning.tokenizers.base import END_OF_TEXT

EMBEDDED = "python_reference"
NAMED = {
    "the_verdict": Pinned(
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        20_479,
        "the-verdict.txt",
    ),
    "tiny_shakespeare": Pinned(
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
        "/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
        "tinyshakespeare.txt",
    ),
}


@dataclass(frozen=True)
class Document:
    """One text, read in chunks as often as needed."""

    name: str
    chunks: Iterable[str]
    split_by: str | None = None
    """Text that decides its side of a split by document; None: its content."""


@dataclass
class Survey:
    """The result of reading a whole source strictly; 16 bytes per document."""

    digest: str = ""
    """sha256 over the sha256 of each document's UTF-8 text: the same content has the same digest wherever it is."""
    n_documents: int = 0
    n_chars: int = 0
    n_bytes: int = 0
    keys: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    """First 64 bits of the sha256 of the text that decides each document's side of a split."""
    lengths: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    """Characters of each document."""
    control_words: Counter[str] = field(default_factory=Counter)
    """How often each is spelt out."""


class Reader(Protocol):
    """Anything that yields the same documents each time."""

    def documents(self) -> Iterator[Document]: ...


class Source:
    """Documents from an ordered list of readers."""

    def __init__(self, label: str, readers: Sequence[Reader]) -> None:
        self.label = label
        self.readers = readers

    def documents(self) -> Iterator[Document]:
        """Yield all documents in a fixed order."""
        for reader in self.readers:
            yield from reader.documents()

    def survey(self) -> Survey:
        """Read everything once, strictly.

        Raises:
            ValueError: text that is not UTF-8, bad JSONL lines, or no text at all; names file and line.
        """
        return self._survey

    def digest(self) -> str:
        """Return the sha256 of the content."""
        return self._survey.digest

    def describe(self) -> str:
        """Return the label and the size."""
        survey = self._survey
        return f"{self.label} ({counted(survey.n_documents, 'document')}, {counted(survey.n_bytes, 'byte')})"

    @cached_property
    def _survey(self) -> Survey:
        found, whole, words = Survey(), hashlib.sha256(), WordCount()
        for document in self.documents():
            content, n_chars = hashlib.sha256(), 0
            for chunk in document.chunks:
                data = chunk.encode()
                content.update(data)
                n_chars += len(chunk)
                words.add(chunk)
                found.n_bytes += len(data)
            words.end()
            whole.update(content.digest())
            by = content if document.split_by is None else hashlib.sha256(document.split_by.encode())
            found.keys.append(int.from_bytes(by.digest()[:8], "big"))
            found.lengths.append(n_chars)
        if not found.n_bytes:
            raise ValueError(f"{self.label} holds no text: it is empty; give a file or folder with text")
        found.digest, found.control_words = whole.hexdigest(), words.found
        found.n_documents, found.n_chars = len(found.lengths), sum(found.lengths)
        return found


@dataclass(frozen=True)
class InMemory:
    """Small texts; with `names_split` their names, not their content, decide their side of a split."""

    texts: Mapping[str, str]
    names_split: bool = False

    def documents(self) -> Iterator[Document]:
        """Yield one document per text."""
        for name, text in self.texts.items():
            yield Document(name, (text,), split_by=name if self.names_split else None)


@dataclass(frozen=True)
class WholeFile:
    """A file of running text, which is one document."""

    path: Path
    form: FileForm = PLAIN
    keeps_ends: bool = False

    def documents(self) -> Iterator[Document]:
        """Yield the one document."""
        yield Document(str(self.path), TextFile(self.path, self.form, self.keeps_ends))


@dataclass(frozen=True)
class SplitFile:
    """A file of running text with `<|endoftext|>` between its documents; one at a time is in memory."""

    path: Path
    form: FileForm = PLAIN
    keeps_ends: bool = False

    def documents(self) -> Iterator[Document]:
        """Yield the documents that are not empty."""
        texts = documents_between(TextFile(self.path, self.form, self.keeps_ends), END_OF_TEXT)
        for number, text in enumerate(texts, start=1):
            yield Document(f"{self.path}, document {number}", (text,))


@dataclass(frozen=True)
class Records:
    """A file of records; the string under `text_field` of each is a document."""

    path: Path
    text_field: str
    options: FileOptions = AS_THEY_ARE

    def documents(self) -> Iterator[Document]:
        """Yield one document per record.

        Raises:
            ValueError: after the last record, if some were bad: counts all of them and lists the first ten.
        """
        bad = BadRecords()
        for row in rows_of_files(Found(str(self.path), [self.path]), self.options, fields=(self.text_field,)):
            try:
                if row.wrong is not None:
                    raise ValueError(row.wrong)
                yield Document(row.place, (checked_text(row.record, self.text_field),))
            except ValueError as error:
                bad.add(row.place, error)
        bad.refuse(
            self.path, f"each record must be an object with a string under '{self.text_field}' (data.text_field)"
        )


def open_source(
    name: str | None = None,
    path: PathWords | None = None,
    text_field: str = "text",
    hf_dataset: str | None = None,
    hf_config: str | None = None,
    hf_split: str = "train",
    hf_revision: str | None = None,
    split_on_eot: bool = False,
    options: FileOptions | None = None,
) -> Source:
    """Return the source that the settings name; `path` and `hf_dataset` win over `name`, which may be a default.

    Args:
        path: files, folders or globs; see `find_files`.
        text_field: field of a record or a Hugging Face row that holds the text.
        split_on_eot: make documents of a text in which `<|endoftext|>` stands between them.
        options: how the files are read.

    Raises:
        FileNotFoundError: no such file, or a folder or glob without text files.
        ValueError: no source, more than one, an unknown name, or a file of no form that is read.
        DownloadError: a named data set could not be downloaded.
    """
    if path is not None and hf_dataset is not None:
        raise ValueError(f"data.path={path} and data.hf_dataset={hf_dataset} are both set; set one of them to null")
    if path is not None:
        found = find_files(path)
        readers = [_reader(file, text_field, split_on_eot, options or AS_THEY_ARE) for file in found.files]
        return Source(found.label, readers)
    if hf_dataset is not None:
        file = hugging_face_file(HubDataset(hf_dataset, hf_config, hf_split, hf_revision), (text_field,))
        label = "/".join(filter(None, (hf_dataset, hf_config, hf_split)))
        return Source(f"Hugging Face dataset {label}", [Records(file, text_field)])
    if name == EMBEDDED:
        from llm_lightning.data.embedded import python_reference

        # The texts differ a little between Python versions, the topics' names do not.
        return Source(name, [InMemory(dict(python_reference.documents()), names_split=True)])
    if name in NAMED:
        return Source(name, [WholeFile(download(NAMED[name]))])
    known = [EMBEDDED, *NAMED]
    hint = did_you_mean(name, known)
    raise ValueError(f"data.name={name} is unknown: {hint}use {', '.join(known)}, or data.path or data.hf_dataset")


def _reader(file: Path, text_field: str, split_on_eot: bool, options: FileOptions) -> Reader:
    if file.is_dir():  # saved by `datasets`
        return Records(file, text_field, options)
    form = form_of(file, asked=options.format, encoding=options.encoding)
    if form.form == "text":
        kind = SplitFile if split_on_eot else WholeFile
        return kind(file, form, keeps_ends=options.newlines == "keep")
    return Records(file, text_field, options)
