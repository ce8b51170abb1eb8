"""Problems of records, collected over a whole source; and the text of a record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LISTED = 10
"""Bad records that an error lists; it counts all of them."""
POLICIES = ("refuse", "quarantine")


class BadRecord(NamedTuple):
    """A record that is left out."""

    place: str
    """`file:12`, or `file, record 12`"""
    reason: str


def checked_text(record: Mapping[str, Any], text_field: str) -> str:
    """The text of a record.

    Raises:
        ValueError: with the reason, if there is none.
    """
    if text_field not in record:
        raise ValueError(f"no field '{text_field}'; its fields: {', '.join(map(repr, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field '{text_field}' holds {type(text).__name__}, not a string")
    return text


class KindError(ValueError):
    """What is wrong with a record as with many others: one of each kind is shown, all are counted.

    Args:
        reason: for this record.
        kinds: what is wrong, in words that are the same for every such record.
        remedy: said once, at the end.
    """

    def __init__(self, reason: str, kinds: Sequence[str], remedy: str) -> None:
        super().__init__(reason)
        self.kinds, self.remedy = tuple(kinds), remedy

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.remedy}"

    @property
    def reason(self) -> str:
        return super().__str__()


class BadRecords:
    """What is wrong with the records of a source: all are counted, the first ten are kept, and in quarantine all.

    Args:
        policy: `refuse` (the first error names them) or `quarantine` (they are left out and kept in `quarantined`);
            None: they are refused, and there is no choice.
    """

    def __init__(self, policy: str | None = None) -> None:
        if policy not in (None, *POLICIES):
            raise ValueError(f"data.bad_records={policy!r} must be {' or '.join(POLICIES)}")
        self.policy = policy
        self.n, self.first = 0, list[str]()
        self.quarantined: list[BadRecord] = []
        self._kinds: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._remedies: dict[str, None] = {}

    def add(self, place: str, reason: object, full_place: str | None = None) -> None:
        """Count one; `full_place` names its file where `place` is short."""
        self.n += 1
        if self.policy == "quarantine":
            self.quarantined.append(BadRecord(full_place or place, str(reason)))
        if isinstance(reason, KindError):
            is_known = set(reason.kinds) <= self._counts.keys()
            self._counts.update(reason.kinds)
            self._remedies[reason.remedy] = None
            self._kinds.add(" ".join(reason.kinds))
            reason = reason.reason
            if is_known:
                return
        else:
            self._kinds.add(re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", str(reason)))  # the reason without names and numbers
        if len(self.first) < LISTED:
            self.first.append(f"{place}: {reason}")

    def refuse(self, source: str | Path, remedy: str = "", *, n_records: int | None = None) -> None:
        """Raise ValueError if there are any, with their number and the first ten; in quarantine, only if all are bad.

        Args:
            n_records: good and bad ones; where all are bad for one reason, one says enough.
        """
        if not self.n or (self.policy == "quarantine" and self.n != n_records):
            return
        kinds = [f"in all: {', '.join(f'{kind} ({n:,})' for kind, n in self._counts.most_common())}"]
        is_one = len(self._kinds) == 1 or len(self.first) == 1
        tails = [
            *(kinds if self.n > 1 and len(self._counts) > 1 else []),
            *self._remedies,
            *([remedy] if remedy else []),
            *(
                ["data.bad_records=quarantine leaves them out"]
                if self.policy == "refuse" and self.n != n_records
                else []
            ),
        ]
        tail = "".join(f"; {one}" for one in tails)
        if self.n == n_records and self.n > 1 and is_one:
            raise ValueError(f"{source}: all {self.n:,} records are bad, the first: {self.first[0]}{tail}")
        more = f" (the first {LISTED} of {self.n})" if self.n > LISTED else ""
        if self._counts and self.n > len(self.first):
            more = " (one of each kind is shown)"
        raise ValueError(f"{source}: {self.n} bad record{'s'[: self.n > 1]}{more}: {'; '.join(self.first)}{tail}")
