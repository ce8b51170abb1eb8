"""Write a report: `report.html`, `report.md` and `results.csv` in one folder.

folders -> entries -> studies -> the three files; one run alone gets a page of its own
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm_lightning.experiments.report import content, one_run
from llm_lightning.experiments.report.entries import Entry, read_entries
from llm_lightning.experiments.report.records import as_csv
from llm_lightning.experiments.report.study import Study, studies_of
from llm_lightning.experiments.run_list import select
from llm_lightning.files.atomic import write_atomically

PAGE, MARKDOWN, RESULTS = "report.html", "report.md", "results.csv"


class Written(NamedTuple):
    """A report on the disk."""

    folder: Path
    entries: Sequence[Entry]
    studies: Sequence[Study]

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in (PAGE, MARKDOWN, RESULTS)]


def write_report(
    folders: Sequence[Path], output: Path | None = None, *, metric: str | None = None, where: Sequence[str] = ()
) -> Written:
    """Write the report of all runs in the folders, each of which is a group of its own if there are several.

    Args:
        output: the folder for the files; by default that of the runs, or the current one for several folders.
        metric: judge settings by it, not by what each run monitors.
        where: conditions `KEY=VALUE` that runs must fulfil.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.
        ValueError: if it holds no runs, or if the metric or a condition is wrong.
    """
    folders = list(dict.fromkeys(folders))
    entries = [entry for folder in folders for entry in _chosen(folder, where)]
    if not entries:
        which = f" with {' and '.join(where)}" if where else ""
        raise ValueError(f"no runs{which} in {', '.join(map(str, folders))}; give folders that hold runs")
    studies = studies_of(entries, metric)
    target = output or (folders[0] if len(folders) == 1 else Path())
    page, text = _pages(folders, entries, studies)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / RESULTS, as_csv(entries, studies))
    write_atomically(target / MARKDOWN, text)
    write_atomically(target / PAGE, page)
    return Written(target, entries, studies)


def _chosen(folder: Path, where: Sequence[str]) -> list[Entry]:
    entries = read_entries(folder, str(folder))
    if not where:
        return entries
    kept = {id(run) for run in select([entry.run for entry in entries], where)}
    return [entry for entry in entries if id(entry.run) in kept]


def _pages(folders: Sequence[Path], entries: Sequence[Entry], studies: Sequence[Study]) -> tuple[str, str]:
    if len(entries) == 1:
        run = one_run.content_of(entries[0])
        return one_run.as_html(run), one_run.as_markdown(run)
    report = content.content_of(folders, entries, studies)
    return content.as_html(report), content.as_markdown(report)
