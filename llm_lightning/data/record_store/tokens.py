"""Token ids of the records of a store, made once: flat in a file, with the pieces of each record beside them.

A piece is a run of tokens of one kind. What has a loss follows from the kinds, so that one file serves every choice of
targets; what exceeds a context follows from the lengths, so that it serves every context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llm_lightning.cores import cores
from llm_lightning.data.record_store.records import FORMAT, RecordStore
from llm_lightning.data.templates.base import Piece, Template
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.files.columns import Columns, Writer, key_of, made_once
from llm_lightning.tokenizers.base import Tokenizer

KINDS = ("prompt", "header", "response", "end", "untrained", "rejected", "rejected_end")
"""Of pieces; see `Segment`. The last two are the rejected answer of a pair, behind the chosen one."""

HELD = 4096
"""Pieces that are written at once."""
CHUNK = 256
"""Records that a thread encodes at once."""

KIND = {name: number for number, name in enumerate(KINDS)}

Encode = Callable[[Tokenizer, Template, Conversation], Iterable[Piece]]


class Pieces(NamedTuple):
    """One record."""

    ids: np.ndarray
    """(n,)"""
    kinds: np.ndarray
    """(p,) uint8 of its pieces: numbers in `KINDS`"""
    lengths: np.ndarray
    """(p,) tokens of each piece, at least 1"""

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Pieces:
        """Join the pieces of a record."""
        parts = [(ids, KIND[kind]) for ids, kind in pieces if len(ids)]
        ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in parts)])
        return cls(ids, np.array([kind for _, kind in parts], np.uint8), np.array([len(ids) for ids, _ in parts]))

    def parts(self) -> Iterator[Piece]:
        """The pieces one by one."""
        ends = np.cumsum(self.lengths).tolist()
        for kind, start, stop in zip(self.kinds.tolist(), [0, *ends[:-1]], ends, strict=True):
            yield self.ids[start:stop], KINDS[kind]

    def cut(self, n: int) -> Pieces:
        """The first `n` tokens."""
        kept = np.minimum(np.maximum(n - (np.cumsum(self.lengths) - self.lengths), 0), self.lengths)
        return Pieces(self.ids[:n], self.kinds[kept > 0], kept[kept > 0])

    def marked(self, is_wanted: np.ndarray) -> np.ndarray:
        """(n,) bool: which tokens belong to the wanted pieces; `is_wanted` is (p,) bool."""
        return np.repeat(is_wanted, self.lengths)


def of_kinds(*kinds: str) -> np.ndarray:
    """A table, indexed by the number of a kind: whether it is one of these."""
    return np.array([kind in kinds for kind in KINDS])


class TokenStore:
    """The tokens of many records. Can be pickled; only what is asked for is in memory.

    Attributes:
        longest: (n,) uint32, tokens of the longest sequence of each record: its prompt and the longer answer.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._ends, self._piece_ends = columns.mapped("ends"), columns.mapped("piece_ends")
        self._kinds, self._lengths = columns.mapped("kinds"), columns.mapped("lengths")
        self.longest = columns.mapped("longest")
        self._dtype = columns.dtype("ids")

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def key(self) -> str:
        """Names what is in it."""
        return self._columns.folder.name

    def pieces(self, index: int) -> Pieces:
        """Read one record."""
        size = self._dtype.itemsize
        start, stop = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
        first, last = (int(self._piece_ends[index - 1]) if index else 0), int(self._piece_ends[index])
        ids = np.frombuffer(self._columns.read("ids", start * size, stop * size), self._dtype)
        return Pieces(ids, np.array(self._kinds[first:last]), self._lengths[first:last].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["columns"])  # type: ignore[misc]


def tokens_of(
    records: RecordStore, tokenizer: Tokenizer, template: Template, encode: Encode, *, verify: bool = False
) -> TokenStore:
    """The tokens of all records of a store; made now, or as they were made before.

    Args:
        encode: a function of this file.

    Raises:
        ValueError: naming the record that the template cannot render.
    """
    spec = [FORMAT, encode.__name__, template.describe(), template.digest_values(), tokenizer.fingerprint()]
    folder = records.folder.with_name(f"{records.folder.name}-tokens-{key_of(spec)}")

    def encoded(chunk: Sequence[Conversation]) -> list[list[Piece]]:
        template.check(chunk)
        return [list(encode(tokenizer, template, record)) for record in chunk]

    def write(writer: Writer) -> dict[str, Any]:
        tokens = TokenWriter(writer, tokenizer)
        with tqdm(total=len(records), desc="tokenising", unit=" records", disable=None, delay=1) as shown:
            for chunk in _in_threads(encoded, _chunks(records)):
                for pieces in chunk:
                    tokens.add(pieces)
                shown.update(len(chunk))
        tokens.flush()
        return {}

    return TokenStore(made_once(folder, write, verify=verify))


def _chunks(records: RecordStore) -> Iterator[list[Conversation]]:
    for start in range(0, len(records), CHUNK):
        yield [records[index] for index in range(start, min(start + CHUNK, len(records)))]


def _in_threads(function: Callable[[Any], Any], values: Iterable[Any]) -> Iterator[Any]:
    """The results in order, a few at a time in memory; tokenizers encode without holding the GIL."""
    n_threads = cores()
    running: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for value in values:
            running.append(pool.submit(function, value))
            if len(running) > n_threads:
                yield running.popleft().result()
        for future in running:
            yield future.result()


class TokenWriter:
    """Writes the columns of a TokenStore, record by record; `flush` after the last."""

    def __init__(self, writer: Writer, tokenizer: Tokenizer) -> None:
        self._ids, self._ends = writer.column("ids", tokenizer.dtype), writer.column("ends", np.int64)
        self._kinds, self._lengths = writer.column("kinds", np.uint8), writer.column("lengths", np.uint32)
        self._piece_ends, self._longest = writer.column("piece_ends", np.int64), writer.column("longest", np.uint32)
        self._dtype, self._held = tokenizer.dtype, list[np.ndarray]()
        self._end = self._n_pieces = 0

    def add(self, pieces: Iterable[Piece]) -> None:
        """Append one record."""
        n_shared = n_chosen = n_rejected = 0
        for ids, kind in pieces:
            n = len(ids)
            if not n:
                continue
            self._held.append(ids)
            self._kinds.add(KIND[kind])
            self._lengths.add(n)
            self._n_pieces += 1
            if kind in ("response", "end"):
                n_chosen += n
            elif kind in ("rejected", "rejected_end"):
                n_rejected += n
            else:
                n_shared += n
        self._end += n_shared + n_chosen + n_rejected
        self._ends.add(self._end)
        self._piece_ends.add(self._n_pieces)
        self._longest.add(n_shared + max(n_chosen, n_rejected))
        if len(self._held) >= HELD:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            self._ids.extend(np.concatenate(self._held, dtype=self._dtype, casting="unsafe").tobytes())
            self._held = []


def encode_conversation(tokenizer: Tokenizer, template: Template, record: Conversation) -> Iterable[Piece]:
    """The pieces of a whole conversation."""
    return template.tokens(tokenizer, template.segments(record, tokenizer))


def encode_pair(tokenizer: Tokenizer, template: Template, record: Conversation) -> Iterator[Piece]:
    """The pieces of the prompt, of the chosen answer with its end, and of the rejected answer with its end.

    Earlier answers belong to the prompt. Its last piece is the header, without the line breaks at its start.
    """
    prompt = list(template.tokens(tokenizer, template.prompt(record, tokenizer)))
    header = prompt.pop()[0] if prompt and prompt[-1][1] == "header" else np.zeros(0, np.int64)
    is_text = (not tokenizer.decode([one]).isspace() for one in header.tolist())
    n_breaks = next((at for at, found in enumerate(is_text) if found), len(header))
    yield from ((ids, "prompt") for ids, _ in prompt)
    yield header[:n_breaks], "prompt"
    yield header[n_breaks:], "header"
    last = record.turns[-1]
    for text, names in ((last.response, ("response", "end")), (record.rejected or "", ("rejected", "rejected_end"))):
        turns = (*record.turns[:-1], last._replace(response=text))
        yield from zip(template.answer_ids(tokenizer, record._replace(turns=turns)), names, strict=True)
