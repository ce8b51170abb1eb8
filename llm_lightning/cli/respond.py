"""Answer the questions of a file, or of the data that a model was trained on; the answers are `model_response`.

llm-lightning respond outputs/sft/my_run questions.json -o responses.json
llm-lightning respond outputs/sft/my_run --split test -o responses.json
llm-lightning respond gpt2-small outputs/sft/one outputs/sft/two --split test -o side_by_side.json

An interrupted command continues where it was when it is repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import (
    add_base_argument,
    add_columns_argument,
    add_device_arguments,
    add_file_arguments,
    add_split,
    file_options,
    names_records,
    open_model,
    typed_columns,
)
from llm_lightning.files.atomic import write_atomically
from llm_lightning.inference.defaults import ANSWER_TEMPERATURE, ANSWER_TOKENS, RECORDS_AT_ONCE
from llm_lightning.terminal import say_lines

if TYPE_CHECKING:
    from llm_lightning.data.templates.conversation import Conversation
    from llm_lightning.weights.load import LoadedModel

COLUMN = "model_response"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        metavar="CHECKPOINT",
        nargs="+",
        help="one or several models (see llm-lightning generate --help), and then a file of records (or a glob, or "
        "a folder)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="the answers (.json)")
    add_split(parser, meaning="instead of a file: a split of the first model's own data")
    parser.add_argument(
        "--template",
        metavar="T",
        help="a name such as alpaca, a text with slots, or a .jinja file (default: that of the training, else the "
        "model's own, else alpaca)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument(
        "--batch-size", type=int, default=RECORDS_AT_ONCE, metavar="N", help="records at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=ANSWER_TOKENS,
        metavar="N",
        help="per answer, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=ANSWER_TEMPERATURE,
        metavar="T",
        help="0: the likeliest token (default: %(default)g)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the fewest tokens whose probabilities sum to P"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    add_device_arguments(parser)
    add_base_argument(parser)
    add_columns_argument(parser)
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.data.templates.conversation import in_words
    from llm_lightning.inference.respond import answered, respond

    checkpoints, data = _split_paths(args)
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--batch-size and --limit must be at least 1")
    columns = _columns(checkpoints)
    conversations: Sequence[Conversation] | None = None
    answers: dict[str, list[str]] = {}
    for checkpoint, column in zip(checkpoints, columns, strict=True):
        loaded = open_model(args, checkpoint=checkpoint)
        if conversations is None:
            conversations = _conversations(loaded, data, args)[: args.limit]
        answers[column] = respond(
            loaded,
            conversations,
            template=args.template,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            progress_file=progress_path(args.output),
            title=column,
        )
    assert conversations is not None
    rows = [
        answered(one, {column: answers[column][index] for column in columns}) for index, one in enumerate(conversations)
    ]
    write_atomically(args.output, json.dumps(rows, indent=2, ensure_ascii=False, default=in_words) + "\n")
    progress_path(args.output).unlink(missing_ok=True)
    say_lines([
        f"{args.output}: {len(rows):,} records, {', '.join(columns)}",
        f"Next: llm-lightning judge {args.output} --lexical",
    ])  # fmt: skip


def progress_path(output: Path) -> Path:
    """The file that keeps answers until all are known."""
    return output.with_name(f".{output.name}.progress.jsonl")


def _split_paths(args: argparse.Namespace) -> tuple[list[str], str | None]:
    """(models, files of records)."""
    *checkpoints, last = args.paths
    is_data = names_records(last)
    if args.split and is_data:
        raise ValueError(f"both {last} and --split {args.split} are given; leave one out")
    if not args.split and (not is_data or not checkpoints):
        raise ValueError("give one or more models and then a file of records, or --split test")
    return (args.paths, None) if args.split else (checkpoints, last)


def _conversations(loaded: LoadedModel, data: str | None, args: argparse.Namespace) -> Sequence[Conversation]:
    from llm_lightning.data.of_checkpoint import conversations_of
    from llm_lightning.inference.respond import read_records

    if data is None:
        found = conversations_of(loaded, instead="give a file of records", texts_only=True, split=args.split)
        return found.conversations_of(args.split)
    return read_records(data, loaded, options=file_options(args), columns=typed_columns(args))


def _columns(checkpoints: list[str]) -> list[str]:
    """A name for each model's answers."""
    if len(checkpoints) == 1:
        return [COLUMN]
    names = [_name(checkpoint) for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    return [f"{COLUMN}_{name}" for name in names]


def _name(checkpoint: str) -> str:
    """gpt2-small, or the name of the run that a file belongs to."""
    path = Path(checkpoint)
    if path.is_file() and path.parent.name == "checkpoints":
        return path.absolute().parent.parent.name
    return path.name
