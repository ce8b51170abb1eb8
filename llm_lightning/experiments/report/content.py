"""What a report shows, from the entries: titles, tables, plots, commands; `study.html` lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from llm_lightning.experiments.report import commands, tables
from llm_lightning.experiments.report.drawing import Picture
from llm_lightning.experiments.report.entries import Entry, read_sweep
from llm_lightning.experiments.report.markdown import as_lines, code, escaped, paragraph
from llm_lightning.experiments.report.plots import pictures_of
from llm_lightning.experiments.report.study import Study
from llm_lightning.experiments.report.tables import Table
from llm_lightning.files.pages import render
from llm_lightning.terminal import inline, visible

TEMPLATE = Path(__file__).with_name("study.html")
COLOURED = ("failed", "died", "unreadable")


class Source(NamedTuple):
    """A folder of the report."""

    text: str
    command: str | None


class Part(NamedTuple):
    """A study on the page."""

    title: str
    best: str
    commands: Sequence[str]
    """That repeat the best setting."""
    groups: Table
    comparisons: Table | None
    pictures: Sequence[Picture]


class Content(NamedTuple):
    """All of a report."""

    title: str
    written: str
    sources: Sequence[Source]
    typed_in: str | None
    counts: str
    totals: str
    parts: Sequence[Part]
    jobs: Table
    failures: Table | None
    origins: Table


def content_of(folders: Sequence[Path], entries: Sequence[Entry], studies: Sequence[Study]) -> Content:
    """Collect it; only the plots take time."""
    typed_in = commands.typed_in(entries)
    parts = [_part(study) for study in studies if study.metric]  # the others are jobs whose settings are not known
    return Content(
        title=f"Report: {', '.join(map(name_of, folders))}",
        written=now(),
        sources=[_source(folder, entries, studies, typed_in) for folder in folders],
        typed_in=typed_in and visible(typed_in),
        counts=tables.counts(entries),
        totals=tables.totals(entries),
        parts=parts,
        jobs=tables.jobs_table(entries, studies),  # reads the curves, which may add problems
        failures=tables.failures_table(entries),
        origins=tables.origins_table(entries),
    )


def now() -> str:
    return datetime.now().astimezone().isoformat(" ", "minutes")


def name_of(folder: Path) -> str:
    return inline(folder.absolute().name)


def _source(folder: Path, entries: Sequence[Entry], studies: Sequence[Study], typed_in: str | None) -> Source:
    found = [entry for entry in entries if entry.source == str(folder)]
    swept = list(dict.fromkeys(key for entry in found for key in entry.swept))
    keys = swept or list(dict.fromkeys(key for study in studies for key in study.keys))
    what = f"{'swept' if swept else 'varying'}: {', '.join(keys) or 'nothing but the seed'}"
    command = commands.typed(read_sweep(folder).get("command"), typed_in)
    return Source(inline(f"{name_of(folder)}: {tables.counts(found)}; {what}"), command and visible(command))


def _part(study: Study) -> Part:
    return Part(
        title=inline(", ".join(filter(None, [study.task or "unknown task", study.metric]))),
        best=tables.best_line(study),
        commands=[visible(one) for one in commands.that_repeat(study.best)] if study.best else [],
        groups=tables.groups_table(study),
        comparisons=tables.comparisons_table(study),
        pictures=pictures_of(study),
    )


def as_html(content: Content) -> str:
    return render(TEMPLATE, title=content.title, report=content, texts_at=texts_at, statuses=COLOURED)


def texts_at(table: Table) -> list[int]:
    """Columns right of the first ones that hold texts, too."""
    return [index for index, heading in enumerate(table.headings) if heading in ("remark", "verdict")]


def as_markdown(content: Content) -> str:
    """The same without plots."""
    lines, where = [f"# {escaped(content.title)}", ""], content.typed_in
    for source in content.sources:
        lines += [paragraph(source.text), "", *(code([source.command]) if source.command else [])]
    lines += [escaped(f"{content.counts}. {content.totals}. Written {content.written}."), ""]
    for part in content.parts:
        lines += [f"## {escaped(part.title)}", "", f"**{escaped(part.best)}**", ""]
        if part.commands:
            lines += [f"The same again{f', typed in {escaped(where)}' if where else ''}:", "", *code(part.commands)]
        lines += as_lines(part.groups)
        lines += ["### The best and every other setting", "", *as_lines(part.comparisons)] if part.comparisons else []
    lines += ["## Jobs", "", *as_lines(content.jobs)]
    lines += ["## Not finished, or not readable", "", *as_lines(content.failures)] if content.failures else []
    lines += ["## Versions, data, code", "", *as_lines(content.origins)]
    return "\n".join(lines)
