"""Rows of a table in text: comma-separated (RFC 4180), tab-separated, or with a separator of your own.

What a reader would misread in silence is refused once, with the setting that reads it: another separator, quotation
marks that enclose cells of a .tsv or stand behind a space, backslashes before them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from llm_lightning.data.files.form import FileForm
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.files.row import Row
from llm_lightning.data.files.text import TextFile
from llm_lightning.terminal import counted

SEPARATORS = {";": "';'", "\t": "'\\t'", ",": "','", "|": "'|'"}
"""Separators that are recognised, as they are typed."""

_SEP_LINE = re.compile(r"sep=(.)\r?\n?$", re.IGNORECASE)
"""The first line of a table that is meant for a spreadsheet program."""


class _Cells(NamedTuple):
    line: int
    cells: list[str]


def table_rows(path: Path, form: FileForm, options: FileOptions, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Read a table in constant memory; empty lines are skipped, and so are columns without a name.

    Args:
        columns: their names in a table without a header.

    Raises:
        ValueError: if the table cannot be told apart from one of another kind, or its header has a name twice.
    """
    lines = iter(TextFile(path, form, keeps_ends=True).lines())  # those between rows are in no text
    separator, n_skipped, lines = _separator(lines, form, options)
    is_quoted = form.form == "csv" if options.quotes is None else options.quotes
    rows = _quoted(path, lines, separator) if is_quoted else _plain(path, lines, separator, options)
    names = list(columns) if columns else None
    is_first = True
    for line, cells in rows:
        place = f"line {line + n_skipped}"
        if is_first:
            is_first = False
            _refuse_one_column(path, cells, options)
            if names is None and not options.header:
                names = [str(number) for number in range(1, len(cells) + 1)]
            elif names is None:
                names = _header(path, place, cells)
                continue
        if len(cells) != len(names or ()):
            what = "more" if len(cells) > len(names or ()) else "fewer"
            whose = "of the header" if options.header and not columns else "of the first line"
            hint = "" if is_quoted else _if_parted(cells)
            yield Row(place, None, f"{counted(len(cells), 'column')}, {what} than the {len(names or ())} {whose}{hint}")
        else:
            record = {name: cell for name, cell in zip(names or (), cells, strict=True) if name}
            yield Row(place, record, None, may_hold_cr=any("\r" in cell for cell in cells))


def _separator(lines: Iterator[str], form: FileForm, options: FileOptions) -> tuple[str, int, Iterator[str]]:
    """(separator, lines that are read already, the others): a line `sep=;` counts where no setting does."""
    usual = "," if form.form == "csv" else "\t"
    first = list(islice(lines, 1))
    found = _SEP_LINE.match(first[0]) if first else None
    if found is None:
        return options.separator or usual, 0, chain(first, lines)
    return options.separator or found[1], 1, lines


def _header(path: Path, place: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}, {place}: the column {twice!r} occurs twice in the header: {', '.join(names)}")
    return names


def _refuse_one_column(path: Path, cells: list[str], options: FileOptions) -> None:
    """A first line that is one cell, but many with another separator."""
    if len(cells) != 1 or options.separator is not None:
        return
    found = next((one for one in SEPARATORS if one in cells[0]), None)
    if found is not None:
        raise ValueError(
            f"{path}: the first line is one column, {cells[0][:80]!r}; if {SEPARATORS[found]} separates its cells, set "
            f'"data.separator={SEPARATORS[found]}"'
        )


def _plain(path: Path, lines: Iterator[str], separator: str, options: FileOptions) -> Iterator[_Cells]:
    """Cells without quotation marks of their own."""
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if not line:
            continue
        cells = line.split(separator)
        if options.quotes is None and any(map(_is_enclosed, cells)):
            raise ValueError(
                f"{path}, line {number}: quotation marks enclose a cell and are doubled in it; set data.quotes=true, "
                "or data.quotes=false to keep them as text"
            )
        yield _Cells(number, cells)


def _if_parted(cells: list[str]) -> str:
    """What to do where a cell begins or ends with a quotation mark whose partner is in another cell or line."""
    is_parted = any((cell[:1] == '"') != (cell[-1:] == '"') or cell == '"' for cell in cells)
    return "; if quotation marks enclose its cells, set data.quotes=true" if is_parted else ""


def _is_enclosed(cell: str) -> bool:
    """Whether a cell is in quotation marks with doubled ones inside: no text that happens to be quoted."""
    inside = cell[1:-1]
    return cell[:1] == cell[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _quoted(path: Path, lines: Iterator[str], separator: str) -> Iterator[_Cells]:
    raw: list[str] = []  # the lines of a row as they stand in the file
    reader = csv.reader(_noted(lines, raw), strict=True, delimiter=separator)
    line = 1
    with _long_cells():
        try:
            for cells in reader:
                if any(cell.startswith(' "') and f"{separator}{cell}" in "".join(raw) for cell in cells):
                    raise ValueError(
                        f"{path}, line {line}: a quotation mark stands behind a space, so that it encloses nothing; "
                        "remove the spaces behind the separators, or set data.quotes=false"
                    )
                if cells:
                    yield _Cells(line, cells)
                raw.clear()
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: quotes are not balanced from here on ({error}); double a quotation mark inside "
                "quotes, also where a backslash stands before it; or set data.quotes=false if they enclose nothing"
            ) from error


def _noted(lines: Iterator[str], into: list[str]) -> Iterator[str]:
    for line in lines:
        into.append(line)
        yield line


@contextmanager
def _long_cells() -> Iterator[None]:
    """A text may exceed the 128 KiB that Python allows to a cell."""
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)
