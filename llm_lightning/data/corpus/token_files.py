"""Text tokenised once, into flat files of ids that are mapped into memory.

A corpus, and a single document of it, may be far larger than memory. The files are in `<cache>/tokens/<key>/`; the key
is the digest of everything they depend on: content, tokenizer, split. They appear complete or not at all, are made by
one process while others wait, and are verified when opened.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from llm_lightning.data.corpus.encoding import before_last_space, encoded, in_batches, in_pieces
from llm_lightning.data.corpus.sources import Source
from llm_lightning.data.corpus.split import Split
from llm_lightning.data.files.signature import signature_of
from llm_lightning.data.files.verified import backdate, is_as_verified, keep_verified
from llm_lightning.files.atomic import cache_dir, commit, locked, sha256_of, write_atomically
from llm_lightning.files.columns import key_of, sealed, unsealed
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.build import from_description

log = logging.getLogger(__name__)

FORMAT = 1

TrainTokenizer = Callable[[Iterable[str]], Tokenizer]


@dataclass(frozen=True)
class TokenFile:
    """The ids of one part of a split."""

    path: Path
    dtype: str
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the encoded text, to turn a loss per token into bits per byte."""
    n_documents: int
    digest: str
    """sha256 of the file."""
    tokenizer: Tokenizer = field(repr=False, compare=False)

    @property
    def tokens(self) -> np.ndarray:
        """Map the file: (n_tokens,) ids, read-only, loaded page by page when touched."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))


def build_token_files(
    source: Source,
    tokenizer: Tokenizer | TrainTokenizer,
    *,
    split: str = "auto",
    val_fraction: float = 0.1,
    add_eot: bool = True,
    cache: Path | None = None,
    verify: bool = False,
) -> dict[str, TokenFile]:
    """Return the verified files of "train" and, unless `val_fraction` is 0, "val"; build them if necessary.

    Args:
        tokenizer: or a function that trains one on the texts of the training part. If it is a `functools.partial`, its
            arguments must determine the result, and the trained tokenizer is cached.
        add_eot: put the tokenizer's end of text between two documents of a part. Each begins with the tokenizer's
            `bos_id`, where there is one.
        verify: hash the files even where their sizes and times are as they were when they were last verified.

    Raises:
        ValueError: bad text, a split or a part without tokens, or a tokenizer without an end of text.
        OSError: the files cannot be written.
    """
    cache = cache or cache_dir()
    parts = Split.of(source, split, val_fraction)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = trained_tokenizer(tokenizer, [parts], cache)
    add_eot = add_eot and source.survey().n_documents > 1
    if add_eot and tokenizer.eot_id is None:
        raise ValueError("this tokenizer has no end-of-text token to put between documents; set data.add_eot=false")
    spec = {"format": FORMAT, "tokenizer": tokenizer.fingerprint(), "add_eot": add_eot, **parts.describe()}
    folder = cache / "tokens" / key_of(spec)
    if (files := _opened(folder, tokenizer, verify)) is not None:
        return files
    with locked(folder):
        if (files := _opened(folder, tokenizer, verify)) is not None:
            return files
        _build(folder, parts, tokenizer, add_eot, spec)
        files = _opened(folder, tokenizer, verify=True)
    if files is None:
        raise OSError(f"{folder} reads back differently from what was written; check the disk and run again")
    return files


def trained_tokenizer(train: TrainTokenizer, splits: Sequence[Split], cache: Path | None = None) -> Tokenizer:
    """Train a tokenizer on the training parts of one or several sources, or take it from the cache.

    Args:
        train: if it is a `functools.partial`, its arguments must determine the result, and the tokenizer is cached.
    """
    if not isinstance(train, partial):
        return train(_training_texts(splits))
    settings = [train.func.__qualname__, train.args, train.keywords]
    texts = [parts.describe() for parts in splits]
    spec = {"format": FORMAT, "train": settings, **(texts[0] if len(texts) == 1 else {"texts": texts})}
    path = (cache or cache_dir()) / "tokenizers" / f"{key_of(spec)}.json"
    with locked(path):
        if (description := unsealed(path)) is not None:
            return from_description(description)
        tokenizer = train(_training_texts(splits))
        write_atomically(path, sealed(tokenizer.describe()))
    return tokenizer


def _training_texts(splits: Sequence[Split]) -> Iterator[str]:
    for parts in splits:
        for part, document in parts.documents():
            if part == "train":
                yield from in_pieces(document.chunks, before_last_space)


def _opened(folder: Path, tokenizer: Tokenizer, verify: bool = False) -> dict[str, TokenFile] | None:
    """Return the files of a folder, or None unless all are there with the right content."""
    manifest = unsealed(folder / "manifest.json")
    if manifest is None:
        return None
    files = {
        name: TokenFile(folder / f"{name}.bin", tokenizer=tokenizer, **values)
        for name, values in manifest["parts"].items()
    }
    return files if _are_right(list(files.values()), _record_of(folder), verify) else None


def _are_right(files: Sequence[TokenFile], record: Path, verify: bool) -> bool:
    """Whether the files have their digests; those that are as when they were last verified are not read."""
    paths = [file.path for file in files]
    if not verify and is_as_verified(record, paths):
        return True
    try:
        signature = signature_of(paths)
        actual = [sha256_of(path) for path in paths]
    except FileNotFoundError as error:
        log.warning("%s is missing: rebuilding it", error.filename)
        return False
    for file, digest in zip(files, actual, strict=True):
        if digest != file.digest:
            log.warning("%s has sha256 %s, expected %s: rebuilding it", file.path, digest, file.digest)
            return False
    keep_verified(record, signature)
    return True


def _record_of(folder: Path) -> Path:
    """The sizes and times of files that were verified."""
    return folder.with_name(f"{folder.name}.verified.json")


def _build(folder: Path, parts: Split, tokenizer: Tokenizer, add_eot: bool, spec: dict[str, Any]) -> None:
    """Make the folder under a temporary name and rename it when all is written. The caller holds the lock."""
    making = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)  # left by a killed process: we hold the lock
    try:
        making.mkdir(parents=True)
        written = _write_parts(making, parts, tokenizer, add_eot)
        manifest = {**spec, "parts": {name: part.summary() for name, part in written.items()}}
        write_atomically(making / "manifest.json", sealed(manifest))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        commit(making, folder)
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise OSError(
            f"cannot write the token files in {folder}: {error} ({free:,.0f} MiB are free there); "
            "make room, or set LLM_LIGHTNING_CACHE to a folder with more"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write_parts(folder: Path, parts: Split, tokenizer: Tokenizer, add_eot: bool) -> dict[str, _Part]:
    n_bytes = parts.source.survey().n_bytes
    written: dict[str, _Part] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=n_bytes, desc="tokenising", unit="B", unit_scale=True, disable=None))
        for batch, ids, size in encoded(in_batches(parts.documents(), tokenizer.split_point), tokenizer, add_eot):
            if batch.part not in written:
                file = stack.enter_context((folder / f"{batch.part}.bin").open("wb"))
                written[batch.part] = _Part(file)
            written[batch.part].write(ids, size, batch.n_documents)
            bar.update(size)
        for part in written.values():
            part.finish()
    if sum(part.n_bytes for part in written.values()) != n_bytes:
        raise ValueError(f"{parts.source.label} changed while it was being tokenised; run again")
    wanted = {"train", "val"} if parts.val_fraction else {"train"}
    if wanted - {name for name, part in written.items() if part.n_tokens}:
        raise ValueError(f"{parts.source.label} leaves a part without tokens; give more text or change data.split")
    return written


class _Part:
    """One token file being written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.dtype = ""
        self.n_tokens = self.n_bytes = self.n_documents = 0

    def write(self, ids: np.ndarray, n_bytes: int, n_documents: int) -> None:
        ids = ids.astype(ids.dtype.newbyteorder("<"), copy=False)
        data = ids.tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.dtype = ids.dtype.str
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes
        self.n_documents += n_documents

    def finish(self) -> None:
        """Flush everything to the disk."""
        self.file.flush()
        backdate(Path(self.file.name))
        os.fsync(self.file.fileno())

    def summary(self) -> dict[str, Any]:
        """Return the fields of TokenFile that the manifest keeps."""
        counts = {"n_tokens": self.n_tokens, "n_bytes": self.n_bytes, "n_documents": self.n_documents}
        return {"dtype": self.dtype, **counts, "digest": self.sha256.hexdigest()}
