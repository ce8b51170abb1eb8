"""Classify texts, with the probability of the class.

llm-lightning classify outputs/classification/my_run "Hello, are you free tonight?"
llm-lightning classify outputs/classification/my_run --file messages.txt --output classes.jsonl
cat messages.txt | llm-lightning classify outputs/classification/my_run --file -
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import add_model_arguments, open_model
from llm_lightning.terminal import inline, one_line, say, say_json, say_lines

if TYPE_CHECKING:
    from llm_lightning.inference.classify import Classification

WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="text to classify")
    parser.add_argument("--file", metavar="FILE", help="more texts, one per line, or records; -: standard input")
    parser.add_argument("--text-field", default="text", metavar="KEY", help="of records (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON object per text to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")


def run(args: argparse.Namespace) -> None:
    from llm_lightning.files.atomic import write_atomically
    from llm_lightning.inference.classify import classify_texts

    if not args.texts and not args.file:
        raise ValueError('no text: give one in quotes, such as "Are you free tonight?", or --file FILE')
    loaded = open_model(args)
    texts = [*args.texts, *(_read(args.file, args.text_field) if args.file else ())]
    results = classify_texts(loaded, texts, progress=True)
    if args.output:
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in results)
        write_atomically(args.output, "".join(lines))
        say_lines([f"{args.output}: {len(texts):,} texts"])
        return
    for one in results:
        if args.json:
            say_json(asdict(one), ensure_ascii=False)
        else:
            say(_row(one))


def _row(result: Classification) -> str:
    return f"{inline(result.label)}\t{result.probabilities[result.label]:.3f}\t{one_line(result.text, WIDTH)}"


def _read(name: str, text_field: str) -> list[str]:
    """The texts of a file, or of standard input."""
    from llm_lightning.data.corpus.sources import Records
    from llm_lightning.data.files.form import form_of

    if name == "-":
        return _lines("standard input", sys.stdin.buffer.read())
    path = Path(name)
    if form_of(path).form != "text":
        return ["".join(document.chunks) for document in Records(path, text_field).documents()]
    return _lines(name, path.read_bytes())


def _lines(name: str, content: bytes) -> list[str]:
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    empty = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
    if empty is not None:
        raise ValueError(f"{name}, line {empty} is empty; every line is one text")
    return lines
