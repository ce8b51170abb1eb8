"""The arguments that several verbs have, and the model that they name."""

from __future__ import annotations

import argparse
import glob
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_lightning.data.files.options import FileOptions
    from llm_lightning.weights.load import LoadedModel

FORMS = ("text", "json", "jsonl", "csv", "tsv", "parquet")
OF_MODELS = ("checkpoints", "config.json", "adapter_config.json")
"""What one of is in a folder of a model."""
MODEL_FILES = (".ckpt", ".safetensors", ".gguf")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a verb that runs a model; `open_model` reads them."""
    add_checkpoint_argument(parser)
    add_device_arguments(parser)
    add_base_argument(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are stored)"
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT: whatever `load_model` accepts."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a .ckpt file, a run folder (its best checkpoint), an adapter alone (adapter.ckpt or a folder of PEFT's), "
        "a folder of weights, a .safetensors or .gguf file, hf:ORG/NAME of the hub, or a short name such as gpt2-small",
    )


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """Add --base: where the weights under an adapter are."""
    parser.add_argument(
        "--base", metavar="CHECKPOINT", help="of an adapter alone: its weights (default: where they were in training)"
    )


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how files are read, in the words of the settings `data.*`; `file_options` reads them."""
    group = parser.add_argument_group("how files are read")
    group.add_argument("--format", metavar="F", help=f"{', '.join(FORMS)} (default: by the content and name of each)")
    group.add_argument(
        "--encoding", default="utf-8", metavar="E", help="of text without a byte-order mark (default: %(default)s)"
    )
    group.add_argument(
        "--separator", metavar="C", help="of the cells of a table, such as ';' (default: a comma, in .tsv a tab)"
    )
    group.add_argument(
        "--no-header", dest="header", action="store_false", help="the columns of a table are named 1, 2, ..."
    )
    group.add_argument(
        "--quotes",
        action=argparse.BooleanOptionalAction,
        help="whether quotation marks enclose cells of a table (default: in .csv, not in .tsv)",
    )
    group.add_argument(
        "--newlines", choices=("lf", "keep"), default="lf", help="CRLF and CR become LF, or stay (default: %(default)s)"
    )


def file_options(args: argparse.Namespace) -> FileOptions:
    """The options of `add_file_arguments`.

    Raises:
        ValueError: if a value is none that there is.
    """
    from llm_lightning.data.files.options import FileOptions

    if args.format not in (None, *FORMS):
        raise ValueError(f"--format {args.format} must be one of {', '.join(FORMS)}")
    return FileOptions(args.format, args.encoding, args.separator, args.header, args.quotes, args.newlines)


def add_columns_argument(parser: argparse.ArgumentParser) -> None:
    """Add --columns; `typed_columns` reads it."""
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=NAME",
        help="of records: where a field is, as instruction=question output=answer (default: as in the training)",
    )


def typed_columns(args: argparse.Namespace) -> dict[str, str]:
    """Field -> its name in the records."""
    wrong = next((word for word in args.columns if not all(word.partition("="))), None)
    if wrong is not None:
        raise ValueError(f"--columns {wrong} must be FIELD=NAME, such as instruction=question")
    return dict(word.split("=", 1) for word in args.columns)


OWN_WORDS = {
    r"data\.header=false": "--no-header",
    r"data\.quotes=true": "--quotes",
    r"data\.quotes=false": "--no-quotes",
    r"data\.text_(?:column|field)\b": "--text-field",
    r"data\.label_column\b": "--label-column",
    r"data\.columns\.(\w+)": r"--columns \1=NAME",
    r'"data\.separator=([^"]*)"': r"--separator \1",
    r"data\.(format|encoding|separator|newlines|columns)\b": r"--\1",
    r"(--(?:text-field|label-column|format|encoding|separator|newlines))=": r"\1 ",
    r" \(of a run: data\.path\)": "",
    r"\bset --": "give --",
}


def in_own_words(message: str) -> str:
    """A message about settings `data.*` in the options of a verb."""
    for setting, option in OWN_WORDS.items():
        message = re.sub(setting, option, message)
    return message


class OwnWords(logging.Formatter):
    """What is logged of files, in the options of a verb."""

    def format(self, record: logging.LogRecord) -> str:
        return in_own_words(super().format(record))


@contextmanager
def named_file(name: str) -> Iterator[str]:
    """The name of a file, for `-` that of a copy of the standard input: files are read more than once."""
    if name != "-":
        yield name
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "standard input"
        copy.write_bytes(sys.stdin.buffer.read())
        try:
            yield str(copy)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), copy.name)) from error


class _Splits(tuple[str, ...]):
    """The names that a shell completes; `val/NAME` is one, too."""

    def __contains__(self, word: object) -> bool:
        return re.fullmatch(r"train|val|test|val/[A-Za-z0-9_-]+", str(word)) is not None


def add_split(where: Any, *, meaning: str, default: str | None = None) -> None:
    """Add --split: `train`, `val`, `test`, or `val/NAME`, one of the further validation sets of the data."""
    splits = _Splits(("train", "val", "test"))
    where.add_argument("--split", choices=splits, metavar="{train,val,val/NAME,test}", default=default, help=meaning)


def names_records(word: str) -> bool:
    """Whether a word names files of records: a file, a glob, or a folder that holds no model."""
    from llm_lightning.data.files.form import named_form
    from llm_lightning.data.files.rows import RECORD_FORMS

    path = Path(word).expanduser()
    if path.is_dir():
        return not any((path / name).exists() for name in OF_MODELS)
    forms = [named_form(Path(part.strip())) for part in word.split(",")]
    return path.suffix not in MODEL_FILES and (
        path.is_file() or glob.has_magic(word) or all(form in RECORD_FORMS for form in forms)
    )


def open_model(
    args: argparse.Namespace, adapters: Mapping[str, str] | None = None, checkpoint: str | None = None
) -> LoadedModel:
    """Load the model that the arguments of `add_model_arguments` name, or `checkpoint`, with `adapters` on it.

    Raises:
        ValueError: if the device is not available, or the checkpoint is damaged.
        FileNotFoundError: if there is no such checkpoint.
    """
    import torch

    from llm_lightning.weights.load import load_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    path = args.checkpoint if checkpoint is None else checkpoint
    return load_model(path, device=_device(args.device), dtype=dtype, base=args.base, adapters=adapters)


def _device(name: str) -> str:
    import torch

    available = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    if name == "auto":
        return available[0]
    if name not in available and not (name == "cuda" and available[0] == "cuda:0"):
        raise ValueError(f"--device {name} is not available here; use {', '.join(available)} or auto")
    return name
