"""Write a report about runs: a page with tables and plots, a Markdown file and a CSV file.

llm-lightning report outputs/sweeps/study
llm-lightning report outputs/sweeps/adamw outputs/sweeps/muon -o outputs/adamw_and_muon
llm-lightning report outputs/pretraining/my_run

Runs that differ only in their seed are one setting: mean, 95% interval, number of seeds. The best by validation is
compared with every other setting over the seeds that both have, corrected for the number of comparisons. Several
folders are compared with each other; one run alone gets a page about it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_lightning.terminal import say, say_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="a sweep, any folder of runs, or a run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        type=Path,
        help="write report.html, report.md and results.csv there (default: FOLDER; of several, the current folder)",
    )
    parser.add_argument(
        "--metric", help="judge settings by this validation metric (default: what the runs monitor, at its best)"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with that value, as in `llm-lightning runs`; may be given several times",
    )


def run(args: argparse.Namespace) -> None:
    from llm_lightning.experiments.report.tables import best_line, counts
    from llm_lightning.experiments.report.writing import write_report

    written = write_report(args.folders, args.output, metric=args.metric, where=args.where)
    say(counts(written.entries))
    say_lines(best_line(study) for study in written.studies)
    say_lines(f"wrote {path}" for path in written.paths)
