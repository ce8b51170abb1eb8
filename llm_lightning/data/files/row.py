"""One record of a file, and where it stands."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A record, or what is wrong with it."""

    place: str
    """`line 12` of its file (from 1); `record 12` where records do not begin on lines of their own"""
    record: Any
    """a mapping of column or field to value; anything if something is wrong"""
    wrong: str | None
    """the reason why this is no record"""
    may_hold_cr: bool = True
    """whether its texts are searched for CRLF and CR"""
