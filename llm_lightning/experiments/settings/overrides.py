"""Words of the command line in Hydra's grammar: options, and overrides (`KEY=VALUE`, `+KEY=VALUE`, `~KEY`)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def key_of(word: str) -> str:
    """`optimizer.lr` of `++optimizer.lr=1`; a word without `=` is its own key."""
    return word.lstrip("+~").partition("=")[0]


def run_dir_override(folder: Path) -> str:
    """The override that makes `folder` the run folder."""
    return f"hydra.run.dir={quoted(folder)}"


def quoted(folder: str | Path) -> str:
    """A path as the value of an override, whatever characters it has."""
    escaped = str(folder).replace("'", r"\'")
    return f"'{escaped}'"


def unquoted(text: str) -> str:
    """A value without the quotes that `quoted`, or the user, put around it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text


def parsed(word: str) -> Any:
    """An override as Hydra parses it: its `Override`.

    Raises:
        ValueError: if Hydra cannot parse it, saying how to write it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        advice = "write KEY=VALUE, and quote a value with any of ()=,;'\"{}[] twice: 'KEY=\"VALUE\"'"
        raise ValueError(f"cannot read '{word}' ({reason}); {advice}") from None


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Hydra's options and the overrides of a command line without its program: `.overrides`, `.config_dir` ...

    Options and overrides may come in any order.

    Raises:
        ValueError: if there is no such option, or it would bypass the checks.
    """
    arguments = _parse(argv)
    if arguments.experimental_rerun:
        raise ValueError("--experimental-rerun reads a pickle, which can run any code; type the command again instead")
    if arguments.config_path or arguments.config_name:
        raise ValueError(
            "--config-path and --config-name would bypass the checks; use --config-dir FOLDER to add files"
        )
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise ValueError(f"--config-dir {arguments.config_dir}: no such folder")
    return arguments


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of a command line, each with its value, and its overrides."""
    overrides = list(_parse(argv).overrides)
    options: list[str] = []
    left = list(overrides)
    for word in argv:
        if left and word == left[0]:
            left.pop(0)
        else:
            options.append(word)
    return options, overrides


def _parse(argv: Sequence[str]) -> Namespace:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; settings are written KEY=VALUE, and --help lists them")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(list(argv))
