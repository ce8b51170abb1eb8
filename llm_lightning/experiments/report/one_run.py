"""The page about one run: curves, samples, the task's figures, data, lineage, settings."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.experiments.report import commands
from llm_lightning.experiments.report.content import name_of, now, texts_at
from llm_lightning.experiments.report.drawing import NORM, RATE, TRAINING, VALIDATION, Picture, canvas
from llm_lightning.experiments.report.entries import Entry
from llm_lightning.experiments.report.markdown import as_lines, code, escaped, paragraph
from llm_lightning.experiments.report.plots import limit_y, smoothed_if_long, unit
from llm_lightning.experiments.report.tables import Table, figure, whole
from llm_lightning.experiments.summary import duration
from llm_lightning.files.pages import render
from llm_lightning.files.pictures import DASHES, validation_sets
from llm_lightning.terminal import inline, visible

TEMPLATE = Path(__file__).with_name("run.html")
OWN_PLOTS = ("loss", "lr", "accuracy", "gradient_norm")
"""Files in `plots/` that are drawn anew on the page; the others are the task's."""
SAMPLES = "samples.md"
MOST_SAMPLES, LONGEST_SAMPLE = 8, 3000
MOST_METRICS = 6
DASHED = dict(zip(DASHES, ("dashed", "dotted", "dash-dotted"), strict=True))
MOST_FIGURES, LARGEST_FIGURE = 12, 2_000_000


class Sample(NamedTuple):
    title: str
    text: str


class RunContent(NamedTuple):
    """All of the page."""

    title: str
    written: str
    facts_line: str
    command: str | None
    typed_in: str | None
    problems: Sequence[str]
    pictures: Sequence[Picture]
    metrics: Table
    samples: Sequence[Sample]
    figures: Sequence[Picture]
    facts: Table
    settings: Table


def content_of(entry: Entry) -> RunContent:
    """Collect it; only the plots take time."""
    pictures = list(_pictures(entry))
    return RunContent(
        title=f"Run: {name_of(entry.folder)}",
        written=now(),
        facts_line=_facts_line(entry),
        command=_command(entry),
        typed_in=commands.typed_in([entry]),
        problems=list(map(inline, entry.problems)),
        pictures=pictures,
        metrics=_metrics(entry),
        samples=_samples(entry.folder / SAMPLES),
        figures=_figures(entry.folder / "plots"),
        facts=Table(["", ""], [[key, inline(value)] for key, value in _facts(entry)], 2),
        settings=Table(["setting", "value"], [[key, inline(value)] for key, value in entry.run.settings.items()], 2),
    )


def as_html(content: RunContent) -> str:
    return render(TEMPLATE, title=content.title, run=content, texts_at=texts_at, statuses=())


def as_markdown(content: RunContent) -> str:
    lines = [f"# {escaped(content.title)}", "", paragraph(content.facts_line), ""]
    lines += code([content.command]) if content.command else []
    lines += [paragraph(problem) for problem in content.problems]
    lines += ["## Results", "", *as_lines(content.metrics)] if content.metrics.rows else []
    return "\n".join([*lines, "## Speed, data, versions, lineage", "", *as_lines(content.facts)])


def _facts_line(entry: Entry) -> str:
    facts = entry.run.facts
    parts = [f"{facts['task'] or 'unknown task'}: {facts['status']}", f"{facts['steps']:,} updates"]
    parts += [duration(facts["seconds"])] if facts["seconds"] is not None else []
    parts += [f"best {facts['monitor']} {figure(facts['best_value'])}"] if facts["best_value"] is not None else []
    parts += [str(facts["reason"])] if facts["reason"] else []
    return inline(", ".join(parts))


def _command(entry: Entry) -> str | None:
    typed = entry.summary.get("command")
    return f"python {visible(typed)}" if isinstance(typed, str) else None


# --- plots -----------------------------------------------------------------------------------------------------------


def _pictures(entry: Entry) -> Iterator[Picture]:
    validated = [name.removeprefix("val/") for name in entry.curves if name.startswith("val/")]
    validated = [name.rpartition("/")[2] for name in validated]  # those of further sets are in the same picture
    names = [name for name in validated if not name.endswith(("_low", "_high", "perplexity"))]
    for name in list(dict.fromkeys(["loss", *names]))[:MOST_METRICS]:
        picture = _both(entry, name)
        if picture is not None:
            yield picture
    for metric, mark, label in (("lr", RATE, "learning rate"), ("train/grad_norm", NORM, "norm of the gradient")):
        if entry.curves.get(metric):
            yield _single(entry, metric, mark, label)


def _both(entry: Entry, name: str) -> Picture | None:
    """A metric in training, raw and smoothed, and in validation; None if there is no more than one value of each."""
    raw, measured, validation = (
        entry.curves.get(f"{prefix}{name}", ()) for prefix in ("train/", "train/eval_", "val/")
    )
    sets = list(validation_sets(name, entry.curves))
    if max(map(len, (raw, measured, validation, *(entry.curves[metric] for _, metric, _ in sets)))) < 2:
        return None
    with canvas() as drawn:
        axes, shown = drawn.axes, []
        training = []
        if raw:
            steps, values = _axes_of(raw)
            axes.plot(steps, values, color=TRAINING, alpha=0.35, linewidth=0.8)
            shown.append(smoothed_if_long(steps, values))
            axes.plot(steps, shown[-1], color=TRAINING)
            training += ["faint: raw", "line: smoothed"]
        if measured:
            axes.plot(*_axes_of(measured), color=TRAINING, linestyle="--", marker=".")
            training.append("dashed: measured as validation is")
        if training:
            drawn.legend[TRAINING] = f"training ({', '.join(training)})"
        if validation:
            shown.append(_axes_of(validation)[1])
            axes.plot(*_axes_of(validation), color=VALIDATION, marker=".")
            drawn.legend[VALIDATION] = "validation"
        for _, metric, dashes in sets:
            shown.append(_axes_of(entry.curves[metric])[1])
            axes.plot(*_axes_of(entry.curves[metric]), color=VALIDATION, linestyle=dashes, marker=".")
        if sets:
            styles = [f"{DASHED[dashes]}: {one}" for one, _, dashes in sets]
            drawn.legend[VALIDATION] = f"validation ({', '.join(['line: the main set'] * bool(validation) + styles)})"
        axes.set_xlabel("updates")
        axes.set_ylabel(unit(name, entry.items[0]))
        return drawn.picture(f"{name} over training", limit_y(axes, shown))


def _single(entry: Entry, metric: str, mark: str, label: str) -> Picture:
    with canvas() as drawn:
        steps, values = _axes_of(entry.curves[metric])
        drawn.axes.plot(steps, values, color=mark)
        drawn.axes.set_xlabel("updates")
        drawn.axes.set_ylabel(label)
        return drawn.picture(f"{label} over training", limit_y(drawn.axes, [values]))


def _axes_of(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step + 1 for step, _ in points], [value for _, value in points]


def _figures(folder: Path) -> list[Picture]:
    paths = [path for path in sorted(folder.glob("*.png")) if path.is_file() and not path.is_symlink()]
    small = [one for one in paths if one.stem not in OWN_PLOTS and one.stat().st_size <= LARGEST_FIGURE][:MOST_FIGURES]
    return [Picture(inline(path.stem.replace("_", " ")), "", data=_data_uri(path)) for path in small]


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


# --- texts -----------------------------------------------------------------------------------------------------------


def _samples(path: Path) -> list[Sample]:
    """Some sections of the samples of a run, spread over it, the first and the last among them."""
    if not path.is_file() or path.is_symlink():
        return []
    parts = re.split(r"^## (.*)\n", path.read_text("utf-8", errors="replace"), flags=re.MULTILINE)
    found = [Sample(inline(title), _dedented(body)) for title, body in zip(parts[1::2], parts[2::2], strict=True)]
    if len(found) <= MOST_SAMPLES:
        return found
    return [found[round(index * (len(found) - 1) / (MOST_SAMPLES - 1))] for index in range(MOST_SAMPLES)]


def _dedented(body: str) -> str:
    text = visible("\n".join(line.removeprefix("    ") for line in body.strip("\n").split("\n")))
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]}..."


def _metrics(entry: Entry) -> Table:
    metrics = entry.run.metrics
    rows = []
    for name, value in sorted(metrics.items()):
        if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in metrics:
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        wilson = f"{figure(low)} to {figure(high)}" if low is not None and high is not None else ""
        rows.append([inline(name), figure(value), wilson])
    if not any(row[2] for row in rows):
        return Table(["metric", "value"], [row[:2] for row in rows])
    return Table(["metric", "value", "95% Wilson interval over records"], rows)


def _facts(entry: Entry) -> Iterator[tuple[str, str]]:
    summary, (item, n_items, rate) = entry.summary, entry.items
    yield "updates", f"{entry.run.facts['steps']:,}"
    yield f"{item}s", whole(n_items)
    yield f"{item}s/s", whole(rate)
    if entry.peak_memory is not None:
        yield "peak memory", f"{entry.peak_memory:.2f} GiB"
    for name in (
        "parameters",
        "precision",
        "processes",
        "device",
        "host",
        "sampled",
        "data",
        "lineage",
        "versions",
        "git",
    ):
        yield from _flat(name, summary.get(name))


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nested facts as lines, with dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif value not in (None, [], ""):
        yield name, str(value)
