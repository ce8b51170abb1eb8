"""The arguments that several verbs have, and the model that they name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_lightning.weights.load import LoadedModel


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


def add_split(where: Any, *, meaning: str, default: str | None = None) -> None:
    """Add --split: `train`, `val`, `test`, or `val/NAME`, one of the further validation sets of the data."""
    where.add_argument("--split", type=_split, metavar="{train,val,val/NAME,test}", default=default, help=meaning)


def _split(text: str) -> str:
    if not re.fullmatch(r"train|val|test|val/[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be train, val, test, or val/NAME of a further validation set")
    return text


def names_records(word: str) -> bool:
    """Whether a word is the name of a file of records."""
    from llm_lightning.data.files.form import named_form
    from llm_lightning.data.files.rows import RECORD_FORMS

    return named_form(Path(word)) in RECORD_FORMS


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
