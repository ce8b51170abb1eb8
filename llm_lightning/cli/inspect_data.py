"""Show records of instruction data as the model sees them: what is learnt, ends of text, padding.

llm-lightning inspect-data my_records.json --template chatml --html records.html
llm-lightning inspect-data outputs/sft/my_run --split val
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_lightning.cli.respond import DATA_SUFFIXES

if TYPE_CHECKING:
    from llm_lightning.data.batches import LMBatch
    from llm_lightning.tokenizers import Tokenizer


class Shown(NamedTuple):
    """What is shown."""

    title: str
    tokenizer: Tokenizer
    batch: LMBatch
    rows: list[str] | None
    """what the rows are called"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a .json or .jsonl file, a named set, or a model of task=sft or task=dpo"
    )
    parser.add_argument("-n", "--number", type=int, default=4, metavar="N", help="records (default: %(default)s)")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="train", help="of a model (default: %(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--template", default="alpaca", metavar="T", help="of a file (default: %(default)s)")
    parser.add_argument(
        "--loss-on", default="response", help="of a file: response, header or all (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", default="gpt2", help="of a file (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from llm_lightning.atomic import write_atomically
    from llm_lightning.data.inspection import as_html, as_text

    if args.number < 1:
        raise ValueError(f"--number {args.number} must be at least 1")
    shown = _of_records(args) if _is_data(args.source) else _of_model(args)
    if args.html:
        write_atomically(args.html, as_html(shown.tokenizer, shown.batch, shown.title, titles=shown.rows))
        print(f"{args.html}: {len(shown.batch.input_ids)} records")
        return
    print(as_text(shown.tokenizer, shown.batch, colour=sys.stdout.isatty(), titles=shown.rows))


def _is_data(source: str) -> bool:
    from llm_lightning.data.instruction import NAMED

    return source.lower().endswith(DATA_SUFFIXES) or source in NAMED


def _of_model(args: argparse.Namespace) -> Shown:
    from llm_lightning.checkpoint import load_model
    from llm_lightning.cli.respond import data_of

    data = data_of(load_model(args.source))
    batch = data.first_batch(args.split, args.number)
    title = f"{data.describe()}: {args.split}"
    return Shown(title, data.tokenizer, batch, data.preview_titles(len(batch.input_ids)))


def _of_records(args: argparse.Namespace) -> Shown:
    """The first records of a file, whether or not there are enough to train on."""
    from llm_lightning.data.batches import MaskedSample, collate_padded
    from llm_lightning.data.instruction import LOSS_ON, NAMED, encode, local_file
    from llm_lightning.data.instruction_records import read_instructions
    from llm_lightning.data.templates import choose_template
    from llm_lightning.tokenizers import build_tokenizer

    if args.loss_on not in LOSS_ON:
        raise ValueError(f"--loss-on {args.loss_on} must be one of {', '.join(LOSS_ON)}")
    tokenizer, template = build_tokenizer(args.tokenizer), choose_template(args.template)
    path = local_file(args.source) if args.source in NAMED else Path(args.source)
    records = read_instructions(path, empty_output="keep")[0][: args.number]
    encoded = [encode(tokenizer, template, one, loss_on=args.loss_on) for one in records]
    samples = [MaskedSample(index, one.ids, one.is_target) for index, one in enumerate(encoded)]
    longest = max(len(one.ids) for one in encoded)
    batch = collate_padded(samples, pad_id=tokenizer.eot_id or 0, context_length=longest)
    return Shown(f"{args.source}: template {template.name}", tokenizer, batch, None)
