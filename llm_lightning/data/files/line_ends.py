"""Line ends: CRLF and CR become LF, in running text and in the texts of records, and a run says so once a file.

A tokenizer would learn tokens such as `\\r\\n`, and a model would answer with them.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def with_lf(value: Any) -> Any:
    """A value of JSON or of a table with LF alone in its texts; the same object if there is nothing to change."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
    if isinstance(value, dict):
        changed = {name: with_lf(one) for name, one in value.items()}
        return value if all(changed[name] is one for name, one in value.items()) else changed
    if isinstance(value, list):
        items = [with_lf(one) for one in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    return value


@lru_cache(maxsize=1024)
def say_changed(path: Path) -> None:
    """Say that line ends of a file became LF, once a file and process."""
    log.info("%s: CRLF and CR are read as LF; data.newlines=keep keeps them", path)
