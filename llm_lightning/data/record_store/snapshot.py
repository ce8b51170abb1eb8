"""The files of a source as they were when they were hashed, so that what is read of them later is the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.data.files.find import Found
from llm_lightning.data.files.signature import is_settled, signature_of
from llm_lightning.data.records.rows import Source, files_of
from llm_lightning.files.atomic import cache_dir, sha256_of, write_atomically
from llm_lightning.files.columns import key_of, sealed, unsealed


class Snapshot(NamedTuple):
    """Which files there were, and what was in them."""

    found: Found
    signature: list[list[Any]]
    is_settled: bool
    content: list[str]
    """The sha256 of each file."""

    @classmethod
    def of(cls, source: Source, fields: Sequence[str] | None = None, *, verify: bool = False) -> Snapshot:
        """Look at the files of a source.

        Args:
            fields: see `files_of`.
            verify: hash them again.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        found = files_of(source, fields)
        signature = signature_of(found.files)  # before they are hashed
        settled = is_settled(signature)
        return cls(found, signature, settled, content_of(found.files, verify=verify))

    def check(self) -> None:
        """Raise ValueError if a file changed since; a file of the last seconds may do so without another signature."""
        is_same = signature_of(self.found.files) == self.signature
        if not is_same or (not self.is_settled and content_of(self.found.files, verify=True) != self.content):
            raise ValueError(f"{self.found.label} changed while it was being read; run again")


def content_of(files: Sequence[Path], *, verify: bool = False) -> list[str]:
    """The sha256 of each file, as it was while path, size, time and inode are as before; of a folder, of all its files.

    Args:
        verify: hash them again.
    """
    signature = signature_of(files)
    kept = cache_dir() / "contents" / f"{key_of(signature)}.json"
    if not verify and (known := unsealed(kept)) is not None:
        return list(known)
    settled = is_settled(signature)
    digests = [sha256_of(Path(path)) for path, *_ in signature]
    if settled and signature_of(files) == signature:
        with suppress(OSError):  # a cache that cannot be written: they are hashed again
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, sealed(digests))
    return digests
