"""Classify texts, with the probability of the class.

llm-lightning classify outputs/classification/my_run "Hello, are you free tonight?"
llm-lightning classify outputs/classification/my_run --file messages.txt --output classes.jsonl
cat messages.txt | llm-lightning classify outputs/classification/my_run --file -
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import add_file_arguments, add_model_arguments, file_options, named_file, open_model
from llm_lightning.terminal import inline, one_line, say, say_json, say_lines

if TYPE_CHECKING:
    from llm_lightning.inference.classify import Classification
    from llm_lightning.weights.load import LoadedModel

WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="text to classify")
    parser.add_argument("--file", metavar="FILE", help="more texts: one per line, or records; -: standard input")
    parser.add_argument(
        "--text-field", metavar="KEY", help="of records: where the text is (default: as in the training)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON object per text to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.files.atomic import write_atomically
    from llm_lightning.inference.classify import classify_texts

    if not args.texts and not args.file:
        raise ValueError('no text: give one in quotes, such as "Are you free tonight?", or --file FILE')
    loaded = open_model(args)
    texts = [*args.texts, *(_texts_of(args, loaded) if args.file else ())]
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


def _texts_of(args: argparse.Namespace, loaded: LoadedModel) -> list[str]:
    """The texts of files, or of the standard input, in the columns of the training."""
    from llm_lightning.data.lines import texts_of
    from llm_lightning.data.of_checkpoint import settings_of

    trained = settings_of(loaded)
    column = args.text_field or trained.get("text_column") or "text"
    with named_file(args.file) as file:
        return texts_of(file, file_options(args), column=column, label_column=trained.get("label_column") or "label")
