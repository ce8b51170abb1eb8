"""Outputs of frozen parts of a model, computed once and kept on disk.

Frozen, deterministic lower blocks give the same rows for the same tokens in every epoch, restart and job of a sweep. A
cache belongs to one identity (weights, settings, number format); the digest of an example's content is its key. Missing
examples are computed under a lock and added as a new segment: a file of rows and an index, which is written last and is
complete or absent. The index names the code that computed the rows: rows of other code are computed again. No file is
ever modified, so any number of processes can read while one adds. The folder can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_lightning.files.atomic import cache_dir, commit, locked, sha256_of, write_atomically

CODE_VERSION = 1
"""Of the identity; never changed so far, because each segment has the digest of the code that computed it."""

MOST_TOUCHED = 1 << 22
"""Bytes read before mapped pages are released."""

_STORED = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.bfloat16: np.uint16}

log = logging.getLogger(__name__)


class FrozenCacheError(OSError):
    """The cache cannot be written; training can go on without it."""


class Segment(NamedTuple):
    """Rows of some examples, consecutive in a memory-mapped file."""

    rows: np.ndarray
    """(n, width); bfloat16 as its bits in uint16."""
    spans: dict[bytes, tuple[int, int]]
    """key -> (first row, last row + 1)"""


class FrozenCache:
    """Rows of examples by content key.

    Args:
        identity: plain values that determine the rows: digest of the weights, frozen depth, settings.
        width: values per row.
        dtype: float16, bfloat16, float32 or float64.
        code: digest of the code that computes the rows (`weights.digests.code_digest`).
        folder: default: `frozen` in the cache folder.
    """

    def __init__(
        self, identity: Mapping[str, Any], *, width: int, dtype: torch.dtype, code: str, folder: Path | None = None
    ) -> None:
        self.width, self.dtype, self.code = width, dtype, code
        facts = {**identity, "width": width, "dtype": str(dtype), "code": CODE_VERSION, "torch": torch.__version__}
        self._identity = json.dumps(facts, sort_keys=True, default=str, indent=1)
        key = hashlib.sha256(self._identity.encode()).hexdigest()[:32]
        self.folder = (folder or cache_dir() / "frozen") / key
        self._segments: dict[str, Segment | None] = {}  # None: of other code
        self._segment_of: dict[bytes, Segment] = {}
        self._bytes_read = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_segments": {}, "_segment_of": {}}  # another process opens its own memory maps

    def __len__(self) -> int:
        self._open()
        return len(self._segment_of)

    def __contains__(self, key: bytes) -> bool:
        self._open()
        return key in self._segment_of

    @property
    def n_bytes(self) -> int:
        """Size of all rows on disk."""
        self._open()
        return sum(segment.rows.nbytes for segment in self._segments.values() if segment is not None)

    def ensure(
        self,
        keys: Sequence[bytes],
        n_rows: Sequence[int],
        compute: Callable[[list[int]], Tensor],
        *,
        rows_per_batch: int,
        description: str,
    ) -> int:
        """Compute and store the rows of those `keys` that are missing.

        Of several processes, one computes and the others wait for its rows.

        Args:
            keys: one per example; equal keys mean equal rows.
            n_rows: rows of each example.
            compute: indices of examples -> their concatenated rows, (sum of their n_rows, width).
            rows_per_batch: most rows per call, padding to the longest example included.
            description: of the progress bar.

        Returns:
            the number of examples computed.

        Raises:
            FrozenCacheError: if the disk is too full or cannot be written.
            ValueError: if a row is not finite.
        """
        if not self._missing(keys):
            log.info("%s: all %d found in %s", description, len(keys), self.folder)
            return 0
        try:
            with locked(self.folder / "segments"):
                missing = self._missing(keys)  # another process may have added them meanwhile
                if missing:
                    self._add(missing, keys, n_rows, compute, rows_per_batch, description)
        except OSError as error:
            raise FrozenCacheError(
                f"cannot keep {description} in {self.folder}: {error.strerror or error}; make room there, or set "
                "LLM_LIGHTNING_CACHE to another folder"
            ) from error
        self._open()
        return len(missing)

    def rows(self, key: bytes) -> Tensor:
        """The rows of one example, (n_rows, width)."""
        segment = self._segment_of.get(key)
        if segment is None:
            self._open()
            segment = self._segment_of[key]
        start, end = segment.spans[key]
        return self._tensor(segment.rows[start:end])

    def batch(self, keys: Sequence[bytes], length: int) -> Tensor:
        """The rows of several examples, padded with zeros: (B, length, width)."""
        padded = torch.zeros(len(keys), length, self.width, dtype=self.dtype)
        for example, rows in zip(padded, map(self.rows, keys), strict=True):
            example[: len(rows)] = rows
        self._bytes_read += padded.nbytes
        if self._bytes_read > MOST_TOUCHED:
            self._release_pages()
        return padded

    # --- reading ---------------------------------------------------------------------------------------------------

    def _missing(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the missing examples, the first for each key."""
        self._open()
        first: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key not in self._segment_of:
                first.setdefault(key, index)
        return list(first.values())

    def _open(self) -> None:
        """Open segments added since the last call; a damaged one is renamed."""
        if not self.folder.is_dir():
            return
        for index in sorted(self.folder.glob("*.json")):
            if index.stem in self._segments or index.stem == "identity":
                continue
            try:
                segment = self._read(index)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s is damaged (%s): set aside, its rows are computed again", index, error)
                index.replace(index.with_suffix(".damaged"))
                continue
            self._segments[index.stem] = segment
            if segment is None:
                log.info("%s was computed by another version of the code: its rows are computed again", index)
            else:
                self._segment_of |= dict.fromkeys(segment.spans, segment)

    def _release_pages(self) -> None:
        """Release pages that were read: the system then counts them as its cache, not as memory of this process."""
        self._bytes_read = 0
        for segment in filter(None, self._segments.values()):
            mapped = getattr(segment.rows, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _read(self, index: Path) -> Segment | None:
        facts, data = json.loads(index.read_text()), index.with_suffix(".rows")
        if "code" in facts and facts["code"] != self.code:  # earlier versions did not write it down
            return None
        actual = sha256_of(data)
        if actual != facts["sha256"]:
            raise ValueError(f"its digest is {actual}, written was {facts['sha256']}")
        ends = np.cumsum(facts["n_rows"]).tolist()
        shape = (ends[-1], self.width)
        rows = np.memmap(data, dtype=_STORED[self.dtype], mode="r", shape=shape)
        keys = (bytes.fromhex(key) for key in facts["keys"])
        return Segment(rows, dict(zip(keys, zip([0, *ends[:-1]], ends, strict=True), strict=True)))

    def _tensor(self, rows: np.ndarray) -> Tensor:
        copy = torch.from_numpy(np.array(rows))
        return copy.view(torch.bfloat16) if self.dtype == torch.bfloat16 else copy

    # --- writing ---------------------------------------------------------------------------------------------------

    def _add(
        self,
        missing: list[int],
        keys: Sequence[bytes],
        n_rows: Sequence[int],
        compute: Callable[[list[int]], Tensor],
        rows_per_batch: int,
        description: str,
    ) -> None:
        missing.sort(key=lambda index: (n_rows[index], keys[index]))  # shortest first, always in the same order
        total = sum(n_rows[index] for index in missing)
        self._check_space(total * self.width * self.dtype.itemsize)
        for stray in [*self.folder.glob("*.tmp"), *self.folder.glob("*.rows")]:  # left by a process that was killed
            if not stray.with_suffix(".json").exists():
                stray.unlink()
        write_atomically(self.folder / "identity.json", self._identity + "\n")
        name = uuid.uuid4().hex
        data, temporary = self.folder / f"{name}.rows", self.folder / f"{name}.tmp"
        digest, bar = hashlib.sha256(), tqdm(total=total, desc=description, unit="row", leave=False, disable=None)
        try:
            with temporary.open("wb") as file, bar:
                for batch in _batches(missing, n_rows, rows_per_batch):
                    content = self._bytes_of(compute(batch), sum(n_rows[index] for index in batch), batch)
                    digest.update(content)
                    file.write(content)
                    bar.update(sum(n_rows[index] for index in batch))
                file.flush()
                os.fsync(file.fileno())
            commit(temporary, data)
        finally:
            temporary.unlink(missing_ok=True)
        facts = {
            "code": self.code,
            "sha256": digest.hexdigest(),
            "n_rows": [n_rows[index] for index in missing],
            "keys": [keys[index].hex() for index in missing],
        }
        write_atomically(self.folder / f"{name}.json", json.dumps(facts))
        log.info(
            "%s: computed for %d examples, %.0f MB in %s", description, len(missing), data.stat().st_size / 1e6, data
        )

    def _bytes_of(self, rows: Tensor, expected: int, batch: list[int]) -> bytes:
        assert rows.shape == (expected, self.width), f"{tuple(rows.shape)} rows for ({expected}, {self.width})"
        assert rows.dtype == self.dtype, f"{rows.dtype} rows for {self.dtype}"
        if not rows.isfinite().all():
            raise ValueError(f"the frozen part computes values that are not finite for one of the examples {batch}")
        rows = rows.detach().cpu().contiguous()
        return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy().tobytes()

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"{needed:,} bytes needed, {free:,} free")


def _batches(indices: Sequence[int], n_rows: Sequence[int], rows_per_batch: int) -> Iterable[list[int]]:
    """Batches of consecutive indices, at most `rows_per_batch` padded rows each; `n_rows` must be ascending."""
    batch: list[int] = []
    for index in indices:
        if batch and (len(batch) + 1) * n_rows[index] > rows_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
