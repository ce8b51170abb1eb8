"""All output to the terminal. Text from elsewhere (data, file names, checkpoints, servers, models) may contain control
characters that a terminal obeys: recolour, overwrite, rename the window, paste. They are shown instead.

Standard library only: entry points import it before anything heavy.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TextIO

from llm_lightning.files.atomic import naming

# Controls (C0, DEL, C1), separators of lines and paragraphs, halves of surrogate pairs, and characters that change how
# others are shown: overrides and isolates of direction, invisible ones, tags. Not: joiners (emoji, Persian, Hindi),
# signs that span Arabic digits, variation selectors.
_CONTROLS = (
    "\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_IN_A_TEXT = re.compile(rf"(?![\n\t])[{_CONTROLS}]")
STANDARD_OUTPUT = "standard output"
GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"
_COLOURS = re.compile("(" + "|".join(map(re.escape, (GREEN, GREY, PLAIN))) + ")")


def visible(text: object) -> str:
    r"""A text of several lines with its controls shown, `\x1b` for an escape; line breaks and tabs are kept."""
    return _IN_A_TEXT.sub(_escaped, str(text))


def inline(text: object) -> str:
    r"""A name or a cell: as `visible`, and a line break or a tab is shown as `\n` or `\t`."""
    return _IN_A_LINE.sub(_escaped, str(text))


def one_line(text: object, width: int | None = None) -> str:
    """A text on one line, white space collapsed, controls shown, cut to `width`."""
    line = inline(" ".join(str(text).split()))
    return line if width is None or len(line) <= width else line[: width - 3] + "..."


def counted(n: int, noun: str) -> str:
    """`1 document`, `2,000 documents`: a number with its noun, which takes an s in the plural."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first column aligned left and the others right."""
    rows = [[inline(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def reply(value: object) -> None:
    """Write a plain value as one line of JSON, for the process that started this one to answer it."""
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def say(
    text: object = "", *, file: TextIO | None = None, end: str = "\n", colours: bool = False, flush: bool = False
) -> None:
    """Print; nothing in this package prints but through this module.

    Args:
        file: standard output by default.
        colours: keep the colours that this module names.
    """
    if colours:
        shown = "".join(part if _COLOURS.fullmatch(part) else visible(part) for part in _COLOURS.split(str(text)))
    else:
        shown = visible(text)
    write_raw(shown + end, file, flush=flush)


def say_lines(lines: Iterable[object]) -> None:
    """Print each on one line, even if it contains line breaks."""
    say("\n".join(map(inline, lines)))


def say_json(value: Any, *, ensure_ascii: bool = True) -> None:
    """Print a value as JSON on one line, with JSON's escapes for controls."""
    text = json.dumps(value, ensure_ascii=ensure_ascii)
    say(_IN_A_LINE.sub(lambda found: json.dumps(found[0])[1:-1].replace("\x7f", r"\u007f"), text))


def write_raw(text: str, file: TextIO | None = None, *, flush: bool = False) -> None:
    """Write a text unchanged, for programs that read it.

    Characters that the stream's encoding lacks are escaped: they must not end a run.
    """
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with naming(STANDARD_OUTPUT) if stream is sys.stdout else nullcontext():
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        if flush:
            stream.flush()


def guard_messages() -> None:
    """Show controls in log messages of every package and in warnings, for the whole process."""
    logging.setLogRecordFactory(_Record)
    warnings.showwarning = _show_warning


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return visible(super().getMessage())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)  # Lightning's, where it is loaded
    say(text, file=sys.stderr if file is None else file, end="")


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
