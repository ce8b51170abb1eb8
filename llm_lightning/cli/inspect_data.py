"""Show records of instruction data as the model sees them: what is learnt, ends of text, padding.

llm-lightning inspect-data my_records.json --template chatml --html records.html
llm-lightning inspect-data outputs/sft/my_run --split val
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_lightning.data.instruction import InstructionDataModule

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a .json or .jsonl file, a named set, or a model of task=sft")
    parser.add_argument("-n", "--number", type=int, default=4, metavar="N", help="records (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="(default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--template", default="alpaca", metavar="T", help="of a file (default: %(default)s)")
    parser.add_argument(
        "--loss-on", default="response", help="of a file: response, header or all (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", default="gpt2", help="of a file (default: %(default)s)")
    parser.add_argument(
        "--context-length", type=int, default=1024, metavar="N", help="of a file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from llm_lightning.atomic import write_atomically
    from llm_lightning.data.inspection import as_html, as_text

    if args.number < 1:
        raise ValueError(f"--number {args.number} must be at least 1")
    data = _data(args)
    batch = data.first_batch(args.split, args.number)
    if args.html:
        title = f"{data.describe()}: {args.split}"
        write_atomically(args.html, as_html(data.tokenizer, batch, title))
        print(f"{args.html}: {len(batch.input_ids)} records")
        return
    print(as_text(data.tokenizer, batch, colour=sys.stdout.isatty()))


def _data(args: argparse.Namespace) -> InstructionDataModule:
    from llm_lightning.checkpoint import load_model
    from llm_lightning.cli.respond import data_of
    from llm_lightning.data.instruction import NAMED, InstructionDataModule
    from llm_lightning.tokenizers import build_tokenizer

    if not args.source.lower().endswith(DATA_SUFFIXES) and args.source not in NAMED:
        return data_of(load_model(args.source))
    named = args.source in NAMED
    data = InstructionDataModule(
        tokenizer=build_tokenizer(args.tokenizer),
        context_length=args.context_length,
        name=args.source if named else None,
        path=None if named else args.source,
        template=args.template,
        loss_on=args.loss_on,
        batch_size=args.number,
    )
    data.build()
    return data
