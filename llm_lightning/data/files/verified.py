"""Large files of the cache: hashed when they are made, and again only after a change of their size or time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_lightning.data.files.signature import SETTLED, is_settled, signature_of
from llm_lightning.files.atomic import write_atomically


def is_as_verified(record: Path, files: Sequence[Path]) -> bool:
    """Whether files have the sizes and times that `record` keeps of when their content was known to be right."""
    try:
        return bool(json.loads(record.read_text(encoding="utf-8")) == _state(signature_of(files)))
    except (OSError, ValueError):
        return False


def keep_verified(record: Path, signature: list[list[Any]]) -> None:
    """Record that files had the right content: `signature` is from before they were hashed."""
    if is_settled(signature):
        with suppress(OSError):  # a cache that cannot be written: they are hashed again
            write_atomically(record, json.dumps(_state(signature)))


def backdate(file: Path) -> None:
    """Let a file that was just written look older, so that a change from now on shows in its time."""
    then = time.time_ns() - int(2e9 * SETTLED)
    os.utime(file, ns=(then, then))


def _state(signature: list[list[Any]]) -> list[list[Any]]:
    """Name, size and time: the folder of a cache may move."""
    return [[Path(path).name, size, changed] for path, size, changed, _ in signature]
