"""A table of runs for the terminal, from the records of `run_list`."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llm_lightning.experiments.run_list import as_text
from llm_lightning.experiments.run_status import FACTS, STATUSES
from llm_lightning.experiments.summary import duration
from llm_lightning.terminal import counted, inline, one_line

Record = Mapping[str, Any]
GAP = "  "
NARROWEST, NAME = 8, 24
"""Characters to which a text is shortened at most, and the name of a run before settings are left out."""
WHOLE = ("status", "task")
"""Texts that are never shortened."""


def table(records: Sequence[Record], columns: Sequence[str] | None = None, width: int | None = None) -> list[str]:
    """The lines of a table, numbers aligned right, and how many runs have each status.

    Args:
        records: from `run_list.records` or `llm_lightning.runs`.
        columns: keys of the records; by default what fits: name, status, steps, time, best metric, settings, reason.
            Reasons for which there is no room follow the table.
        width: of the terminal; longer texts are shortened. None: no limit.
    """
    if not records:
        return ["0 runs"]
    after: list[str] = []
    if columns is None:
        columns, left_out = _default_columns(records, width)
        after = [f"settings that differ too: {', '.join(left_out)} (--columns)"] if left_out else []
        if "reason" not in columns:
            after += [f"{record['name']}: {record['reason']}" for record in records if record["reason"]]
    return [*rows_of(records, columns, width), *map(one_line, after), counts(records)]


def rows_of(records: Sequence[Record], columns: Sequence[str], width: int | None) -> list[str]:
    """The heading, and a line for each record, which needs a `monitor` besides the columns."""
    grid = [[_cell(key, record) for key in columns] for record in records]
    headings = [_heading(key, records) for key in columns]
    are_texts = [any(isinstance(record.get(key), str) for record in records) for key in columns]
    widths = _fitted(columns, headings, grid, are_texts, width)
    return [GAP.join(map(_placed, columns, row, widths, are_texts)).rstrip() for row in (headings, *grid)]


def terminal_width() -> int | None:
    """Characters of a line of standard output; None if it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def counts(records: Sequence[Record]) -> str:
    """`12 runs: 9 finished, 3 failed`."""
    of_status = Counter(record["status"] for record in records)
    parts = [f"{of_status[status]:,} {status}" for status in STATUSES if of_status[status]]
    return f"{counted(len(records), 'run')}: {', '.join(parts)}"


def _default_columns(records: Sequence[Record], width: int | None) -> tuple[list[str], list[str]]:
    """The columns, and the settings for which there is no room."""
    tasks, monitors = ({record[key] for record in records} for key in ("task", "monitor"))
    columns = ["name", "status", *["task"] * (len(tasks) > 1), "steps", "seconds"]
    columns += [*["monitor"] * (len(monitors - {None}) > 1), "best_value"]
    sizes = {key: _size(key, records) for key in (*columns, *_telling(records), "reason")}
    sizes["name"] = min(sizes["name"], NAME)
    room = (math.inf if width is None else width) - sum(sizes[key] + len(GAP) for key in columns) + len(GAP)
    settings = [key for key in sizes if key not in (*columns, "reason")]
    for key in [*settings, *["reason"] * any(record["reason"] for record in records)]:
        room -= sizes[key] + len(GAP)
        if room < 0:
            break
        columns.append(key)
    return columns, [key for key in settings if key not in columns]


def _size(key: str, records: Sequence[Record]) -> int:
    return max(len(_heading(key, records)), *(len(_cell(key, record)) for record in records))


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


def _fitted(
    columns: Sequence[str],
    headings: Sequence[str],
    grid: Sequence[Sequence[str]],
    are_texts: Sequence[bool],
    width: int | None,
) -> list[int]:
    """Widths of columns that together keep to the limit: long texts are shortened, the longest first, not numbers."""
    cells = [max(map(len, column)) for column in zip(*grid, strict=True)]
    widths = [max(len(heading), cell) for heading, cell in zip(headings, cells, strict=True)]
    floors = [
        min(NARROWEST, cell) if is_text and key not in WHOLE else cell
        for key, cell, is_text in zip(columns, cells, are_texts, strict=True)
    ]
    while width is not None and sum(widths) + len(GAP) * (len(widths) - 1) > width:
        longest = max(range(len(widths)), key=lambda index: (widths[index] > floors[index], widths[index]))
        if widths[longest] <= floors[longest]:
            break
        widths[longest] -= 1
    return widths


def _placed(key: str, cell: str, width: int, is_text: bool) -> str:
    if key in ("name", "folder") and len(cell) > width:
        cell = f"...{cell[len(cell) - width + 3 :]}"  # jobs of a sweep differ in their last words
    cell = one_line(cell, max(width, len(GAP) + 2))[:width]
    return cell.ljust(width) if is_text else cell.rjust(width)


def _heading(key: str, records: Sequence[Record]) -> str:
    monitors = {record["monitor"] for record in records} - {None}
    if key == "best_value" and len(monitors) == 1:
        return inline(f"best {monitors.pop()}")
    return inline({"seconds": "time"}.get(key, key))


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
    return inline(as_text(value))


def _figure(value: Any) -> str:
    if not isinstance(value, float):
        return as_text(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
