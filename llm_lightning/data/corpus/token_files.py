"""Text tokenised once, into flat files of ids that are mapped into memory.

A corpus and one document of it may each be far larger than the memory: documents are cut only where the tokenizer
guarantees that the ids of the parts are those of the whole, encoded on all cores, and written in order. The files
stand in `<cache>/tokens/<key>/`, the key being the digest of everything they depend on: content, tokenizer, split.
They appear complete or not at all, are made by one process while others wait, and are verified when opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from llm_lightning.data.corpus.sources import Document, Source
from llm_lightning.files.atomic import write_atomically
from llm_lightning.files.download import cache_dir, commit, locked, sha256_of
from llm_lightning.tokenizers import Tokenizer, from_description

log = logging.getLogger(__name__)

FORMAT = 1
FEW_DOCUMENTS = 20  # split=auto cuts fewer than these by character: whole documents would miss val_fraction by far
PIECE = 1 << 18  # characters that a thread encodes at once

TrainTokenizer = Callable[[Iterable[str]], Tokenizer]


@dataclass(frozen=True)
class TokenFile:
    """The ids of one part of a split."""

    path: Path
    dtype: str
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the encoded text: what turns a loss per token into bits per byte."""
    n_documents: int
    digest: str
    """sha256 of the file."""
    tokenizer: Tokenizer = field(repr=False, compare=False)

    @property
    def tokens(self) -> np.ndarray:
        """Map the file: (n_tokens,) ids, read-only, loaded page by page when touched."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))


@dataclass(frozen=True)
class Split:
    """Which text is for training and which for validation."""

    source: Source
    kind: str
    """document or character"""
    val_fraction: float

    @classmethod
    def of(cls, source: Source, kind: str, val_fraction: float) -> Split:
        """Check the wish against the data; `auto` becomes `document` from 20 documents on, else `character`.

        Raises:
            ValueError: an unknown kind, a fraction outside [0, 1), or a part that would be empty.
        """
        if kind not in ("auto", "document", "character"):
            raise ValueError(f"data.split={kind} is unknown; use auto, document or character")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must be at least 0 and less than 1")
        if kind == "auto":
            kind = "document" if source.survey().n_documents >= FEW_DOCUMENTS else "character"
        split = cls(source, kind, val_fraction)
        split._refuse_empty_parts()
        return split

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yield ("train" or "val", document) in the order of the source."""
        return self._by_character() if self.kind == "character" else self._by_document()

    def describe(self) -> dict[str, Any]:
        """Return what the parts depend on: plain values."""
        return {"source": self.source.digest(), "split": self.kind, "val_fraction": self.val_fraction}

    def _by_character(self) -> Iterator[tuple[str, Document]]:
        """Cut the concatenated text once, as the book does (chapter 5.1.3)."""
        left = self._n_train_chars()
        for document, length in zip(self.source.documents(), self.source.survey().lengths, strict=False):
            if left >= length:
                yield "train", document
            elif left <= 0:
                yield "val", document
            else:
                yield "train", Document(document.name, _Span(document.chunks, 0, left))
                yield "val", Document(document.name, _Span(document.chunks, left, length))
            left -= length

    def _by_document(self) -> Iterator[tuple[str, Document]]:
        keys, chosen = self.source.survey().keys, self._val_keys()
        for document, key in zip(self.source.documents(), keys, strict=False):
            at = bisect_left(chosen, key)
            yield "val" if at < len(chosen) and chosen[at] == key else "train", document

    def _n_train_chars(self) -> int:
        return int((1 - self.val_fraction) * self.source.survey().n_chars)

    def _val_keys(self) -> list[int]:
        """Return the sorted keys of the validation documents.

        In the order of their keys, which is random but a function of the content, documents are taken as long as they
        fit into the fraction: so it is met closely for documents of any size, and equal ones stay together.
        """
        survey = self.source.survey()
        keys, which = np.unique(np.asarray(survey.keys), return_inverse=True)
        sizes = np.bincount(which, weights=np.asarray(survey.lengths)).astype(np.int64)
        chosen, room = [], int(self.val_fraction * survey.n_chars)
        for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
            if 0 < size <= room:
                chosen.append(key)
                room -= size
        return chosen

    def _refuse_empty_parts(self) -> None:
        survey = self.source.survey()
        if self.kind == "character":
            n_train = self._n_train_chars()
            empty = not n_train or (self.val_fraction > 0 and n_train == survey.n_chars)
        else:
            empty = self.val_fraction > 0 and not self._val_keys()
        if empty:
            raise ValueError(
                f"data.split={self.kind} with data.val_fraction={self.val_fraction} leaves a part empty: "
                f"{self.source.label} has {survey.n_documents} documents with {survey.n_chars} characters; "
                f"change data.val_fraction, {'use data.split=character, ' * (self.kind == 'document')}"
                "or set data.val_fraction=0 for no validation"
            )


@dataclass(frozen=True)
class _Span:
    """Characters [start, stop) of a document."""

    chunks: Iterable[str]
    start: int
    stop: int

    def __iter__(self) -> Iterator[str]:
        position = 0
        for chunk in self.chunks:
            if text := chunk[max(self.start - position, 0) : max(self.stop - position, 0)]:
                yield text
            position += len(chunk)


def build_token_files(
    source: Source,
    tokenizer: Tokenizer | TrainTokenizer,
    *,
    split: str = "auto",
    val_fraction: float = 0.1,
    add_eot: bool = True,
    cache: Path | None = None,
) -> dict[str, TokenFile]:
    """Return the verified files of "train" and, unless `val_fraction` is 0, "val", building them if need be.

    Args:
        tokenizer: or a function that trains one on the texts of the training part. If it is a `functools.partial`, its
            arguments are taken to say all about it, and the trained tokenizer is cached.
        add_eot: put the tokenizer's end of text between two documents of a part.

    Raises:
        ValueError: bad text, a split or a part without tokens, or a tokenizer without an end of text.
        OSError: the files cannot be written.
    """
    cache = cache or cache_dir()
    parts = Split.of(source, split, val_fraction)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = _trained(tokenizer, parts, cache)
    add_eot = add_eot and source.survey().n_documents > 1
    if add_eot and tokenizer.eot_id is None:
        raise ValueError("this tokenizer has no end-of-text token to put between documents; set data.add_eot=false")
    spec = {"format": FORMAT, "tokenizer": tokenizer.fingerprint(), "add_eot": add_eot, **parts.describe()}
    folder = cache / "tokens" / _key(spec)
    if (files := _opened(folder, tokenizer)) is not None:
        return files
    with locked(folder):
        if (files := _opened(folder, tokenizer)) is not None:
            return files
        _build(folder, parts, tokenizer, add_eot, spec)
        files = _opened(folder, tokenizer)
    if files is None:
        raise OSError(f"{folder} reads back differently from what was written; check the disk and run again")
    return files


def _trained(train: TrainTokenizer, parts: Split, cache: Path) -> Tokenizer:
    """Train a tokenizer on the training part, or take it from the cache."""
    if not isinstance(train, partial):
        return train(_training_texts(parts))
    settings = [train.func.__qualname__, train.args, train.keywords]
    path = cache / "tokenizers" / f"{_key({'format': FORMAT, 'train': settings, **parts.describe()})}.json"
    with locked(path):
        if (description := _unsealed(path)) is not None:
            return from_description(description)
        tokenizer = train(_training_texts(parts))
        write_atomically(path, _sealed(tokenizer.describe()))
    return tokenizer


def _training_texts(parts: Split) -> Iterator[str]:
    for part, document in parts.documents():
        if part == "train":
            yield from _pieces(document.chunks, _before_last_space)


def _opened(folder: Path, tokenizer: Tokenizer) -> dict[str, TokenFile] | None:
    """Return the files of a folder, or None if they are not all there with their right content."""
    manifest = _unsealed(folder / "manifest.json")
    if manifest is None:
        return None
    files = {
        name: TokenFile(folder / f"{name}.bin", tokenizer=tokenizer, **values)
        for name, values in manifest["parts"].items()
    }
    for file in files.values():
        try:
            actual = sha256_of(file.path)
        except FileNotFoundError:
            actual = "none"
        if actual != file.digest:
            log.warning("%s has sha256 %s, expected %s: building it anew", file.path, actual, file.digest)
            return None
    return files


def _build(folder: Path, parts: Split, tokenizer: Tokenizer, add_eot: bool, spec: dict[str, Any]) -> None:
    """Make the folder under another name, and rename it when all is written. The caller holds the lock."""
    making = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)  # of a process that was killed: nobody else can hold it now
    try:
        making.mkdir(parents=True)
        written = _write_parts(making, parts, tokenizer, add_eot)
        manifest = {**spec, "parts": {name: part.summary() for name, part in written.items()}}
        write_atomically(making / "manifest.json", _sealed(manifest))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        commit(making, folder)
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise OSError(
            f"cannot make the token files in {folder}: {error} ({free:,.0f} MiB are free there); "
            "make room, or set LLM_LIGHTNING_CACHE to a folder with more"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write_parts(folder: Path, parts: Split, tokenizer: Tokenizer, add_eot: bool) -> dict[str, _Part]:
    n_bytes = parts.source.survey().n_bytes
    written: dict[str, _Part] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=n_bytes, desc="tokenising", unit="B", unit_scale=True, disable=None))
        for batch, ids, size in _encoded(_batches(parts.documents(), tokenizer.split_point), tokenizer, add_eot):
            if batch.part not in written:
                file = stack.enter_context((folder / f"{batch.part}.bin").open("wb"))
                written[batch.part] = _Part(file)
            written[batch.part].write(ids, size, batch.n_documents)
            bar.update(size)
        for part in written.values():
            part.finish()
    if sum(part.n_bytes for part in written.values()) != n_bytes:
        raise ValueError(f"{parts.source.label} was changed while it was being tokenised; run again")
    wanted = {"train", "val"} if parts.val_fraction else {"train"}
    if wanted - {name for name, part in written.items() if part.n_tokens}:
        raise ValueError(f"{parts.source.label} gives a part without tokens; give more text or change data.split")
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
        """Bring all to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def summary(self) -> dict[str, Any]:
        """Return what the manifest records of it: fields of TokenFile."""
        counts = {"n_tokens": self.n_tokens, "n_bytes": self.n_bytes, "n_documents": self.n_documents}
        return {"dtype": self.dtype, **counts, "digest": self.sha256.hexdigest()}


# -- encoding ------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """Consecutive pieces of one part, enough to be worth a thread's while."""

    part: str
    pieces: list[str | None] = field(default_factory=list)
    """None stands between two documents."""
    n_chars: int = 0
    n_documents: int = 0


def _batches(documents: Iterable[tuple[str, Document]], split_point: Callable[[str], int]) -> Iterator[_Batch]:
    filling: dict[str, _Batch] = {}
    begun: set[str] = set()
    for part, document in documents:
        batch = filling.setdefault(part, _Batch(part))
        for number, piece in enumerate(_pieces(document.chunks, split_point)):
            if number == 0:
                batch.pieces += [None] if part in begun else []
                batch.n_documents += 1
                begun.add(part)
            batch.pieces.append(piece)
            batch.n_chars += len(piece)
            if 2 * batch.n_chars >= PIECE:
                yield batch
                batch = filling[part] = _Batch(part)
    yield from filling.values()


def _pieces(chunks: Iterable[str], split_point: Callable[[str], int]) -> Iterator[str]:
    """Cut a document at split points into pieces of about PIECE characters, longer where there is no such point."""
    held, n_held, enough = [], 0, PIECE
    for text in _at_most(PIECE, chunks):
        held.append(text)
        n_held += len(text)
        if n_held < enough:
            continue
        whole = "".join(held)
        cut = split_point(whole)
        if cut:
            yield whole[:cut]
        held, n_held = [whole[cut:]], n_held - cut
        enough = n_held + PIECE if cut else 2 * n_held  # doubling: the time stays linear
    if n_held:
        yield "".join(held)


def _at_most(size: int, chunks: Iterable[str]) -> Iterator[str]:
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def _before_last_space(text: str) -> int:
    """Return a cut that keeps words whole: good enough to learn a vocabulary from."""
    return max(text.rfind(" "), text.rfind("\n"), 0)


def _encoded(
    batches: Iterable[_Batch], tokenizer: Tokenizer, add_eot: bool
) -> Iterator[tuple[_Batch, np.ndarray, int]]:
    """Encode on all cores, keeping the order and only a few batches in memory."""
    separator = np.array([tokenizer.eot_id] if add_eot else [], dtype=tokenizer.dtype)
    n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: deque[tuple[_Batch, Future[tuple[np.ndarray, int]]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for batch in batches:
            running.append((batch, pool.submit(_encode, batch, tokenizer, separator)))
            if len(running) > 2 * n_threads:
                done, future = running.popleft()
                yield done, *future.result()
        for done, future in running:
            yield done, *future.result()


def _encode(batch: _Batch, tokenizer: Tokenizer, separator: np.ndarray) -> tuple[np.ndarray, int]:
    texts = [piece for piece in batch.pieces if piece is not None]
    n_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    ids = [separator if piece is None else tokenizer.encode_array(piece) for piece in batch.pieces]
    return np.concatenate([separator[:0], *ids]), n_bytes


# -- small files that know their own digest ------------------------------------------------------------------


def _key(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:32]


def _sealed(content: dict[str, Any]) -> str:
    body = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def _unsealed(path: Path) -> dict[str, Any] | None:
    """Return the content, or None if there is none or it is damaged."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        body = json.dumps(sealed["content"], sort_keys=True)
        if hashlib.sha256(body.encode()).hexdigest() == sealed["sha256"]:
            return sealed["content"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged: making it anew", path)
    return None
