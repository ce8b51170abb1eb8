"""Text sources: the embedded corpus, files of any form, pinned downloads, Hugging Face datasets.

Each becomes a `Source`: an ordered sequence of documents that can be read repeatedly and in constant memory.
`Source.survey()` reads everything once and strictly: bad text is found before training, not during it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from llm_lightning.data.corpus.readers import DEFAULT_FIELD, Document, InMemory, Reader, Records, SplitFile, WholeFile
from llm_lightning.data.corpus.survey import Survey, keep, record_of, recorded, surveyed
from llm_lightning.data.files.bad_records import BadRecords
from llm_lightning.data.files.find import PathWords, find_files
from llm_lightning.data.files.form import form_of
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.files.signature import is_settled, signature_of
from llm_lightning.data.hugging_face import HubDataset, hugging_face_file
from llm_lightning.data.own_splits import check_one_source, named_by
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


class Source:
    """Documents from an ordered list of readers.

    Args:
        label: for messages.
        policy: `refuse` records that cannot be read, or `quarantine` them: they are left out at every reading.
        verify: read everything again, even where the files are as they were when their survey was recorded.
    """

    def __init__(self, label: str, readers: Sequence[Reader], *, policy: str = "refuse", verify: bool = False) -> None:
        self.label, self.readers, self.policy, self.verify = label, readers, policy, verify
        self.setting = ""
        """That names it, if it is not the main source: errors begin with it."""

    def documents(self, bad: BadRecords | None = None) -> Iterator[Document]:
        """Yield all documents in a fixed order.

        Args:
            bad: counts the records that cannot be read.
        """
        bad = BadRecords(self.policy) if bad is None else bad
        n_documents = 0
        for reader in self.readers:
            for document in reader.documents(bad):
                n_documents += 1
                yield document
        if bad.n and not n_documents:
            remedies = [reader.remedy for reader in self.readers if isinstance(reader, Records)]
            bad.refuse(self.label, remedies[0], n_records=bad.n)

    def survey(self) -> Survey:
        """Read everything once, strictly; nothing, if the cache has a record of it and no file has changed.

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
        with named_by(self.setting):
            return self._surveyed()

    def _surveyed(self) -> Survey:
        files = [reader.path for reader in self.readers if not isinstance(reader, InMemory)]  # type: ignore[attr-defined]
        if len(files) < len(self.readers):
            return self._read()
        record, signature = record_of(self.readers, self.policy), signature_of(files)
        can_trust = is_settled(signature)
        found = None if self.verify or not can_trust else recorded(record, signature)
        if found is None:
            found = self._read()
            if can_trust and signature_of(files) == signature:
                keep(found, record, signature)
        for note in found.notes:
            log.info(note)
        return found

    def _read(self) -> Survey:
        bad = BadRecords(self.policy)
        found = surveyed(self.documents(bad))
        if not found.n_bytes:
            raise ValueError(f"{self.label} holds no text: it is empty; give a file or folder with text")
        found.quarantined = bad.quarantined
        guessed = {(one.text_field, one.field): one for one in self.readers if isinstance(one, Records)}
        for (wanted, field), first in guessed.items():
            if field != wanted:
                found.notes.append(f"{first.path}: no field {wanted!r} (data.text_field): {field!r} is read")
        return found


def open_source(
    name: str | None = None,
    path: PathWords | None = None,
    text_field: str = DEFAULT_FIELD,
    hf_dataset: str | None = None,
    hf_config: str | None = None,
    hf_split: str = "train",
    hf_revision: str | None = None,
    split_on_eot: bool = False,
    options: FileOptions | None = None,
    *,
    policy: str = "refuse",
    verify: bool = False,
) -> Source:
    """Return the source that the settings name; `path` and `hf_dataset` win over `name`, which may be a default.

    Args:
        path: files, folders or globs; see `find_files`.
        text_field: field of a record or a Hugging Face row that holds the text.
        split_on_eot: make documents of a text in which `<|endoftext|>` stands between them.
        options: how the files are read.
        policy, verify: see `Source`.

    Raises:
        FileNotFoundError: no such file, or a folder or glob without text files.
        ValueError: no source, more than one, an unknown name, or a file of no form that is read.
        DownloadError: a named data set could not be downloaded.
    """
    check_one_source(path=path, hf_dataset=hf_dataset)
    if path is not None:
        found = find_files(path)
        readers = [_reader(file, text_field, split_on_eot, options or AS_THEY_ARE) for file in found.files]
        return Source(found.label, readers, policy=policy, verify=verify)
    if hf_dataset is not None:
        hub = HubDataset(hf_dataset, hf_config, hf_split, hf_revision)
        file = hugging_face_file(hub, (text_field,), check=policy == "refuse", verify=verify)
        label = "/".join(filter(None, (hf_dataset, hf_config, hf_split)))
        return Source(f"Hugging Face dataset {label}", [Records(file, text_field)], policy=policy, verify=verify)
    if name == EMBEDDED:
        from llm_lightning.data.embedded import python_reference

        # The texts differ a little between Python versions, the topics' names do not.
        return Source(name, [InMemory(dict(python_reference.documents()), names_split=True)])
    if name in NAMED:
        return Source(name, [WholeFile(download(NAMED[name]))], verify=verify)
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
