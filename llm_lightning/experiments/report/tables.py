"""The tables of a report, as texts: the same on the page and in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_lightning.experiments.report.entries import WAITING, Entry
from llm_lightning.experiments.report.study import Estimate, Group, Study, short_names, shown
from llm_lightning.experiments.run_status import STATUSES
from llm_lightning.experiments.summary import duration
from llm_lightning.metrics.paired import Comparison
from llm_lightning.terminal import counted, inline

NONE = "\N{EN DASH}"
MOST_COMPARED = 60
"""Rows of a table of comparisons."""
OVER_SEEDS = "95% t interval over seeds"
OVER_RECORDS = "95% Wilson interval over test records"


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_texts: int = 1
    """Columns at the left that are texts; the others are aligned right."""
    marked: Sequence[int] = ()
    """Rows that stand out."""
    note: str = ""


def groups_table(study: Study) -> Table:
    """One row a setting, the best first."""
    short = short_names(study.keys)
    metrics = [study.metric, *study.tested]
    headings = [*(short[key] for key in study.keys), *[""] * (not study.keys), "n"]
    headings += [text for metric in metrics for text in (f"{metric}, mean", OVER_SEEDS)]
    rows = [[*_settings(group, study), *_estimates(group, metrics), remark(group, study)] for group in study.groups]
    best = [index for index, group in enumerate(study.groups) if group is study.best]
    direction = {"min": "smaller is better", "max": "larger is better"}.get(study.mode or "", "no direction is known")
    note = f"n: seeds. {OVER_SEEDS[0].upper()}{OVER_SEEDS[1:]}, not over records; {study.metric}: {direction}."
    return Table([*headings, "remark"], rows, max(1, len(study.keys)), best, note)


def _settings(group: Group, study: Study) -> list[str]:
    return [shown(key, group.settings[key]) for key in study.keys] or [group.name]


def _estimates(group: Group, metrics: Sequence[str]) -> list[str]:
    estimates = [group.estimate(metric) for metric in metrics]
    return [str(len(group.values)), *(text for one in estimates for text in (figure(one.mean), interval(one)))]


def remark(group: Group, study: Study) -> str:
    """Why a group is not ranked, or that it is the best."""
    lost = Counter(entry.status for entry in group.lost)
    if lost:
        ways = ", ".join(f"{n} {'without a value' if status == 'finished' else status}" for status, n in lost.items())
        return f"lacks {counted(sum(lost.values()), 'seed')} ({ways}): not ranked"
    if len(group.values) < study.full:
        return f"only {len(group.values)} of {study.full} seeds: not ranked"
    if group is not study.best or len(study.groups) == 1:
        return ""
    return "the only one ranked" if study.is_alone else "best"


def comparisons_table(study: Study) -> Table | None:
    """The best setting with every other; None if there is nothing to compare."""
    if study.best is None or not study.comparisons:
        return None
    n_groups = len(study.groups)
    n_pairs = n_groups * (n_groups - 1) // 2
    headings = ["setting", "verdict", "common seeds", "difference from the best", "95% t interval of this pair alone"]
    headings += ["p, corrected", "gap that would have been found"]
    rows = [_compared(one) for one in study.comparisons[:MOST_COMPARED]]
    left_out = len(study.comparisons) - len(rows)
    corrected = f"corrected (Holm) over all {n_pairs:,} pairs of settings, since the best was chosen by the data"
    note = (
        f"Paired over common seeds; p of a paired t test, {corrected if n_pairs > 1 else 'of the only pair'}. "
        f"Difference in {study.metric}: setting minus best."
    )
    note += f" {counted(left_out, 'setting')} more, further from the best, not shown." if left_out else ""
    return Table([*headings], rows, 2, (), note)


def _compared(one: Comparison) -> list[str]:
    verdict = f"not judged: {one.reason}" if one.reason else "differs" if one.differs else "no difference found"
    return [
        one.b,
        verdict,
        str(one.n),
        figure(one.difference, signed=True),
        f"{figure(one.low, signed=True)} to {figure(one.high, signed=True)}" if math.isfinite(one.low) else NONE,
        NONE if math.isnan(one.p) else f"{one.p:.3f}" if one.p >= 0.001 else "< 0.001",
        NONE if math.isnan(one.detectable) else figure(one.detectable),
    ]


def jobs_table(entries: Sequence[Entry], studies: Sequence[Study]) -> Table:
    """One row a job: status, steps, value, time, speed, memory."""
    metrics = list(dict.fromkeys(study.metric for study in studies if study.metric))
    tested = list(dict.fromkeys(name for study in studies for name in study.tested))
    items = sorted({entry.items[0] for entry in entries if entry.summary}) or ["token"]
    headings = ["job", "status", "steps", *metrics, *tested, "time"]
    headings += [text for item in items for text in (f"{item}s", f"{item}s/s")] + ["peak memory, GiB"]
    names = _names(entries)
    rows = [[name, *_job(entry, metrics, tested, items)] for name, entry in zip(names, entries, strict=True)]
    has_wilson = any(f"{name}_low" in entry.run.metrics for entry in entries for name in tested)
    return Table(headings, rows, 2, (), f"In brackets: {OVER_RECORDS}." if has_wilson else "")


def _job(entry: Entry, metrics: Sequence[str], tested: Sequence[str], items: Sequence[str]) -> list[str]:
    facts, (item, n_items, rate) = entry.run.facts, entry.items
    total, seconds = facts["total_steps"], facts["seconds"]
    row = [entry.status, f"{facts['steps']:,}" + (f" / {total:,}" if total is not None else "")]
    row += [
        figure(entry.value(metric) if metric == entry.monitor or entry.monitor is None else None) for metric in metrics
    ]
    row += [_with_wilson(entry.run.metrics, name) for name in tested]
    row.append(NONE if seconds is None else duration(seconds))
    row += [text for one in items for text in ((whole(n_items), whole(rate)) if one == item else (NONE, NONE))]
    return [*row, NONE if entry.peak_memory is None else f"{entry.peak_memory:.2f}"]


def _names(entries: Sequence[Entry]) -> list[str]:
    """The name of each job; with its folder, if there are several."""
    several = len({entry.source for entry in entries}) > 1
    return [str(entry.folder) if several else entry.name for entry in entries]


def _with_wilson(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    wilson = f" [{figure(low)}, {figure(high)}]" if low is not None and high is not None else ""
    return figure(metrics.get(name)) + wilson


def failures_table(entries: Sequence[Entry]) -> Table | None:
    """What has not finished, and why."""
    named = list(zip(_names(entries), entries, strict=True))
    rows = [
        [name, entry.status, str(entry.run.facts["reason"] or STATUSES.get(entry.status, "not begun"))]
        for name, entry in named
        if entry.status != "finished"
    ]
    rows += [[name, entry.status, problem] for name, entry in named for problem in dict.fromkeys(entry.problems)]
    return Table(["job", "status", "reason"], rows, 3) if rows else None


def origins_table(entries: Sequence[Entry]) -> Table:
    """Versions, devices, data and code, with the number of runs of each."""
    seen: dict[str, Counter[str]] = {}
    for entry in entries:
        for name, value in _origins(entry):
            seen.setdefault(name, Counter())[value] += 1
    rows = [[name, value, str(n)] for name, values in seen.items() for value, n in values.items()]
    return Table(["", "", "runs"], rows, 2)


def _origins(entry: Entry) -> Iterable[tuple[str, str]]:
    summary = entry.summary
    for name, version in _mapping(summary, "versions").items():
        yield str(name), str(version)
    for name in ("device", "host", "precision", "processes"):
        if summary.get(name) is not None:
            yield name, str(summary[name])
    git = summary.get("git")
    if isinstance(git, dict):
        yield "git commit", f"{git.get('commit')}{', with changes since' if git.get('dirty') else ''}"
    elif summary:
        yield "git commit", "no repository"
    lineage = _mapping(summary, "lineage")
    if lineage.get("data") is not None:
        yield "data, sha256", str(lineage["data"])
    if lineage.get("parent") is not None:
        yield "first weights, sha256", f"{lineage['parent']} ({lineage.get('parent_name')})"


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def counts(entries: Sequence[Entry]) -> str:
    """`12 jobs: 9 finished, 3 failed`."""
    of_status = Counter(entry.status for entry in entries)
    parts = [f"{of_status[one]:,} {one}" for one in (*STATUSES, WAITING) if of_status[one]]
    return f"{counted(len(entries), 'job')}: {', '.join(parts) or 'none'}"


def totals(entries: Sequence[Entry]) -> str:
    """Time and items of all jobs together."""
    seconds = math.fsum(entry.run.facts["seconds"] or 0 for entry in entries)
    items = Counter[str]()
    for entry in entries:
        name, n, _ = entry.items
        items[f"{name}s"] += n or 0
    parts = [f"{n:,} {name}" for name, n in items.items() if n]
    return ", ".join([f"{duration(seconds)} of training", *parts])


def best_line(study: Study) -> str:
    """The best setting in one sentence, with its test metrics."""
    best = study.best
    if best is None:
        return f"{study.metric or 'no metric'}: no setting can be ranked yet"
    parts = [f"{study.metric} {with_interval(best.estimate(study.metric))}"]
    parts += [f"{name} {with_interval(best.estimate(name))}" for name in study.tested]
    n_ranked = sum(map(study.is_ranked, study.groups))
    others = len(study.groups) - n_ranked
    what = "the only setting ranked" if study.is_alone else f"best of {counted(n_ranked, 'setting')}"
    what += f" ({counted(others, 'other')} not ranked)" if others else ""
    return inline((f"{what}: {best.name}; " if len(study.groups) > 1 else "") + ", ".join(parts))


def with_interval(one: Estimate) -> str:
    n = "one seed" if one.n == 1 else f"n = {one.n}"
    inside = f"{interval(one)}, {n}" if one.n > 1 else n
    return f"{figure(one.mean)} ({inside})"


def interval(one: Estimate) -> str:
    return f"{figure(one.low)} to {figure(one.high)}" if math.isfinite(one.low) else NONE


def figure(value: float | None, *, signed: bool = False) -> str:
    """Four decimals; four digits of what is very small or large."""
    if value is None or math.isnan(value):
        return NONE
    form = ".4f" if value == 0 or 1e-3 <= abs(value) < 1e6 else ".4g"
    return f"{value:{'+' * signed}{form}}"


def whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"
