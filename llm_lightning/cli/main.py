"""`llm-lightning VERB ...`: the uses of a trained model. Each verb is the file of that name beside this one.

A verb has `add_arguments(parser)` and `run(args)`, and its module imports nothing heavy at its top: help and errors of
options are instant.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NoReturn

from llm_lightning.cli.arguments import OwnWords, in_own_words
from llm_lightning.experiments import unforeseen
from llm_lightning.experiments.processes import end_with_parent
from llm_lightning.files.disk_errors import explain
from llm_lightning.terminal import STANDARD_OUTPUT, guard_messages, inline, one_line, say, write_raw

VERBS = {
    "generate": "continue prompts",
    "classify": "classify texts, with probabilities",
    "evaluate": "measure loss, accuracy, exact match or reward accuracy, on texts or on the data of the training",
    "respond": "answer the questions of a file",
    "judge": "score answers, lexically or with an LLM judge",
    "compare": "show the answers of two models side by side, on a page",
    "runs": "list the runs in a folder: status, steps, metrics, settings that differ",
    "report": "write a page about runs: settings over seeds, comparisons, plots",
    "lineage": "list the runs that led to a checkpoint, and whether their files have changed",
    "inspect-data": "show which tokens of records are trained on",
    "statistics": "count lengths and repetitions in a file",
    "near-duplicates": "find near-duplicate records, and remove them",
    "export": "write the weights as a folder that transformers loads, or as GGUF for llama.cpp and Ollama",
    "inspect": "show what a checkpoint contains",
    "completion": "print a script for the completion of verbs and options in a shell",
}
SAYS = ("llm_lightning.data.files", "llm_lightning.data.lines", "llm_lightning.data.records")
"""Loggers of how files are read."""
USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
ELSEWHERE, AGAIN = "choose another place", "repeat the command"
_SAVE_MEMORY = "out of memory: give shorter or fewer texts at once, --dtype bfloat16, or a smaller model"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(inline(message))  # may quote the name of any file


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
    own_words = in_own_words if hasattr(args, "encoding") else str
    if hasattr(args, "encoding"):
        _say_how_files_are_read()
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
        say(f"llm-lightning {verb}: {one_line(own_words(str(message)))}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename == STANDARD_OUTPUT:
            unforeseen.stop_writing()
        return USAGE_ERROR
    except Exception as error:
        if unforeseen.is_out_of_memory(error):
            say(f"llm-lightning {verb}: {one_line(error)}; {_SAVE_MEMORY}", file=sys.stderr)
            return USAGE_ERROR
        return unforeseen.report(error, prefix=f"llm-lightning {verb}: ", file=unforeseen.cache_file(verb))
    return 0


def _say_how_files_are_read() -> None:
    """What is said once of a file, such as the column that is read, goes to the standard error."""
    for name in SAYS:
        logging.getLogger(name).setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # of `main`, not of what has called it
            handler.setFormatter(OwnWords("%(message)s"))


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


def _version() -> str:
    try:
        return version("llm-lightning")
    except PackageNotFoundError:
        return "unknown: a clone that is not installed"


def _choose_verb(argv: list[str] | None) -> tuple[str, list[str]]:
    verbs = "\n".join(f"  {verb:<16} {summary}" for verb, summary in VERBS.items())
    parser = _Parser(
        prog="llm-lightning",
        description="Use a trained model. Training is `python train.py`.",
        epilog=f"verbs:\n{verbs}\n\n`llm-lightning VERB --help` lists the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help="one of the verbs below")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    return args.verb, args.rest


if __name__ == "__main__":
    sys.exit(main())
