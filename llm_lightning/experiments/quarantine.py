"""`bad_records.jsonl` in a run folder: the records that `data.bad_records=quarantine` left out, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llm_lightning.data.files.bad_records import BadRecord
from llm_lightning.files.atomic import write_atomically

BAD_RECORDS = "bad_records.jsonl"
"""File in a run folder: one JSON object for each record left out, its place and the reason."""


def write_bad_records(run_dir: Path, records: Sequence[BadRecord]) -> None:
    """Write the file, or remove that of an earlier start if no record was left out."""
    path = run_dir / BAD_RECORDS
    if records:
        lines = (json.dumps({"place": one.place, "reason": one.reason}, ensure_ascii=False) for one in records)
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(path, text.encode("utf-8", "backslashreplace"))  # a lone surrogate becomes JSON's escape
    else:
        path.unlink(missing_ok=True)
