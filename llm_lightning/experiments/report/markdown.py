"""`report.md`: the tables of a report for a repository. No text of a run is taken for Markdown or HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_lightning.experiments.report.tables import Table
from llm_lightning.terminal import inline, one_line, visible

_SPECIAL = re.compile(r"([\\`*_\[\]#|~$@]|!(?=\[)|:(?=//))")


def escaped(text: str) -> str:
    """A text on one line, shown as it is."""
    safe = inline(" ".join(str(text).split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", safe)


def paragraph(text: str) -> str:
    """As `escaped`; its beginning is not taken for a list or a rule."""
    return re.sub(r"^([0-9]{0,9})([-+=.)])", r"\1\\\2", escaped(text))


def cell(text: str) -> str:
    """As `escaped`; a number stays one."""
    return one_line(text) if re.fullmatch(r"[+-]?[0-9][0-9,.e+-]*", text) else escaped(text)


def as_lines(table: Table) -> list[str]:
    """The lines of a table, its rows that stand out in bold, and its note."""
    rows = [[cell(one) for one in row] for row in table.rows]
    rows = [[f"**{one}**" if one and index in table.marked else one for one in row] for index, row in enumerate(rows)]
    rule = [":--" if index < table.n_texts else "--:" for index in range(len(table.headings))]
    lines = [_line([escaped(one) for one in table.headings]), _line(rule), *map(_line, rows)]
    return [*lines, "", *([paragraph(table.note), ""] if table.note else [])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def code(lines: Sequence[str]) -> list[str]:
    """A block of commands; its fence is longer than any row of backticks in it."""
    longest = max((len(found) for line in lines for found in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}bash", *(visible(line).replace("\n", "\\n") for line in lines), fence, ""]
