"""What a file is: its form, compression and encoding, by its first bytes and its name.

    path -> first bytes -> compression -> first bytes of what is in it -> FileForm, or one line that says what it is

The bytes decide; where the name says otherwise, that is said once.
"""

from __future__ import annotations

import codecs
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llm_lightning.data.files.compression import COMPRESSIONS, compression_of, marked_compression, open_bytes

FORMS = ("text", "json", "jsonl", "csv", "tsv", "parquet")
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
HEAD = 1 << 16
"""Bytes that are looked at."""

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte-order marks, and the encoding that reads and drops each."""

FOREIGN = (
    (
        0,
        b"PK\x03\x04",
        "a zip archive, as .xlsx and .docx files are",
        "unpack it, or save it as CSV or text",
    ),
    (0, b"%PDF", "a PDF", "extract its text into a .txt file, for example with pdftotext"),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", "save the sheet as CSV, the text as .txt"),
    (0, b"{\\rtf", "an RTF document", "save its text as .txt"),
    (257, b"ustar", "a tar archive", "unpack it and name the folder"),
    (0, b"ARROW1", "an Arrow file", "name the folder of datasets.save_to_disk that it is in, or write parquet"),
    (0, b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"Rar!", "a rar archive", "unpack it"),
    (0, b"version https://git-lfs", "a pointer of Git LFS and not the file itself", "fetch that with git lfs pull"),
    (0, b"GGUF", "a model in GGUF", "weights go into init_from"),
)
"""(where, first bytes, what begins so, remedy)"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileForm:
    """What a file is."""

    form: str
    """one of `FORMS`"""
    compression: str | None
    """gz, bz2, xz or zst"""
    encoding: str
    """of its text; without meaning for parquet"""


PLAIN = FileForm("text", None, "utf-8")


def form_of(path: Path, *, asked: str | None = None, encoding: str = "utf-8") -> FileForm:
    """Look at the first bytes and the name of a file.

    Args:
        asked: its form, where the name and the bytes do not decide (`data.format`).
        encoding: of a text without a byte-order mark.

    Raises:
        ValueError: if it is none of `FORMS`, saying what it is.
    """
    if asked is not None and asked not in FORMS:
        raise ValueError(f"data.format={asked!r} must be one of {', '.join(FORMS)}")
    compression = compression_of(path)
    with open_bytes(path, compression) as file:
        head = file.read(HEAD)
    for start, mark, what, remedy in FOREIGN:
        if head.startswith(mark, start):
            raise ValueError(f"{path} is {what}, which is not read; {remedy}")
    if marked_compression(head) is not None and compression is not None:
        raise ValueError(f"{path} is compressed twice, and once is read; unpack it once")
    named = named_form(path)
    _say_if_not_compressed(path, compression)
    if head.startswith(b"PAR1"):
        _say_if_other(path, named, "parquet")
        return FileForm("parquet", compression, encoding)
    if (asked or named) == "parquet":
        raise ValueError(f"{path} does not begin as parquet does; is it damaged, or of another form (data.format)?")
    found = next((codec for mark, codec in MARKS.items() if head.startswith(mark)), None) or encoding
    if found == encoding:
        _refuse_wide_text(path, head, encoding)
        found = _if_plainly_utf8(path, head, encoding)
    if asked is not None:
        return FileForm(asked, compression, found)
    is_json = json_form(head.decode(found, "replace"))
    form = is_json if is_json is not None and named not in ("csv", "tsv") else named or "text"
    _say_if_other(path, named, form)
    return FileForm(form, compression, found)


def _if_plainly_utf8(path: Path, head: bytes, encoding: str) -> str:
    """`encoding`, or UTF-8 for a file that says so itself: text of another encoding is hardly ever valid UTF-8.

    So one setting serves files of two encodings.
    """
    codec = codecs.lookup(encoding).name
    if codec in ("utf-8", "utf-8-sig", "ascii") or codec.startswith(("utf-16", "utf-32")) or head.isascii():
        return encoding
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
        log.info("%s is UTF-8, and is read so, not as data.encoding=%s", path, encoding)
        return "utf-8"
    if codec == "iso8859-1" and set(head) & set(range(0x80, 0xA0)):
        log.warning(
            "%s has bytes that are unused control characters in %s, and quotes, dashes or the euro sign in cp1252: set "
            "data.encoding=cp1252",
            path, encoding,
        )  # fmt: skip
    return encoding


def named_form(path: Path) -> str | None:
    """The form that the name of a file says, compression aside; None: none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1].removeprefix(".") in COMPRESSIONS:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def json_form(head: str) -> str | None:
    """`json` (an array of objects, or one object) or `jsonl` for a text that begins so; None for other texts.

    Args:
        head: the beginning of the text; its last line may be cut.
    """
    head = head.lstrip("\ufeff \t\r\n")
    if head.startswith("["):
        return "json" if head[1:].lstrip()[:1] in ("{", "]") else None
    if not head.startswith("{") or head[1:].lstrip()[:1] not in ('"', "}"):
        return None
    line, *more = head.split("\n", 1)
    if not more:
        return "jsonl"  # one line, whole or cut
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return "json" if head[1:].lstrip(" \t\r")[:1] == "\n" else "jsonl"  # an indented object; a bad line
    return "jsonl"


def _say_if_other(path: Path, named: str | None, form: str) -> None:
    if named is not None and named != form:
        log.info("%s is read as %s, which its content is", path, form)


def _say_if_not_compressed(path: Path, compression: str | None) -> None:
    named = path.suffix.lower().removeprefix(".")
    if named in COMPRESSIONS and named != compression:
        log.info("%s is read as %s, which it is", path, compression or "a file that is not compressed")


def _refuse_wide_text(path: Path, head: bytes, encoding: str) -> None:
    """UTF-16 without a byte-order mark has a NUL in every other byte of Western text."""
    if encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")) or len(head) < 8:
        return
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4 and min(even, odd) < len(head) // 100 + 1:
        name = "utf-16-le" if odd > even else "utf-16-be"
        raise ValueError(f"{path} looks like UTF-16 without a byte-order mark; set data.encoding={name}")
