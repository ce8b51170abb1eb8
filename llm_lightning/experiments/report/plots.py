"""The plots of a study: curves of each setting, the metric against each swept setting, heat maps of two.

Values that diverge do not flatten the others: an axis ends where all but the most extreme hundredth fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from llm_lightning.experiments.report.drawing import FAINT, HEAT, INK, SERIES, Canvas, Picture, canvas, label
from llm_lightning.experiments.report.entries import MOST_POINTS, Entry, is_number, thinned
from llm_lightning.experiments.report.study import FOLDER, Group, Study, as_typed, short_names, shown
from llm_lightning.experiments.report.tables import figure
from llm_lightning.files.pictures import smoothed, smoothing_width
from llm_lightning.terminal import counted

TRAINING_LOSS = "train/loss"
MOST_LINES = len(SERIES)
MOST_TICKS = 12
MOST_CELLS = 400
"""Of a heat map."""
MOST_GREY = 100
"""Settings drawn behind those that have colours."""


class Band(NamedTuple):
    """A curve over seeds."""

    steps: Any
    mean: Any
    low: Any
    high: Any


def pictures_of(study: Study) -> list[Picture]:
    """All plots of a study that have something to show."""
    pictures = [curves_picture(study, metric) for metric in dict.fromkeys([study.metric, TRAINING_LOSS]) if metric]
    keys = [key for key in study.keys if key != FOLDER or len(study.keys) > 1]
    pictures += [key_picture(study, key) for key in (keys if study.metric else [])]
    pictures += [heat_picture(study, *pair) for pair in _numeric_pairs(study)]
    return [picture for picture in pictures if picture is not None]


def unit(metric: str, item: str = "token") -> str:
    """`val/loss (nats per token)`: a metric with its unit, if it has one."""
    units = {"loss": "nats per token" if item == "token" else "nats", "bits_per_byte": "bits per byte"}
    units |= {"reward_margin": "nats", "kl_per_token": "nats per token"}
    name = metric.rpartition("/")[2].removeprefix("eval_")
    return label(f"{metric} ({units[name]})" if name in units else metric, 44)


def _item(study: Study) -> str:
    return next((entry.items[0] for entry in study.entries if entry.summary), "token")


# --- curves ----------------------------------------------------------------------------------------------------------


def curves_picture(study: Study, metric: str) -> Picture | None:
    """A metric over training: the mean of each setting over its seeds, in a band from the least to the greatest."""
    bands = [(group, band) for group in study.groups if (band := _band(group, metric)) is not None]
    bands = [(group, band) for group, band in bands if len(band.steps) > 1]
    if not bands:
        return None
    with canvas() as drawn:
        axes = drawn.axes
        for _, band in bands[MOST_LINES : MOST_LINES + MOST_GREY]:
            axes.plot(band.steps, band.mean, color=FAINT, linewidth=0.6, alpha=0.5)
        for mark, (_, band) in reversed(list(zip(SERIES, bands, strict=False))):
            axes.fill_between(band.steps, band.low, band.high, color=mark, alpha=0.18, linewidth=0)
            axes.plot(band.steps, band.mean, color=mark, marker="." if len(band.steps) < 30 else None)
        drawn.legend |= {mark: group.name for mark, (group, _) in zip(SERIES, bands, strict=False)}
        cut = limit_y(axes, [band.mean for _, band in bands])
        axes.set_xlabel("updates")
        axes.set_ylabel(unit(metric, _item(study)))
        what = "smoothed over a twentieth of the run" if metric == TRAINING_LOSS else "of each validation"
        note = f"Lines: means over seeds, {what}; bands: from the least to the greatest seed. {cut}"
        return drawn.picture(f"{metric} over training", note + _left_out(len(bands)))


def _left_out(n_bands: int) -> str:
    grey = min(max(n_bands - MOST_LINES, 0), MOST_GREY)
    return f" The best {MOST_LINES} settings have colours, {counted(grey, 'other')} grey." if grey else ""


def _band(group: Group, metric: str) -> Band | None:
    """Over the seeds that finished; over all where none did."""
    known = [entry for entry in group.entries if entry.curves.get(metric)]
    chosen = [entry for entry in known if entry.status == "finished"] or known
    curves = [_finite(entry, metric) for entry in chosen]
    curves = [(steps, values) for steps, values in curves if len(steps)]
    if not curves:
        return None
    end = min(steps[-1] for steps, _ in curves)
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = grid[grid <= end]
    if len(grid) > MOST_POINTS:
        grid = np.unique(grid[np.linspace(0, len(grid) - 1, MOST_POINTS).round().astype(int)])
    values = np.array([np.interp(grid, *curve) for curve in curves])
    return Band(grid, values.mean(0), values.min(0), values.max(0))


def _finite(entry: Entry, metric: str) -> tuple[Any, Any]:
    """(updates, values) of a curve: the row of step s is written after s + 1 updates."""
    points = [(step + 1, value) for step, value in thinned(entry.curves[metric]) if math.isfinite(value)]
    steps, values = [step for step, _ in points], [value for _, value in points]
    return np.array(steps, dtype=float), np.array(
        smoothed_if_long(steps, values) if metric == TRAINING_LOSS else values
    )


def limit_y(axes: Any, curves: Sequence[Any]) -> str:
    """End the axis where all but the greatest hundredth of the values fit, if that is far below; say so."""
    values = np.concatenate([np.asarray(curve, dtype=float) for curve in curves])
    values = values[np.isfinite(values)]
    low, top, high = np.percentile(values, [0, 99, 100]) if len(values) else (0.0, 0.0, 0.0)
    return _cut(axes, low, top) if high - low > 3 * (top - low) > 0 else ""


def _limit_points(axes: Any, values: Sequence[float]) -> str:
    """The same for a few values: those far above the median are left out."""
    low, middle, high = np.percentile(values, [0, 50, 100])
    return _cut(axes, low, low + 10 * (middle - low)) if high - low > 30 * (middle - low) > 0 else ""


def _cut(axes: Any, low: float, top: float) -> str:
    axes.set_ylim(low - 0.05 * (top - low), low + 1.05 * (top - low))
    return f"Values above {figure(float(top))} are cut."


def smoothed_if_long(steps: Sequence[float], values: Sequence[float]) -> Sequence[float]:
    """A training curve as the plots of a run smooth it; a short one as it is."""
    width = smoothing_width(steps)
    return values if width is None else list(smoothed(steps, values, width))


# --- settings --------------------------------------------------------------------------------------------------------


def key_picture(study: Study, key: str) -> Picture | None:
    """The metric against one setting: a point for each seed, the mean of each group with its interval."""
    groups = [group for group in study.groups if group.values]
    if not groups:
        return None
    short = short_names(study.keys)
    positions, is_log = _positions([group.settings[key] for group in groups])
    is_scale = all(is_number(group.settings[key]) for group in groups)
    others = [other for other in study.keys if other != key]
    lines = _lines(groups, others)
    with canvas() as drawn:
        axes = drawn.axes
        if is_log:
            axes.set_xscale("log")
        _draw_lines(drawn, lines, positions, key, [short[other] for other in others], study)
        _set_ticks(drawn, key, positions, is_scale=is_scale)
        cut = _limit_points(axes, [_mean(group) for group in groups])
        many = f" ({len(positions)} values)" if not is_scale and len(positions) > MOST_TICKS else ""
        named = key.removesuffix("._target_")
        axes.set_xlabel(f"{label(named, 60)}{' (log scale)' if is_log else many}")
        axes.set_ylabel(unit(study.metric, _item(study)))
        what = "Small points: seeds. Large points: means over seeds, with 95% t intervals over seeds."
        lost = " Hollow: a setting that lacks seeds." if any(not study.is_ranked(one) for one in groups) else ""
        grey = f" Settings of the best {MOST_LINES} have colours." if len(lines) > MOST_LINES else ""
        return drawn.picture(f"{study.metric} by {named}", f"{what}{lost}{grey} {cut}".strip())


def _lines(groups: Sequence[Group], others: Sequence[str]) -> list[list[Group]]:
    """Groups that agree in all other settings, those with the best one first."""
    lines: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        lines.setdefault(tuple(as_typed(group.settings[other]) for other in others), []).append(group)
    return list(lines.values())


def _draw_lines(
    drawn: Canvas,
    lines: Sequence[Sequence[Group]],
    positions: Mapping[str, float],
    key: str,
    others: Sequence[str],
    study: Study,
) -> None:
    axes = drawn.axes
    for index, line in enumerate(lines):
        mark = SERIES[index] if index < MOST_LINES else FAINT
        placed = sorted((positions[as_typed(group.settings[key])], group) for group in _unique(line, key))
        if is_number(line[0].settings[key]):  # texts have no order
            axes.plot([x for x, _ in placed], [_mean(group) for _, group in placed], color=mark, linewidth=1)
        for x, group in placed:
            _draw_group(axes, x, group, mark, is_whole=study.is_ranked(group))
        if others and index < MOST_LINES:
            values = [shown(name, value) for name, value in line[0].settings.items() if name != key]
            drawn.legend[mark] = ", ".join(f"{name} {value}" for name, value in zip(others, values, strict=True))


def _unique(line: Sequence[Group], key: str) -> list[Group]:
    """One group a position, the best; only files of one name and other content share it."""
    return list({as_typed(group.settings[key]): group for group in reversed(line)}.values())


def _mean(group: Group) -> float:
    return group.estimate(group.metric).mean


def _draw_group(axes: Any, x: float, group: Group, mark: str, *, is_whole: bool) -> None:
    one, values = group.estimate(group.metric), list(group.values.values())
    if len(values) > 1:
        axes.scatter([x] * len(values), values, s=9, color=mark, alpha=0.55, linewidths=0)
        axes.errorbar(
            [x], [one.mean], [[one.mean - one.low], [one.high - one.mean]], color=mark, capsize=3, linewidth=1
        )
    face = mark if is_whole else "none"
    axes.plot([x], [one.mean], marker="o", markersize=6, color=mark, markerfacecolor=face, linestyle="none")


def _positions(values: Sequence[Any]) -> tuple[dict[str, float], bool]:
    """Value as it is typed -> place on the axis, and whether that is logarithmic; texts are placed side by side."""
    texts = {as_typed(value): value for value in values}
    if not all(map(is_number, texts.values())):
        return {text: float(index) for index, text in enumerate(sorted(texts))}, False
    places = {text: float(value) for text, value in sorted(texts.items(), key=lambda pair: pair[1])}
    return places, is_log_spaced(list(places.values()))


def is_log_spaced(values: Sequence[float]) -> bool:
    """Whether sorted, distinct values are spread more evenly by their ratios than by their differences."""
    if not values or values[0] <= 0 or values[-1] < 8 * values[0]:
        return False
    return len(values) == 2 or _unevenness(np.log(values)) < _unevenness(np.array(values))


def _unevenness(values: Any) -> float:
    steps = np.diff(values)
    return float(np.std(steps) / np.mean(steps))


def _set_ticks(drawn: Canvas, key: str, positions: Mapping[str, float], *, is_scale: bool) -> None:
    """The values themselves, if there is room; texts have no other place on the axis, and numbers that of a scale."""
    axes = drawn.axes
    axes.margins(x=0.08)
    texts = [f"{place:.4g}" if is_scale else shown(key, text) for text, place in positions.items()]
    texts = [label(text, max(8, 72 // len(positions))) for text in texts]
    is_full = len(positions) > MOST_TICKS
    if is_scale and (is_full or _are_close(axes, list(positions.values()), texts)):
        _set_round_ticks(axes)
        return
    if is_full:
        axes.set_xticks([])
        return
    axes.set_xticks(list(positions.values()), texts)
    axes.minorticks_off()
    if sum(map(len, texts)) > 72 or _are_close(axes, list(positions.values()), texts):
        axes.tick_params(axis="x", labelrotation=35)
        for one in axes.get_xticklabels():
            one.set_horizontalalignment("right")
        drawn.fit_labels()


def _set_round_ticks(axes: Any) -> None:
    """Round numbers, also on a logarithmic axis, whose own labels are formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _are_close(axes: Any, places: Sequence[float], texts: Sequence[str]) -> bool:
    """Whether labels side by side would touch; a label of n characters takes about n / 75 of the width."""
    scaled = np.log(places) if axes.get_xscale() == "log" else np.array(places)
    width = scaled[-1] - scaled[0]
    longest = max(map(len, texts))
    return bool(len(places) > 1 and np.diff(scaled).min() / width * 0.9 < (longest + 1) / 75)


# --- two settings ----------------------------------------------------------------------------------------------------


def _numeric_pairs(study: Study) -> Iterator[tuple[str, str]]:
    """Pairs of settings whose values are numbers, at least two of each."""
    numeric = [key for key in study.keys if all(is_number(group.settings[key]) for group in study.groups)]
    yield from list(combinations(numeric, 2))[:3] if study.metric else []


def heat_picture(study: Study, across: str, up: str) -> Picture | None:
    """The mean of each pair of values; of the best setting, if others vary, too."""
    cells: dict[tuple[str, str], Group] = {}
    for group in reversed([group for group in study.groups if group.values]):  # the best is put last
        cells[as_typed(group.settings[across]), as_typed(group.settings[up])] = group
    columns, rows = ([*_positions([group.settings[key] for group in cells.values()])[0]] for key in (across, up))
    is_scattered = len(cells) <= max(len(columns), len(rows))  # a search in intervals: no two cells side by side
    if min(len(columns), len(rows)) < 2 or is_scattered or len(columns) * len(rows) > MOST_CELLS:
        return None
    with canvas(height=1.6 + 0.42 * len(rows)) as drawn:
        axes = drawn.axes
        axes.grid(visible=False)
        drawn.fit_labels()
        shares = _shares(cells, study.mode)
        for (x, y), group in cells.items():
            _draw_cell(axes, columns.index(x), rows.index(y), group, shares[x, y], study)
        axes.set_xticks(range(len(columns)), [label(text, max(6, 72 // len(columns))) for text in columns])
        axes.set_yticks(range(len(rows)), [label(text, 14) for text in rows])
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_xlabel(label(across, 60))
        axes.set_ylabel(label(up, 30))
        rest = " The best over all other settings." if len(study.keys) > 2 else ""
        note = f"Means over seeds in {unit(study.metric, _item(study))}; stronger colour: better; * lacks seeds.{rest}"
        return drawn.picture(f"{study.metric} by {across} and {up}", note)


def _shares(cells: Mapping[tuple[str, str], Group], mode: str | None) -> dict[tuple[str, str], float]:
    """0 for the worst cell, 1 for the best, by rank: one that diverged would make all others equal."""
    ordered = sorted(cells, key=lambda cell: _mean(cells[cell]), reverse=mode != "max")
    return {cell: rank / max(1, len(ordered) - 1) for rank, cell in enumerate(ordered)}


def _draw_cell(axes: Any, x: int, y: int, group: Group, share: float, study: Study) -> None:
    from matplotlib.patches import Rectangle

    place, alpha = (x - 0.48, y - 0.46), 0.1 + 0.9 * share
    axes.add_patch(Rectangle(place, 0.96, 0.92, linewidth=0, facecolor=HEAT, alpha=alpha))
    text = figure(_mean(group)) + ("" if study.is_ranked(group) else "*")
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)
