"""Text sources: the embedded corpus, files, folders, globs, JSONL, pinned downloads, Hugging Face datasets.

Each becomes a `Source`: an ordered sequence of documents that can be read repeatedly and in constant memory. A document
is read in chunks, so that a file may be larger than memory. `Source.survey()` reads everything once and strictly: bad
text is found before training, not during it.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.data.reading import JSONL_SUFFIXES, BadRecords, TextFile, checked_text, json_lines
from llm_lightning.files.download import Pinned, download
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted

log = logging.getLogger(__name__)

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

FOLDER_SUFFIXES = {".txt", ".text", ".md", ".rst"} | JSONL_SUFFIXES
"""Files that are taken from a folder; a file that is named or matches a glob is taken whatever its suffix."""


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
        found, whole = Survey(), hashlib.sha256()
        for document in self.documents():
            content, n_chars = hashlib.sha256(), 0
            for chunk in document.chunks:
                data = chunk.encode()
                content.update(data)
                n_chars += len(chunk)
                found.n_bytes += len(data)
            whole.update(content.digest())
            by = content if document.split_by is None else hashlib.sha256(document.split_by.encode())
            found.keys.append(int.from_bytes(by.digest()[:8], "big"))
            found.lengths.append(n_chars)
        if not found.n_bytes:
            raise ValueError(f"{self.label} holds no text: it is empty; give a file or folder with text")
        found.digest = whole.hexdigest()
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
    """A file that is one document."""

    path: Path

    def documents(self) -> Iterator[Document]:
        """Yield the one document."""
        yield Document(str(self.path), TextFile(self.path))


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line; the string under `text_field` is a document. Blank lines are skipped."""

    path: Path
    text_field: str

    def documents(self) -> Iterator[Document]:
        """Yield one document per line.

        Raises:
            ValueError: after the last line, if lines were bad: counts all of them and lists the first ten.
        """
        bad = BadRecords()
        for number, record, wrong in json_lines(self.path, (self.text_field,)):
            place = f"{self.path}:{number}"
            try:
                if wrong is not None:
                    raise ValueError(wrong)
                yield Document(place, (checked_text(record, self.text_field),))
            except ValueError as error:
                bad.add(place, error)
        bad.refuse(
            self.path, f"each line must be a JSON object with a string under '{self.text_field}' (data.text_field)"
        )


def open_source(
    name: str | None = None,
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    text_field: str = "text",
    hf_dataset: str | None = None,
    hf_config: str | None = None,
    hf_split: str = "train",
    hf_revision: str | None = None,
) -> Source:
    """Return the source that the settings name; `path` and `hf_dataset` win over `name`, which may be a default.

    Args:
        path: a file, folder or glob, or several as a list or with commas. A folder gives its .txt, .text, .md, .rst,
            .jsonl and .ndjson files, subfolders included, in the order of their paths; hidden ones are left out.
            A file that occurs twice is taken once.
        text_field: field of a JSONL record or a Hugging Face row that holds the text.

    Raises:
        FileNotFoundError: no such file, or a folder or glob without text files.
        ValueError: no source, more than one, or an unknown name.
        DownloadError: a named data set could not be downloaded.
    """
    if path is not None and hf_dataset is not None:
        raise ValueError(f"data.path={path} and data.hf_dataset={hf_dataset} are both set; set one of them to null")
    if path is not None:
        files = _find(path)
        return Source(", ".join(_words(path)), [_reader(file, text_field) for file in files])
    if hf_dataset is not None:
        file = hugging_face_file(HubDataset(hf_dataset, hf_config, hf_split, hf_revision), (text_field,))
        label = "/".join(filter(None, (hf_dataset, hf_config, hf_split)))
        return Source(f"Hugging Face dataset {label}", [JsonLines(file, text_field)])
    if name == EMBEDDED:
        from llm_lightning.data.embedded import python_reference

        # The texts differ a little between Python versions, the topics' names do not.
        return Source(name, [InMemory(dict(python_reference.documents()), names_split=True)])
    if name in NAMED:
        return Source(name, [WholeFile(download(NAMED[name]))])
    known = [EMBEDDED, *NAMED]
    hint = did_you_mean(name, known)
    raise ValueError(f"data.name={name} is unknown: {hint}use {', '.join(known)}, or data.path or data.hf_dataset")


def _reader(file: Path, text_field: str) -> Reader:
    return JsonLines(file, text_field) if file.suffix.lower() in JSONL_SUFFIXES else WholeFile(file)


def _words(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str] = ""
) -> list[str]:
    """Return the entries of a list or of a string with commas; a path that exists is one entry, commas and all."""
    if isinstance(path, (str, os.PathLike)):
        whole = os.fspath(path)
        exists = os.path.exists(os.path.join(folder, whole))  # noqa: PTH110, PTH118 (Path.exists raises where a list is too long for a file name)
        return [whole] if exists else [word.strip() for word in whole.split(",") if word.strip()]
    return [os.fspath(word) for word in path]


def absolute_paths(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str] = ""
) -> str | list[str]:
    """`data.path`, typed in `folder` (default: here), as absolute paths."""
    words = [str((folder / Path(word).expanduser()).absolute()) for word in _words(path, folder)]
    return words[0] if len(words) == 1 else words


def _find(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    files = [file for word in _words(path) for file in _files_of(word)]
    if not files:
        raise ValueError(f"data.path={path!r} names no file; give a file, a folder or a glob")
    return list({file.resolve(): file for file in files}.values())


def _files_of(word: str) -> list[Path]:
    found = Path(word).expanduser()
    if found.is_dir():
        files = sorted(_texts_in(found), key=lambda file: file.relative_to(found).as_posix())
        if not files:
            kinds = ", ".join(sorted(FOLDER_SUFFIXES))
            raise FileNotFoundError(
                f"the folder {word} holds no {kinds} file; for others give a glob, as {word}/**/*.py"
            )
        return files
    if found.exists():
        if not found.is_file():
            raise ValueError(f"{word} is not a regular file, and text is read more than once; write it to a file first")
        return [found]
    if glob.has_magic(word):
        matches = map(Path, glob.glob(str(found), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if files := sorted(match for match in matches if match.is_file()):
            return files
        raise FileNotFoundError(f"no file matches {word} (looked from {Path.cwd()})")
    raise FileNotFoundError(f"{word} does not exist (looked from {Path.cwd()}); check the path (of a run: data.path)")


def _texts_in(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in FOLDER_SUFFIXES and not hidden and file.is_file():
            yield file
