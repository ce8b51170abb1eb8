"""A page with the answers of two models side by side, in HTML and in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import quote

STYLE = """<style>
body { font: 15px/1.5 sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { border: 1px solid #ddd; padding: .4em .7em; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { background: #f6f6f6 } pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em; font-size: 13px }
td { white-space: pre-wrap } img { max-width: 100% } .none { color: #aaa }
</style>"""
EMPTY = "(empty)"


class Measure(NamedTuple):
    """A row of the table at the top."""

    name: str
    a: str
    b: str
    of: str
    """how many records it is of"""


class Item(NamedTuple):
    """One prompt and what was answered."""

    prompt: str
    correct: str
    a: str
    b: str
    remarks: list[str]
    """what the judge said"""


class Page(NamedTuple):
    """What is written, in whatever form."""

    title: str
    facts: list[str]
    measures: list[Measure]
    remarks: list[str]
    items: list[Item]
    picture: str | None
    """a file beside the page"""


def as_html(page: Page) -> str:
    """A page of its own; whatever comes from a model or a file is escaped."""
    e = html.escape
    lines = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{e(page.title)}</title>{STYLE}',
        f"<h1>{e(page.title)}</h1>",
        *(f"<p>{e(fact)}</p>" for fact in page.facts),
        _html_table(("", "A", "B", "of"), [list(measure) for measure in page.measures], e),
        *(f"<p>{e(remark)}</p>" for remark in page.remarks),
    ]
    if page.picture:
        source = e(quote(page.picture))
        lines.append(f'<p><a href="{source}"><img src="{source}" alt="learning curves"></a></p>')
    for number, item in enumerate(page.items, start=1):
        lines += [
            f"<h2>{number}</h2>\n<pre>{e(item.prompt)}</pre>",
            _html_table(("correct answer", "A", "B"), [[item.correct, item.a, item.b]], _html_answer),
            *([f"<p>Judge: {e('; '.join(item.remarks))}</p>"] if item.remarks else []),
        ]
    return "\n".join([*lines, "</html>"]) + "\n"


def _html_answer(text: str) -> str:
    return html.escape(text) if text else f'<span class="none">{EMPTY}</span>'


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], form: Callable[[str], str]) -> str:
    cells = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    cells += ["".join(f"<td>{form(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def as_markdown(page: Page) -> str:
    """The same, for a README or an issue."""
    m = _markdown
    lines = [f"# {m(page.title)}", *map(m, page.facts)]
    lines.append(_markdown_table(("", "A", "B", "of"), [list(measure) for measure in page.measures]))
    lines += map(m, page.remarks)
    if page.picture:
        lines.append(f"![learning curves]({quote(page.picture)})")
    for number, item in enumerate(page.items, start=1):
        answers = [text or EMPTY for text in (item.correct, item.a, item.b)]
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", item.prompt)), default=0))
        lines += [
            f"## {number}",
            f"{fence}text\n{item.prompt}\n{fence}",
            _markdown_table(("correct answer", "A", "B"), [answers]),
            *([f"Judge: {m('; '.join(item.remarks))}"] if item.remarks else []),
        ]
    return "\n\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """A text that no sign of Markdown or HTML in it changes, on one line."""
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    lines = [
        re.sub(r"^[ \t]+", lambda space: "&nbsp;" * len(space[0].expandtabs(4)), line) for line in text.split("\n")
    ]
    return "<br>".join(" ".join(line.splitlines()) for line in lines)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
