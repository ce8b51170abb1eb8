"""Answer the questions of a file, or of the data that a model was trained with; writes them with `model_response`.

llm-lightning respond outputs/sft/my_run questions.json -o responses.json
llm-lightning respond outputs/sft/my_run --split test -o responses.json
llm-lightning respond gpt2-small outputs/sft/one outputs/sft/two --split test -o side_by_side.json

Stopped before its end, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_base_argument, add_device_arguments, open_model
from llm_lightning.files.atomic import naming, write_atomically
from llm_lightning.terminal import inline, say_lines

if TYPE_CHECKING:
    from llm_lightning.data.conversations import ConversationDataModule
    from llm_lightning.data.templates import Conversation, Template
    from llm_lightning.weights.load import LoadedModel

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson")
COLUMN = "model_response"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        metavar="CHECKPOINT",
        nargs="+",
        help="one or several models (see llm-lightning generate --help), and then a .json or .jsonl file of records",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="where the answers go (.json)")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="instead of a file: a part of the first model's own data"
    )
    parser.add_argument(
        "--template",
        metavar="T",
        help="alpaca, phi3, chatml, or a text with slots (default: that of training, else alpaca)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="records at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="per answer, at most (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens of probability P together"
    )
    parser.add_argument("--seed", type=int, help="the same seed draws the same answers")
    add_device_arguments(parser)
    add_base_argument(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.inference.respond import answered

    checkpoints, data = _split_paths(args)
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--batch-size and --limit must be at least 1")
    columns = _columns(checkpoints)
    conversations: list[Conversation] | None = None
    found: dict[str, list[str]] = {}
    for checkpoint, column in zip(checkpoints, columns, strict=True):
        loaded = open_model(args, checkpoint=checkpoint)
        if conversations is None:
            conversations = _conversations(loaded, data, args.split)[: args.limit]
        found[column] = _respond(loaded, conversations, args, column)
    assert conversations is not None
    rows = [
        answered(one, {column: found[column][index] for column in columns}) for index, one in enumerate(conversations)
    ]
    write_atomically(args.output, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    progress_path(args.output).unlink(missing_ok=True)
    say_lines([
        f"{args.output}: {len(rows):,} records, {', '.join(columns)}",
        f"Next: llm-lightning judge {args.output} --lexical",
    ])  # fmt: skip


def data_of(loaded: LoadedModel) -> ConversationDataModule[Any, Any]:
    """The data that a model of task=sft or task=dpo was trained with, read again.

    Raises:
        ValueError: if the checkpoint names no such data, or the data has changed since.
    """
    from llm_lightning.data.instruction import InstructionDataModule
    from llm_lightning.data.preference import PreferenceDataModule
    from llm_lightning.files.places import read_data_again

    # A class that a checkpoint names is never built.
    classes: dict[str, Any] = {"sft": InstructionDataModule, "dpo": PreferenceDataModule}
    settings = data_settings(loaded)
    if loaded.header.get("task") not in classes or "template" not in settings:
        raise ValueError(
            "this model was not trained on questions and answers (task=sft, task=dpo); give a file of records"
        )
    length = loaded.gpt.config.context_length
    make = classes[loaded.header["task"]]

    def build(found: dict[str, Any]) -> ConversationDataModule[Any, Any]:
        options = {key: value for key, value in found.items() if key not in ("_target_", "preview")}
        data: ConversationDataModule[Any, Any] = make(tokenizer=loaded.tokenizer, context_length=length, **options)
        data.build()
        return data

    data = read_data_again(loaded.header, loaded.path, build, lambda one: one.data_digest)
    trained_on = loaded.header.get("lineage", {}).get("data")
    if trained_on not in (None, data.data_digest):
        raise ValueError(f"{data.describe()}: not the data that the model was trained with; give a file of records")
    return data


def data_settings(loaded: LoadedModel) -> dict[str, Any]:
    """The settings of the data that a model was trained on."""
    return dict(loaded.header.get("config", {}).get("data") or {})


def read_records(path: Path, loaded: LoadedModel) -> list[Conversation]:
    """Records of a file, in the columns of the model's training; of pairs, the chosen answer is the meant one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what is wrong.
    """
    from llm_lightning.data.records import instruction as instruction_records
    from llm_lightning.data.records import preference as preference_records
    from llm_lightning.data.records.json import read_json_records

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    columns = data_settings(loaded).get("columns") or {}
    first = read_json_records(path)[0].record
    pair = {columns.get(field) or field for field in ("chosen", "rejected")}
    if pair <= set(first) and (columns.get("output") or "output") not in first:
        known = {field: name for field, name in columns.items() if field in preference_records.FIELDS}
        return [one.conversation for one in preference_records.read_preferences(path, columns=known)[0]]
    known = {field: name for field, name in columns.items() if field in instruction_records.FIELDS}
    return instruction_records.read_instructions(path, columns=known, empty_output="keep")[0]


def template_of(loaded: LoadedModel, wanted: str | None) -> Template:
    """The wanted template, or that of the model's training, or alpaca, which is then said."""
    from llm_lightning.data.templates import choose_template

    trained = data_settings(loaded).get("template")
    if wanted is None and trained is None:
        log.warning("this model was trained without a template: alpaca is used; --template names another")
    return choose_template(wanted or trained or "alpaca")


def progress_path(output: Path) -> Path:
    """Where answers stand until all are there."""
    return output.with_name(f".{output.name}.progress.jsonl")


def _respond(
    loaded: LoadedModel, conversations: list[Conversation], args: argparse.Namespace, column: str
) -> list[str]:
    """Every answer of one model, those of an interrupted command included."""
    from tqdm import tqdm

    from llm_lightning.inference.respond import respond

    template = template_of(loaded, args.template)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    model_key = [loaded.header.get("digest"), template.text, args.max_new_tokens, sampling, args.dtype]
    keys = [_key(model_key, loaded, template, one) for one in conversations]
    progress = progress_path(args.output)
    known = _known(progress)
    missing = [index for index, key in enumerate(keys) if key not in known]
    if len(missing) < len(keys):
        log.warning("%d of %d answers are there already, in %s", len(keys) - len(missing), len(keys), progress)
    progress.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(progress),
        progress.open("a", encoding="utf-8") as file,
        tqdm(total=len(missing), desc=inline(column), disable=None) as bar,
    ):

        def keep(index: int, response: str) -> None:
            known[keys[missing[index]]] = response
            file.write(json.dumps([keys[missing[index]], response]) + "\n")
            file.flush()
            bar.update()

        respond(
            loaded.gpt,
            loaded.tokenizer,
            template,
            [conversations[index] for index in missing],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            on_response=keep,
            **sampling,
        )
    return [known[key] for key in keys]


def _key(model_key: list[Any], loaded: LoadedModel, template: Template, one: Conversation) -> str:
    content = json.dumps([model_key, template.prompt_ids(loaded.tokenizer, one)])
    return hashlib.sha256(content.encode()).hexdigest()


def _known(progress: Path) -> dict[str, str]:
    """What an interrupted command has left; a line that it did not finish is no answer."""
    if not progress.is_file():
        return {}
    whole = progress.read_text(encoding="utf-8").rpartition("\n")[0]
    write_atomically(progress, whole + "\n" if whole else "")
    return dict(json.loads(line) for line in whole.splitlines())


def _split_paths(args: argparse.Namespace) -> tuple[list[str], Path | None]:
    """(models, file of records)."""
    *checkpoints, last = args.paths
    is_data = last.lower().endswith(DATA_SUFFIXES)
    if args.split and is_data:
        raise ValueError(f"both {last} and --split {args.split} are given; leave one out")
    if not args.split and (not is_data or not checkpoints):
        raise ValueError("give one or more models and then a .json or .jsonl file of records, or --split test")
    return (args.paths, None) if args.split else (checkpoints, Path(last))


def _conversations(loaded: LoadedModel, data: Path | None, split: str | None) -> list[Conversation]:
    if data is None:
        return data_of(loaded).conversations_of(split or "test")
    return read_records(data, loaded)


def _columns(checkpoints: list[str]) -> list[str]:
    """A name for each model's answers."""
    if len(checkpoints) == 1:
        return [COLUMN]
    names = [_name(checkpoint) for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    return [f"{COLUMN}_{name}" for name in names]


def _name(checkpoint: str) -> str:
    """gpt2-small, or the run that a file belongs to."""
    path = Path(checkpoint)
    if path.is_file() and path.parent.name == "checkpoints":
        return path.absolute().parent.parent.name
    return path.name
