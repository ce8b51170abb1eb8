"""A page with the answers of two models side by side; its layout is comparison.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_lightning.files.pages import render

if TYPE_CHECKING:
    from llm_lightning.inference.comparison import Measure

TEMPLATE = Path(__file__).with_name("comparison.html")
EMPTY = "(empty)"


class Item(NamedTuple):
    """One prompt and its answers."""

    prompt: str
    correct: str
    a: str
    b: str
    remarks: list[str]
    """of the judge"""


class Page(NamedTuple):
    """What the page shows."""

    title: str
    names: Sequence[str]
    """of A and B"""
    facts: list[str]
    measures: list[Measure]
    remarks: list[str]
    items: list[Item]
    picture: str | None
    """a file beside the page"""


def as_html(page: Page) -> str:
    """A page of its own; whatever comes from a model or a file is escaped."""
    return render(TEMPLATE, page=page, empty=EMPTY)
