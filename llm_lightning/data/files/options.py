"""How files are read where neither their names nor their first bytes say it: settings that every `conf/data` has."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class FileOptions:
    """See `conf/data/_files.yaml`.

    Args:
        format: text, json, jsonl, csv, tsv or parquet; None: by content and name.
        encoding: of text without a byte-order mark.
        separator: of the cells of a table; None: a comma, in .tsv a tab.
        header: whether the first line of a table names its columns; without, they are named 1, 2, ...
        quotes: whether quotation marks enclose cells; None: in .csv, not in .tsv.
        newlines: `lf` (CRLF and CR become LF) or `keep`.

    Raises:
        ValueError: if a value is none of these.
    """

    format: str | None = None
    encoding: str = "utf-8"
    separator: str | None = None
    header: bool = True
    quotes: bool | None = None
    newlines: str = "lf"

    def __post_init__(self) -> None:
        if self.newlines not in ("lf", "keep"):
            raise ValueError(f"data.newlines={self.newlines!r} must be lf or keep")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(
                f"data.encoding={self.encoding!r} is unknown; give one that Python knows, such as utf-8 or cp1252"
            ) from None
        if self.separator == "\\t":  # as it is typed
            object.__setattr__(self, "separator", "\t")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise ValueError(f"data.separator={self.separator!r} must be one character, such as ';' or a tab '\\t'")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> FileOptions:
        """Those among the settings `data.*` of a run; runs before there were any kept line ends."""
        known = {field.name: settings[field.name] for field in fields(cls) if field.name in settings}
        return cls(**{"newlines": "keep"} | known)


AS_THEY_ARE = FileOptions()
"""By content and name, UTF-8."""
