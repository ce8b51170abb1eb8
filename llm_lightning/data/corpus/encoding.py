"""Documents to token ids, on all cores, in order, in constant memory.

A document is cut only where the tokenizer guarantees that the parts have the ids of the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from llm_lightning.cores import cores
from llm_lightning.data.corpus.readers import Document
from llm_lightning.tokenizers.base import Tokenizer

PIECE = 1 << 18  # characters that a thread encodes at once


@dataclass
class Batch:
    """Consecutive pieces of one part, enough to be worth a thread."""

    part: str
    pieces: list[str | None] = field(default_factory=list)
    """None marks the border of two documents."""
    n_chars: int = 0
    n_documents: int = 0


def in_batches(documents: Iterable[tuple[str, Document]], split_point: Callable[[str], int]) -> Iterator[Batch]:
    """Cut (part, document) pairs into batches; the pieces of a part keep their order."""
    filling: dict[str, Batch] = {}
    begun: set[str] = set()
    for part, document in documents:
        batch = filling.setdefault(part, Batch(part))
        for number, piece in enumerate(in_pieces(document.chunks, split_point)):
            if number == 0:
                batch.pieces += [None] if part in begun else []
                batch.n_documents += 1
                begun.add(part)
            batch.pieces.append(piece)
            batch.n_chars += len(piece)
            if 2 * batch.n_chars >= PIECE:
                yield batch
                batch = filling[part] = Batch(part)
    yield from filling.values()


def in_pieces(chunks: Iterable[str], split_point: Callable[[str], int]) -> Iterator[str]:
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


def before_last_space(text: str) -> int:
    """Return a cut that keeps words whole: good enough for training a vocabulary."""
    return max(text.rfind(" "), text.rfind("\n"), 0)


def encoded(batches: Iterable[Batch], tokenizer: Tokenizer, add_eot: bool) -> Iterator[tuple[Batch, np.ndarray, int]]:
    """Encode on all cores, in order, with a few batches in memory; yields batch, ids and bytes of text."""
    begin = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=tokenizer.dtype)
    separator = np.array([*([tokenizer.eot_id] if add_eot else []), *begin], dtype=tokenizer.dtype)
    begun: set[str] = set()
    n_threads = cores()
    running: deque[tuple[Batch, Future[tuple[np.ndarray, int]]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for batch in batches:
            before = begin if batch.pieces and batch.part not in begun else begin[:0]
            begun |= {batch.part} if batch.pieces else set()
            running.append((batch, pool.submit(_encode, batch, tokenizer, separator, before)))
            if len(running) > 2 * n_threads:
                done, future = running.popleft()
                yield done, *future.result()
        for done, future in running:
            yield done, *future.result()


def _encode(batch: Batch, tokenizer: Tokenizer, separator: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, int]:
    texts = [piece for piece in batch.pieces if piece is not None]
    n_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    ids = [separator if piece is None else tokenizer.encode_array(piece) for piece in batch.pieces]
    return np.concatenate([before, *ids]), n_bytes
