"""List the runs in a folder: status, steps, time, best metric, and the settings that differ.

llm-lightning runs
llm-lightning runs outputs/sft --where status=failed
llm-lightning runs --where 'name=lr_*' --where task=sft,dpo --sort val/loss
llm-lightning runs --columns name,seed,test/accuracy --csv

A run is running, finished, stopped (saved before its last step), failed (with the reason), died (its process is gone
and left no reason), foreign (of another host, with the time since it last wrote), or unreadable (a damaged file).
Files are read only. From Python: llm_lightning.runs(folder) gives records for pandas.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.terminal import say, say_json, say_lines

if TYPE_CHECKING:
    from llm_lightning.experiments.run_status import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=Path("outputs"),
        help="its runs are listed, at any depth (default: outputs)",
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with that value: a fact (status=failed), a setting (optimizer.lr=1e-3), a metric; "
        "VALUE may have wildcards (name=lr_*) or alternatives (task=sft,dpo); may be given several times",
    )
    parser.add_argument("--sort", metavar="KEY", help="sort by a fact, setting or metric; --sort=-KEY: largest first")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--columns", metavar="KEY,KEY", help="show these facts, settings and metrics")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a line")
    output.add_argument("--csv", action="store_true", help="print comma-separated values, with a header")


def run(args: argparse.Namespace) -> None:
    from llm_lightning.experiments.run_list import ordered, read_runs, records, select
    from llm_lightning.experiments.run_table import table, terminal_width

    found = read_runs(args.folder)
    columns = [key.strip() for key in args.columns.split(",")] if args.columns is not None else None
    key = args.sort.removeprefix("-") if args.sort is not None else None
    if found:
        _refuse_unknown(found, columns, key)
    chosen = select(found, args.where)
    if key is not None:
        chosen = ordered(chosen, key, reverse=args.reverse != args.sort.startswith("-"))
    elif args.reverse:
        chosen.reverse()
    rows = records(chosen, every_setting=columns is not None)
    if args.json or args.csv:
        (_say_json if args.json else _say_csv)(rows, columns)
    elif not rows:
        say(f"no run in {args.folder} has {' and '.join(args.where)}" if found else f"no runs in {args.folder}")
    else:
        say_lines(table(rows, columns, terminal_width()))


def _refuse_unknown(found: Sequence[Run], columns: Sequence[str] | None, key: str | None) -> None:
    from llm_lightning.experiments.run_list import refuse_unknown

    refuse_unknown(found, columns or (), "--columns")
    refuse_unknown(found, [key] if key is not None else [], "--sort")


def _say_json(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> None:
    for row in rows:
        kept = row if columns is None else {key: row.get(key) for key in columns}
        say_json({key: _finite(value) for key, value in kept.items()})


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _say_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> None:
    from llm_lightning.experiments.run_status import FACTS

    text = io.StringIO()
    names = columns or list(dict.fromkeys([*FACTS, *(key for row in rows for key in row)]))
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    say(text.getvalue(), end="")
