"""Rows of a file with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.data.files.compression import open_bytes
from llm_lightning.data.files.form import FileForm
from llm_lightning.data.files.row import Row
from llm_lightning.data.files.strict_json import LENIENT, STRICT, decode, has_escapes, problem
from llm_lightning.data.files.text import TextFile, encoding_remedy


def json_line_rows(path: Path, form: FileForm, fields: Sequence[str] | None = None) -> Iterator[Row]:
    """Read a file in constant memory; blank lines are skipped.

    Args:
        fields: the fields that matter; None: all. Others may hold NaN, which Python writes, or half a surrogate pair.
    """
    decoder = STRICT if fields is None else LENIENT
    for number, (line, wrong) in enumerate(_lines(path, form), start=1):
        if wrong is None and not line.strip():
            continue
        value: Any = None
        escapes = has_escapes(line)
        if wrong is None:
            try:
                value = decode(decoder, line.rstrip())
                wrong = problem(value, escapes, fields)
            except json.JSONDecodeError as error:
                wrong = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            except ValueError as error:
                wrong = str(error)
        yield Row(f"line {number}", value, wrong, escapes)


def _lines(path: Path, form: FileForm) -> Iterator[tuple[str, str | None]]:
    """(line, what is wrong with it). A line that is not valid UTF-8 spoils no other."""
    if form.encoding not in ("utf-8", "utf-8-sig"):
        for text in TextFile(path, form, keeps_ends=True).lines():
            yield text, None
        return
    is_first = True
    with open_bytes(path, form.compression) as file:
        for chunk in file:
            body = chunk.rstrip(b"\r\n")
            has_one_lf = is_first and b"\r" in body and not file.peek(1)  # type: ignore[attr-defined]
            for data in _parted(body) if has_one_lf else (body,):
                try:
                    yield data.decode().removeprefix("\ufeff"), None  # one is before each part of joined files
                except UnicodeDecodeError as error:
                    byte = f"byte {error.start} of the line (0x{data[error.start]:02x})"
                    yield "", f"{byte} is not valid UTF-8 ({error.reason}); {encoding_remedy(data[error.start :])}"
            is_first = False


def _parted(file: bytes) -> list[bytes]:
    """The lines of a file with an LF at its end at most: CR ends them, unless it is white space inside an object."""
    pieces = file.split(b"\r")
    return pieces if all(piece.lstrip().startswith(b"{") for piece in pieces if piece.strip()) else [file]
