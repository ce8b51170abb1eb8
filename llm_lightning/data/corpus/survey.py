"""What a whole source holds, and its record in the cache, which spares a second start the reading.

A record is used while path, size, time of change and inode of all files, and the way they are read, are as they were.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_lightning.data.control_words import WordCount
from llm_lightning.data.corpus.readers import Document, Reader
from llm_lightning.data.files.bad_records import BadRecord
from llm_lightning.files.atomic import cache_dir, write_atomically

FORMAT = 1
"""Of a record. Raise it when files are read differently: what an earlier version read is then read again."""

log = logging.getLogger(__name__)


@dataclass
class Survey:
    """The result of reading a whole source strictly; 24 bytes per document."""

    digest: str = ""
    """sha256 over the sha256 of each document's UTF-8 text: the same content has the same digest wherever it is."""
    n_documents: int = 0
    n_chars: int = 0
    n_bytes: int = 0
    keys: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    """First 64 bits of the sha256 of the text that decides each document's side of a split."""
    contents: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    """First 64 bits of the sha256 of each document's text."""
    lengths: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    """Characters of each document."""
    control_words: Counter[str] = field(default_factory=Counter)
    """How often each is spelt out."""
    quarantined: list[BadRecord] = field(default_factory=list)
    """Records that were left out."""
    notes: list[str] = field(default_factory=list)
    """What to say about the reading, at every start."""


ARRAYS = ("keys", "contents", "lengths")


def surveyed(documents: Iterable[Document]) -> Survey:
    """Read all documents."""
    found, whole, words = Survey(), hashlib.sha256(), WordCount()
    for document in documents:
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
        found.contents.append(int.from_bytes(content.digest()[:8], "big"))
        found.lengths.append(n_chars)
    found.digest, found.control_words = whole.hexdigest(), words.found
    found.n_documents, found.n_chars = len(found.lengths), sum(found.lengths)
    return found


def record_of(readers: Sequence[Reader], policy: str) -> Path:
    """The file of the cache for what `readers` read."""
    ways = [[type(reader).__name__, asdict(reader)] for reader in readers]  # type: ignore[call-overload]
    spec = json.dumps([FORMAT, policy, ways], sort_keys=True, default=lambda path: str(path.absolute()))
    return cache_dir() / "surveys" / f"{hashlib.sha256(spec.encode()).hexdigest()[:32]}.npz"


def recorded(record: Path, signature: list[list[Any]]) -> Survey | None:
    """The survey of a record, if the files are as they were; None if they are not, or there is no whole record."""
    try:
        with np.load(record, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            if facts.pop("signature") != signature:
                return None
            arrays = {name: array("Q", stored[name].astype("<u8", copy=False).tobytes()) for name in ARRAYS}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): reading the files again", record, error)
        return None
    facts["control_words"] = Counter(facts["control_words"])
    facts["quarantined"] = [BadRecord(*bad) for bad in facts["quarantined"]]
    return Survey(**facts | arrays)


def keep(survey: Survey, record: Path, signature: list[list[Any]]) -> None:
    """Write a record; a cache that cannot be written costs the next start its time, nothing else."""
    facts = {name: value for name, value in vars(survey).items() if name not in ARRAYS}
    text = json.dumps({**facts, "signature": signature})
    arrays = {name: np.frombuffer(getattr(survey, name), dtype=np.uint64) for name in ARRAYS}
    content = io.BytesIO()
    np.savez(content, facts=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, content.getvalue())
