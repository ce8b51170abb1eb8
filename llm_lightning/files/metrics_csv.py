"""Read and write the rows of `metrics.csv`. A file that a killed process left incomplete is readable, too.

A row maps columns to their non-empty cells, as text.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, str]


class Covered(NamedTuple):
    """A digest of the first rows of a metrics file."""

    n_rows: int = 0
    last: int = -1
    """Step of the last row."""
    sha256: str = ""
    """Chained: hash of the digest before the last row and that row's cells."""

    def followed_by(self, rows: Iterable[Row]) -> Covered:
        """This digest, extended by further rows."""
        n_rows, last, digest = self
        for row in rows:
            n_rows, last = n_rows + 1, int(row["step"])
            digest = hashlib.sha256(f"{digest} {json.dumps(sorted(row.items()))}".encode()).hexdigest()
        return Covered(n_rows, last, digest)

    def facts(self) -> dict[str, Any]:
        """Plain values for a checkpoint's header."""
        return {"count": self.n_rows, "sha256": self.sha256}


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a `metrics.csv`: metric -> (step, value) pairs in file order.

    Raises:
        ValueError: if a cell is not a number.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in parse(Path(path).read_bytes())[1]:
        step = int(row.pop("step"))
        for name, cell in row.items():
            try:
                curves.setdefault(name, []).append((step, float(cell)))
            except ValueError:
                raise ValueError(f"{path}, step {step}: {name}={cell!r} is not a number; delete that line") from None
    return curves


def parse(content: bytes) -> tuple[list[str], list[Row]]:
    """Columns and rows of a metrics file; unfinished lines (no newline, too few cells) are left out."""
    columns, *lines = _cells(content) or [[]]
    rows = [{name: cell for name, cell in zip(columns, cells, strict=True) if cell}
            for cells in lines if _is_row(cells, columns)]  # fmt: skip
    return columns, rows


def last_rows(path: str | Path, n_bytes: int = 1 << 14) -> list[Row]:
    """The rows in the last bytes of a metrics file; the others are not read."""
    with Path(path).open("rb") as file:
        columns = file.readline()
        end = file.seek(0, os.SEEK_END)
        if file.seek(max(len(columns), end - n_bytes)) > len(columns):
            file.readline()  # its beginning was left out
        return parse(columns + file.read())[1]


def column(path: str | Path, name: str) -> Iterator[float]:
    """The numbers in one column of a metrics file, which is not kept in memory."""
    with Path(path).open("rb") as file:
        columns = [cell.decode(errors="replace") for cell in file.readline().strip().split(b",")]
        if name not in columns:
            return
        index = columns.index(name)
        for line in file:
            cells = line.rstrip(b"\r\n").split(b",")
            if len(cells) == len(columns) and cells[index] and line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    yield float(cells[index])


def unreadable(content: bytes) -> list[int]:
    """Numbers of the lines that are not rows, except the last line, which a killed process may leave unfinished."""
    columns, *lines = _cells(content) or [[]]
    return [number for number, cells in enumerate(lines[:-1], start=2) if not _is_row(cells, columns)]


def _cells(content: bytes) -> list[list[str]]:
    """The cells of each line; a damaged line, such as one with a stray quote, does not affect the next."""
    whole = content[: content.rfind(b"\n") + 1].decode(errors="replace").replace("\0", "\ufffd")
    return [_split(line.rstrip("\r")) for line in whole.split("\n")[:-1]]


def _split(line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return [line]


def _is_row(cells: list[str], columns: list[str]) -> bool:
    return len(cells) == len(columns) and re.fullmatch(r"[0-9]{1,18}", cells[0]) is not None


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def whole_file(columns: list[str], rows: list[Row]) -> bytes:
    return lines_of(columns, [dict(zip(columns, columns, strict=True)), *rows]) if columns else b""


def lines_of(columns: list[str], rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row per step, sorted by step; later values win."""
    by_step: dict[int, Row] = {}
    for row in rows:
        by_step.setdefault(int(row["step"]), {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def cell(value: Any) -> str:
    return repr(value.item() if hasattr(value, "item") else value)
