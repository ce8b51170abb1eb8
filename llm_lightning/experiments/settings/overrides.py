"""Words of the command line, as Hydra reads them: `KEY=VALUE`, `+KEY=VALUE`, `~KEY`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def key_of(word: str) -> str:
    """`optimizer.lr` of `++optimizer.lr=1`; a word without `=` is its own key."""
    return word.lstrip("+~").partition("=")[0]


def run_dir_is(folder: Path) -> str:
    """The setting that makes `folder` the run folder."""
    return f"hydra.run.dir={quoted(folder)}"


def quoted(folder: Path) -> str:
    """A path as the value of a setting, whatever is in it."""
    escaped = str(folder).replace("'", r"\'")
    return f"'{escaped}'"


def unquoted(text: str) -> str:
    """What a user, or Hydra's quotes around it, means by a folder."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text


def parsed(word: str) -> Any:
    """A setting as Hydra understands it: an `Override`.

    Raises:
        ValueError: saying how to write it, if Hydra cannot read it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        advice = "write KEY=VALUE, and quote a value with any of ()=,'\"{}[] twice: 'KEY=\"VALUE\"'"
        raise ValueError(f"cannot read '{word}' ({reason}); {advice}") from None
