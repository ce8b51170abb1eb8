"""A table of runs for the terminal, from the records of `run_list`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llm_lightning.experiments.run_list import as_text
from llm_lightning.experiments.run_status import FACTS, STATUSES
from llm_lightning.experiments.summary import duration
from llm_lightning.terminal import counted, inline, one_line

Record = Mapping[str, Any]
GAP = "  "
NARROWEST = 8
"""Characters to which a column of texts is shortened at most."""
NAME, REASON = 24, 32
"""Characters of these columns for which settings are left out."""


def table(records: Sequence[Record], columns: Sequence[str] | None = None, width: int | None = None) -> list[str]:
    """The lines of a table, numbers aligned right, and how many runs have each status.

    Args:
        records: from `run_list.records` or `llm_lightning.runs`.
        columns: keys of the records; by default what fits: name, status, steps, time, best metric, settings, reason.
        width: of the terminal; longer texts are shortened. None: no limit.
    """
    if not records:
        return ["0 runs"]
    left_out: list[str] = []
    if columns is None:
        columns, left_out = _default_columns(records, width)
    grid = [[_heading(key, records) for key in columns]]
    grid += [[inline(_cell(key, record)) for key in columns] for record in records]
    are_texts = [any(isinstance(_value(key, record), str) for record in records) for key in columns]
    widths = _fitted([max(map(len, cells)) for cells in zip(*grid, strict=True)], are_texts, width)
    lines = [GAP.join(map(_placed, row, widths, are_texts)).rstrip() for row in grid]
    more = [f"settings that differ too: {', '.join(left_out)} (--columns)"] if left_out else []
    return [*lines, *(one_line(line, width) for line in more), counts(records)]


def counts(records: Sequence[Record]) -> str:
    """`12 runs: 9 finished, 3 failed`."""
    of_status = Counter(record["status"] for record in records)
    parts = [f"{of_status[status]:,} {status}" for status in STATUSES if of_status[status]]
    return f"{counted(len(records), 'run')}: {', '.join(parts)}"


def _default_columns(records: Sequence[Record], width: int | None) -> tuple[list[str], list[str]]:
    """The columns, and settings for which there is no room."""
    tasks, monitors = ({record[key] for record in records} for key in ("task", "monitor"))
    before = ["name", "status", *["task"] * (len(tasks) > 1), "steps", "seconds"]
    before += [*["monitor"] * (len(monitors - {None}) > 1), "best_value"]
    after = ["reason"] if any(record["reason"] for record in records) else []
    settings = _telling(records)
    shown = list(settings)
    while shown and width is not None and _least_width([*before, *shown, *after], records) > width:
        shown.pop()
    return [*before, *shown, *after], [key for key in settings if key not in shown]


def _telling(records: Sequence[Record]) -> list[str]:
    """Settings, without those that differ exactly as an earlier one does: `scheduler.min_lr` follows `optimizer.lr`."""
    seen: set[tuple[int, ...]] = set()
    chosen = []
    for key in dict.fromkeys(key for record in records for key in record):
        if key in FACTS or "/" in key:
            continue
        numbers: dict[str, int] = {}
        texts = [json.dumps(record.get(key), default=str) for record in records]
        pattern = tuple(numbers.setdefault(text, len(numbers)) for text in texts)
        if pattern not in seen:
            chosen.append(key)
        seen.add(pattern)
    return chosen


def _least_width(columns: Sequence[str], records: Sequence[Record]) -> int:
    limits = {"name": NAME, "reason": REASON}
    widest = [max(len(_cell(key, record)) for record in records) for key in columns]
    cells = [max(len(_heading(key, records)), widest) for key, widest in zip(columns, widest, strict=True)]
    shown = [min(cell, limits.get(key, cell)) for key, cell in zip(columns, cells, strict=True)]
    return sum(shown) + len(GAP) * (len(columns) - 1)


def _fitted(widths: list[int], are_texts: Sequence[bool], limit: int | None) -> list[int]:
    """Widths of columns that together keep to the limit, the longest texts shortened first."""
    widths = list(widths)
    while limit is not None and sum(widths) + len(GAP) * (len(widths) - 1) > limit:
        longest = max((size, index) for index, size in enumerate(widths) if are_texts[index] or size == max(widths))
        if longest[0] <= NARROWEST:
            break
        widths[longest[1]] -= 1
    return widths


def _placed(cell: str, width: int, is_text: bool) -> str:
    cell = one_line(cell, width)
    return cell.ljust(width) if is_text else cell.rjust(width)


def _heading(key: str, records: Sequence[Record]) -> str:
    monitors = {record["monitor"] for record in records} - {None}
    if key == "best_value" and len(monitors) == 1:
        return f"best {monitors.pop()}"
    return inline({"seconds": "time"}.get(key, key))


def _value(key: str, record: Record) -> Any:
    return None if key in ("steps", "seconds") else record.get(key)


def _cell(key: str, record: Record) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if key == "steps":
        total = record["total_steps"]
        return f"{value:,}/{total:,}" if total is not None else f"{value:,}"
    if key == "seconds":
        return duration(value)
    if key == "best_value" or "/" in key:
        return _figure(value)
    return as_text(value)


def _figure(value: Any) -> str:
    if not isinstance(value, float):
        return as_text(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
