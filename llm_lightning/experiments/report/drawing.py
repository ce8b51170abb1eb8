"""Matplotlib figures as SVG inside a page, in colours that the page chooses: light, dark or printed.

A figure is drawn in marks, colours that stand for a meaning; in the SVG each becomes a variable of the page's style.
Texts stay texts, in the page's font, so that they can be read, searched and printed at any size.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llm_lightning.terminal import inline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, HEAT = "#01f001", "#01f002", "#01f003"
TRAINING, VALIDATION, RATE, NORM = "#01f011", "#01f012", "#01f013", "#01f014"
SERIES = tuple(f"#01f02{number}" for number in range(7))
"""Of settings that are drawn together, the best first."""
VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    HEAT: "--heat",
    TRAINING: "--training",
    VALIDATION: "--validation",
    RATE: "--rate",
    NORM: "--norm",
    **{mark: f"--series-{number}" for number, mark in enumerate(SERIES)},
}
"""Mark -> variable of the page's style."""
WIDTH, HEIGHT = 7.0, 3.8
"""Of a figure, in inches of 72 points."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a name may have two dollar signs
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A plot on a page, or a file's picture."""

    title: str
    svg: str
    """The content of the plot; safe HTML, made here."""
    legend: Sequence[tuple[str, str]] = ()
    """(variable of the style, text) of what is drawn."""
    note: str = ""
    data: str = ""
    """The address of an image instead of `svg`."""


@dataclass
class Canvas:
    """A figure while it is drawn."""

    axes: Any
    figure: Figure
    legend: dict[str, str] = field(default_factory=dict)
    """Mark -> text."""

    def fit_labels(self) -> None:
        """Make room for long labels."""
        self.figure.set_layout_engine("constrained")

    def picture(self, title: str, note: str = "") -> Picture:
        """The figure as part of a page; the title also says what it is to those who do not see it."""
        legend = [(VARIABLES[mark], text) for mark, text in self.legend.items()]
        return Picture(title, _as_svg(self.figure, title), legend, note)


@contextmanager
def canvas(height: float = HEIGHT) -> Iterator[Canvas]:
    """A figure in this module's style. Its margins are fixed, which takes half the time of measuring all texts."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks: the page's font draws them
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(0.115, 0.55 / height, 0.97, 1 - 0.12 / height)
        axes = figure.add_subplot()
        axes.grid(alpha=0.25, linewidth=0.6)
        yield Canvas(axes, figure)


def _as_svg(figure: Figure, title: str) -> str:
    from markupsafe import escape

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} role="img" '
    svg = re.sub(r"^<svg[^>]*>", lambda _: f'{opening}aria-label="{escape(inline(title))}">', svg)
    return re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", svg)


def label(text: object, longest: int = 24) -> str:
    """A text on an axis: one line without controls; of a long one, the end is kept."""
    shown = inline(text)
    return shown if len(shown) <= longest else f"...{shown[3 - longest :]}"
