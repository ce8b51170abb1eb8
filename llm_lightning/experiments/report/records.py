"""`results.csv`: one row a job, for programs and spreadsheets.

A text that a spreadsheet would take for a formula gets an apostrophe in front (OWASP, "CSV injection").
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from llm_lightning.experiments.report.entries import Entry, is_number
from llm_lightning.experiments.report.study import FOLDER, SEED, Study
from llm_lightning.experiments.run_status import FACTS
from llm_lightning.terminal import inline

FORMULA = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}", "\N{FULLWIDTH HYPHEN-MINUS}",
           "\N{FULLWIDTH COMMERCIAL AT}", "\t", "\r", "\n")  # fmt: skip
"""What a cell must not begin with."""


def as_csv(entries: Sequence[Entry], studies: Sequence[Study]) -> str:
    """The facts of each job, its varying settings, and all its metrics."""
    keys = list(dict.fromkeys([SEED, *(key for study in studies for key in study.keys if key != FOLDER)]))
    rows = [_row(entry, keys) for entry in entries]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _row(entry: Entry, keys: Sequence[str]) -> dict[str, Any]:
    item, n_items, rate = entry.items
    facts = {key: entry.run.facts[key] for key in FACTS} | {"monitor": entry.monitor}
    speed = {f"{item}s": n_items, f"{item}s_per_second": rate, "peak_memory_gib": entry.peak_memory}
    settings = {key: entry.settings.get(key) for key in keys}
    return facts | settings | speed | dict(sorted(entry.run.metrics.items()))


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return "" if value is None else json.dumps(value)
    if isinstance(value, (int, float)):
        return value if is_number(value) else f"{value}"
    text = inline(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) or str(value).startswith(FORMULA) else text
