"""Show which tokens of records or pairs are trained on, with ends of text and padding.

llm-lightning inspect-data my_records.json --template chatml --html records.html
llm-lightning inspect-data my_records.json --model smollm2-135m-instruct    in its template, as it would be tuned
llm-lightning inspect-data short_preferences -n 2                    with fields chosen and rejected: pairs
llm-lightning inspect-data outputs/sft/my_run --split val
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_lightning.cli.arguments import (
    add_columns_argument,
    add_file_arguments,
    add_split,
    file_options,
    names_records,
    typed_columns,
)
from llm_lightning.terminal import say, say_lines

if TYPE_CHECKING:
    from llm_lightning.data.batches import Example, LMBatch
    from llm_lightning.data.templates.base import Template
    from llm_lightning.data.templates.conversation import Conversation
    from llm_lightning.files.download import Pinned
    from llm_lightning.tokenizers.base import Tokenizer


class Shown(NamedTuple):
    """A batch and its titles."""

    title: str
    tokenizer: Tokenizer
    batch: LMBatch
    rows: list[str] | None
    """titles of the rows"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file of records (or a glob, or a folder), a named set, or a model of task=sft or task=dpo",
    )
    parser.add_argument("-n", "--number", type=int, default=4, metavar="N", help="records (default: %(default)s)")
    add_split(parser, meaning="of a model (default: %(default)s)", default="train")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing")
    parser.add_argument(
        "--model", metavar="CHECKPOINT", help="of a file: a model to tune, which brings its tokenizer and its template"
    )
    parser.add_argument("--template", metavar="T", help="of a file (default: that of --model, else alpaca)")
    parser.add_argument(
        "--loss-on", default="response", help="of a file: response, header or all (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", help="of a file (default: that of --model, else gpt2)")
    add_columns_argument(parser)
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.data.inspection import as_html, as_text
    from llm_lightning.files.atomic import write_atomically

    if args.number < 1:
        raise ValueError(f"--number {args.number} must be at least 1")
    shown = _of_records(args) if _is_data(args.source) else _of_model(args)
    if args.html:
        write_atomically(args.html, as_html(shown.tokenizer, shown.batch, shown.title, titles=shown.rows))
        say_lines([f"{args.html}: {len(shown.batch.input_ids)} rows"])
        return
    colours = sys.stdout.isatty()
    say(as_text(shown.tokenizer, shown.batch, colour=colours, titles=shown.rows), colours=colours)


def _is_data(source: str) -> bool:
    return names_records(source) or source in _named()


def _named() -> dict[str, Path | Pinned]:
    from llm_lightning.data import instruction, preference

    return instruction.NAMED | preference.NAMED


def _of_model(args: argparse.Namespace) -> Shown:
    from llm_lightning.data.of_checkpoint import conversations_of
    from llm_lightning.weights.load import load_model

    data = conversations_of(load_model(args.source), instead="give a file of records", split=args.split)
    batch, titles = data.first_rows(args.split, args.number)
    title = f"{data.describe()}: {args.split}"
    return Shown(title, data.tokenizer, batch, titles)


def _of_records(args: argparse.Namespace) -> Shown:
    """The first records of a file, whether or not there are enough to train on."""
    from llm_lightning.data.batches import collate_padded
    from llm_lightning.data.instruction import LOSS_ON
    from llm_lightning.data.records.like_training import read_like_training
    from llm_lightning.files.download import file_of

    if args.loss_on not in LOSS_ON:
        raise ValueError(f"--loss-on {args.loss_on} must be one of {', '.join(LOSS_ON)}")
    tokenizer, template = _form_of(args)
    template.check_tokenizer(tokenizer)
    path = file_of(_named()[args.source]) if args.source in _named() else args.source
    records = read_like_training(path, file_options(args), {}, typed_columns(args), pairs_win=True)[: args.number]
    make = _record_samples if records[0].rejected is None else _pair_samples
    samples, titles = make(records, args, tokenizer, template)
    longest = max(len(one.token_ids) for one in samples)
    batch = collate_padded(samples, pad_id=tokenizer.eot_id or 0, context_length=longest)
    return Shown(f"{args.source}: template {template.name}", tokenizer, batch, titles)


def _form_of(args: argparse.Namespace) -> tuple[Tokenizer, Template]:
    """The tokenizer and the template of a file."""
    from llm_lightning.data.templates.choose import choose_template
    from llm_lightning.inference.template import template_of
    from llm_lightning.tokenizers.build import build_tokenizer
    from llm_lightning.weights.load import load_model

    if args.model is None:
        return build_tokenizer(args.tokenizer or "gpt2"), choose_template(args.template)
    if args.tokenizer is not None:
        raise ValueError(f"--tokenizer {args.tokenizer}: --model {args.model} brings its own; leave one of them out")
    loaded = load_model(args.model)
    return loaded.tokenizer, template_of(loaded, args.template)


def _record_samples(
    records: Sequence[Conversation], args: argparse.Namespace, tokenizer: Tokenizer, template: Template
) -> tuple[list[Example], None]:
    from llm_lightning.data.instruction import Targets, encode

    return [encode(tokenizer, template, one, Targets(args.loss_on)) for one in records], None


def _pair_samples(
    pairs: Sequence[Conversation], args: argparse.Namespace, tokenizer: Tokenizer, template: Template
) -> tuple[list[Example], list[str]]:
    from llm_lightning.data.preference import Scoring, encode, titles_of_pairs

    if args.loss_on == "all":
        raise ValueError("--loss-on all: of pairs only the answers are scored; use response or header")
    encoded = [encode(tokenizer, template, one, Scoring(score_header=args.loss_on == "header")) for one in pairs]
    return [side for pair in encoded for side in pair.sequences], titles_of_pairs(2 * len(pairs))
