"""`llm-lightning VERB ...`: what can be done with a trained model. Each verb is the file of that name beside this one.

A verb's module imports nothing heavy at its top, so that help and mistyped options answer at once. It has
`add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from llm_lightning.experiments import unforeseen
from llm_lightning.experiments.processes import end_with_parent
from llm_lightning.files.disk_errors import explain
from llm_lightning.terminal import STANDARD_OUTPUT, guard_messages, inline, one_line, say, write_raw

if TYPE_CHECKING:
    from llm_lightning.weights.load import LoadedModel

VERBS = {
    "generate": "continue one or more prompts",
    "classify": "say which class texts belong to",
    "evaluate": "loss, accuracy, exact match or reward accuracy, on a text or on the data of the training",
    "respond": "answer the questions of a file",
    "judge": "score answers, by a language model or by their words",
    "compare": "the answers of two models side by side, on a page",
    "lineage": "the runs that led to a checkpoint, and whether they are still what they were",
    "inspect-data": "show instruction records as the model sees them",
    "statistics": "lengths, repetitions and frequent answers of a file",
    "near-duplicates": "find records that are almost the same, and remove them",
    "export": "write the weights as a folder that transformers loads",
    "inspect": "what is in this checkpoint",
}
USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
ELSEWHERE, AGAIN = "choose another place", "repeat the command"
_SAVE_MEMORY = "out of memory: give shorter or fewer texts at once, --dtype bfloat16, or a smaller model"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(inline(message))  # may quote what a pattern of the shell found


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    end_with_parent()
    try:
        verb, module, args = _parsed(argv)
    except SystemExit:
        _flush_help()
        raise
    guard_messages()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        module.run(args)
        write_raw("", flush=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `llm-lightning ... | head` has read enough
        unforeseen.stop_writing()
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        if os.environ.get(unforeseen.SHOW_TRACEBACK):
            say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
        message = error if isinstance(error, ValueError) else explain(error, elsewhere=ELSEWHERE, again=AGAIN)
        say(f"llm-lightning {verb}: {one_line(message)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename == STANDARD_OUTPUT:
            unforeseen.stop_writing()
        return USAGE_ERROR
    except Exception as error:
        if unforeseen.is_out_of_memory(error):
            say(f"llm-lightning {verb}: {one_line(error)}; {_SAVE_MEMORY}", file=sys.stderr)
            return USAGE_ERROR
        return unforeseen.report(error, prefix=f"llm-lightning {verb}: ", file=unforeseen.cache_file(verb))
    return 0


def _parsed(argv: list[str] | None) -> tuple[str, ModuleType, argparse.Namespace]:
    verb, rest = _choose_verb(argv)
    module = import_module(f"llm_lightning.cli.{verb.replace('-', '_')}")
    parser = _Parser(prog=f"llm-lightning {verb}", description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    return verb, module, parser.parse_intermixed_args(rest)  # options may stand between prompts


def _flush_help() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `llm-lightning --help | head` has read enough
        unforeseen.stop_writing()


def _choose_verb(argv: list[str] | None) -> tuple[str, list[str]]:
    verbs = "\n".join(f"  {verb:<16} {summary}" for verb, summary in VERBS.items())
    parser = _Parser(
        prog="llm-lightning",
        description="Use a trained model. Training is `python train.py`.",
        epilog=f"verbs:\n{verbs}\n\n`llm-lightning VERB --help` lists the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("llm-lightning"))
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help="one of the verbs below")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    return args.verb, args.rest


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column to the left and the others to the right."""
    rows = [[inline(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every verb that runs a model needs; `open_model` reads it."""
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
    """Add CHECKPOINT, in the words that `load_model` takes."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a .ckpt file, a run folder (its best checkpoint), an adapter alone (adapter.ckpt or a folder of PEFT's), "
        "a folder or .safetensors file of GPT-2 weights, or gpt2-small, gpt2-medium, gpt2-large, gpt2-xl",
    )


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """Add --base: an adapter alone has to find the weights that it belongs to."""
    parser.add_argument(
        "--base", metavar="CHECKPOINT", help="of an adapter alone: its weights (default: where they were in training)"
    )


def open_model(
    args: argparse.Namespace, adapters: Mapping[str, str] | None = None, checkpoint: str | None = None
) -> LoadedModel:
    """Load the model that the arguments of `add_model_arguments` name, or `checkpoint`, `adapters` on it.

    Raises:
        ValueError: if the device is not there, or the checkpoint is damaged.
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


if __name__ == "__main__":
    sys.exit(main())
