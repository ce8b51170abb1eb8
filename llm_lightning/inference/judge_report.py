"""Reports on a file of responses: scores, pairwise comparisons, or similarity to the references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_lightning.data.files.bad_records import LISTED
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.records.placed import placed_records
from llm_lightning.files.atomic import write_atomically, write_figure
from llm_lightning.inference.judging import compare_responses, score_responses
from llm_lightning.metrics.answers import chrf, exact_match, most_frequent_answer_score, rouge_l
from llm_lightning.metrics.intervals import mean_interval, wilson_interval
from llm_lightning.metrics.judge.client import (
    FAILED,
    OUTCOMES,
    SCORED,
    TEMPERATURE,
    TIMEOUT,
    UNPARSABLE,
    Judge,
    Verdict,
)
from llm_lightning.metrics.judge.prompts import PAIR_PROMPT, PROMPTS, ScorePrompt
from llm_lightning.metrics.judge.summaries import PairSummary, ScoreSummary, summarise_pairs, summarise_scores
from llm_lightning.terminal import aligned, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RESPONSE = "model_response"
WIDTH = 60


class Responses(NamedTuple):
    """The valid records of a file."""

    path: Path
    records: list[dict[str, Any]]
    columns: list[str]
    """of responses"""


class Report(NamedTuple):
    """The results for one file, to write and to print."""

    summary: dict[str, Any]
    records: list[dict[str, Any]]
    """in their order"""
    lines: list[str]
    figure: Figure | None = None


def read_responses(
    path: Path, columns: Sequence[str] | None = None, limit: int | None = None, options: FileOptions | None = None
) -> Responses:
    """Read records with columns of responses; None: all columns that start with `model_response`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, record and field of everything that is wrong, the first ten.
    """
    found = placed_records(path, options)[:limit]
    chosen = _columns(path, [one.record for one in found], columns)
    bad = []
    for number, (record, place) in enumerate(found, start=1):
        wrong = _problem(record, chosen)
        if wrong is not None:
            where = place.removeprefix(str(path)).lstrip(":, ")
            bad.append(f"record {number}{f' (line {where})' if where.isdigit() else ''}: {wrong}")
    if bad:
        more = f" (the first {LISTED} of {len(bad)})" if len(bad) > LISTED else ""
        raise ValueError(f"{path}: {len(bad)} bad record{'s'[: len(bad) > 1]}{more}: {'; '.join(bad[:LISTED])}")
    return Responses(path, [one.record for one in found], chosen)


def _columns(path: Path, records: Sequence[dict[str, Any]], wanted: Sequence[str] | None) -> list[str]:
    names = list(dict.fromkeys(name for record in records for name in record))
    there_are = f"there are {', '.join(map(repr, names)) or 'none'}"
    if wanted is None:
        found = [name for name in names if name.startswith(RESPONSE)]
        if not found:
            raise ValueError(f"{path}: no field starts with {RESPONSE}; name one with --column, {there_are}")
        return found
    for name in wanted:
        if name not in names:
            raise ValueError(f"{path}: no field {name!r} (--column); {there_are}")
    return list(dict.fromkeys(wanted))


def _problem(record: dict[str, Any], columns: Sequence[str]) -> str | None:
    for name in ("instruction", "output", *columns):
        if name not in record:
            return f"no field {name!r}; there are {', '.join(map(repr, record)) or 'none'}"
        if not isinstance(record[name], str):
            return f"field {name!r} holds {type(record[name]).__name__}, not text"
    if not isinstance(record.get("input") or "", str):
        return f"field 'input' holds {type(record['input']).__name__}, not text"
    return None


def score_report(judge: Judge, file: Responses, name: str) -> Report:
    prompt = PROMPTS[name]
    verdicts = {column: score_responses(judge, file.records, column, prompt) for column in file.columns}
    summaries = {column: summarise_scores(found, prompt) for column, found in verdicts.items()}
    rows, remarks = [["column", "mean", "95% interval", *OUTCOMES, "of"]], []
    for column, summary in summaries.items():
        rows.append([column, *_cells(summary, digits=2)])
        remarks += _interval_remark(column, summary, f"{prompt.lowest}", f"{prompt.highest}")
    remarks += _failure_remarks([one for found in verdicts.values() for one in found])
    settings = {"prompt": name, "prompt_text": prompt.text, "scale": [prompt.lowest, prompt.highest]}
    title = f"{file.path}: judged by {judge.model}, prompt {name} ({prompt.lowest} to {prompt.highest})"
    return Report(
        summary={
            **_about(judge, file), **settings, "columns": {column: asdict(one) for column, one in summaries.items()}
        },
        records=[
            {column: _plain(found[index], "score") for column, found in verdicts.items()}
            for index in range(len(file.records))
        ],
        lines=[title, *aligned(rows), *remarks],
        figure=_histogram(verdicts, prompt),
    )  # fmt: skip


def _histogram(verdicts: dict[str, list[Verdict]], prompt: ScorePrompt) -> Figure:
    """Records per score, one panel per column."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7, 1 + 3 * len(verdicts)), layout="constrained")
    panels = figure.subplots(len(verdicts), sharex=True, squeeze=False)[:, 0]
    width = max(1, (prompt.highest - prompt.lowest) // 20)
    edges = [score - 0.5 for score in range(prompt.lowest, prompt.highest + width + 1, width)]
    for axes, (column, found) in zip(panels, verdicts.items(), strict=True):
        scores = [one.value for one in found if one.value is not None]
        axes.hist(scores, bins=edges, edgecolor="white")
        axes.set_title(f"{column}: {len(scores):,} of {len(found):,} records scored")
        axes.set_ylabel("records")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("score")
    return figure


def pair_report(judge: Judge, file: Responses) -> Report:
    first, second = file.columns
    found = compare_responses(judge, file.records, first, second)
    summary = summarise_pairs(found)
    tallies = [f"{count:,}" for count in (summary.wins, summary.ties, summary.losses)]
    rows = [
        ["wins", "ties", "losses", "win rate", "95% interval", *OUTCOMES, "of"],
        [*tallies, *_cells(summary, digits=3)],
    ]
    remarks = _interval_remark("win rate", summary, "a loss", "a win")
    if summary.decided:
        share = f"{summary.first_chosen / summary.decided:.0%} of the {summary.decided:,}"
        remarks.append(f"position: the response shown first was chosen in {share} answers that were not a tie")
    remarks += _failure_remarks([verdict for one in found for verdict in one.orders])
    settings = {"prompt_text": PAIR_PROMPT, "A": first, "B": second}
    return Report(
        summary={**_about(judge, file), **settings, **asdict(summary)},
        records=[
            {
                "outcome": one.outcome,
                "winner": one.winner,
                "orders": [_plain(verdict, "choice") for verdict in one.orders],
            }
            for one in found
        ],
        lines=[f"{file.path}: {first} against {second}, judged by {judge.model}", *aligned(rows), *remarks],
    )


def lexical_report(file: Responses) -> Report:
    references = [record["output"] for record in file.records]
    answer, share = most_frequent_answer_score(references)
    measured = {column: _measures([record[column] for record in file.records], references) for column in file.columns}
    summaries = {
        column: {name: _mean_of(name, values) for name, values in found.items()} for column, found in measured.items()
    }
    rows = [["column", "exact match", "95% interval", "ROUGE-L", "95% interval", "chrF", "95% interval", "of"]]
    for column, found in summaries.items():
        cells = [cell for one in found.values() for cell in (f"{one['mean']:.3f}", _span(one["low"], one["high"], 3))]
        rows.append([column, *cells, f"{len(references):,}"])
    often = {"most_frequent_answer": answer, "most_frequent_answer_score": share}
    said = f"always answering {_shown(answer)}, the most frequent reference, has an exact match of {share:.3f}"
    return Report(
        summary={"file": str(file.path), "n": len(references), **often, "columns": summaries},
        records=[
            {
                column: {name: values[index] for name, values in found.items()} for column, found in measured.items()
            }
            for index in range(len(references))
        ],
        lines=[f"{file.path}: compared with the references (0 to 1)", *aligned(rows), said],
    )  # fmt: skip


def _measures(responses: Sequence[str], references: Sequence[str]) -> dict[str, Sequence[float]]:
    """Values of each record."""
    exact = [exact_match(one, other) for one, other in zip(responses, references, strict=True)]
    return {"exact_match": exact, "rouge_l": rouge_l(responses, references), "chrf": chrf(responses, references)}


def _mean_of(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, low, high = mean_interval(values, 0, 1)
    if name == "exact_match":
        low, high = wilson_interval(int(sum(values)), len(values))
    return {"mean": mean, "low": low, "high": high}


def _about(judge: Judge, file: Responses) -> dict[str, Any]:
    settings = {name: getattr(judge, name) for name in ("url", "model", "seed", "retries", "max_tokens", "timeout")}
    return {"file": str(file.path), "judge": {**settings, "temperature": TEMPERATURE}}


def _plain(verdict: Verdict, value: str) -> dict[str, Any]:
    found = asdict(verdict)
    return {"outcome": found.pop("outcome"), value: found.pop("value"), **found}


def _cells(summary: ScoreSummary | PairSummary, digits: int) -> list[str]:
    """Mean, interval, outcomes and their sum."""
    mean = "-" if summary.mean is None else f"{summary.mean:.{digits}f}"
    counts = [f"{summary.outcomes[outcome]:,}" for outcome in OUTCOMES]
    return [mean, _span(summary.low, summary.high, digits), *counts, f"{summary.n:,}"]


def _span(low: float, high: float, digits: int) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _interval_remark(name: str, summary: ScoreSummary | PairSummary, lowest: str, highest: str) -> list[str]:
    n_missing = summary.n - summary.outcomes[SCORED]
    if not n_missing:
        return []
    alone = _span(summary.scored_low, summary.scored_high, 2)
    return [
        f"{name}: the mean is over {summary.outcomes[SCORED]:,} records; the interval counts the {n_missing:,} others "
        f"as {lowest} at its lower and as {highest} at its upper end (without them: {alone})"
    ]


def _failure_remarks(verdicts: Sequence[Verdict]) -> list[str]:
    """An example of each kind, and the remedy."""
    first = {one.outcome: one for one in reversed(verdicts)}
    remarks = [f"unparsable, for example: {_shown(first[UNPARSABLE].answer)}"] if UNPARSABLE in first else []
    remarks += [f"{kind}, for example: {first[kind].error}" for kind in (TIMEOUT, FAILED) if kind in first]
    if TIMEOUT in first or FAILED in first:
        remarks.append("timeouts and failures are cached like answers; --retry-failed sends them again")
    return remarks


def _shown(text: str) -> str:
    return f"'{one_line(text, WIDTH)}'"


def write_report(report: Report, output: Path) -> list[Path]:
    """Write the summary and the records as JSON, and the figure, if there is one, beside them; return the files."""
    records = [{"record": number, **record} for number, record in enumerate(report.records, start=1)]
    text = json.dumps({"summary": report.summary, "records": records}, indent=1, ensure_ascii=False)
    # A judge may send half a surrogate pair, which UTF-8 cannot express; as an escape it is JSON.
    write_atomically(output, text.encode("utf-8", "backslashreplace") + b"\n")
    if report.figure is None:
        return [output]
    write_figure(output.with_suffix(".png"), report.figure)
    return [output, output.with_suffix(".png")]
