"""The command line that repeats a setting, one run for each of its seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.report.entries import Entry
from llm_lightning.experiments.report.study import SEED, Group
from llm_lightning.experiments.settings.overrides import key_of

OF_THE_SWEEP = ("run_name", "resume", "sweep")
"""Words that say where a run lies, or that chose its sweep."""


def typed(command: Any, folder: str | None) -> str | None:
    """A command line as it can be typed again, from `sys.argv`; the program relative to the folder."""
    if not isinstance(command, list) or not command:
        return None
    program, *words = map(str, command)
    program = _shown(program, folder)
    return shlex.join([*["python"] * program.endswith(".py"), program, *words])


def that_repeat(group: Group) -> list[str]:
    """The commands that repeat the runs of a group elsewhere: one if they differ in nothing but the seed."""
    kept = [entry for entry in group.entries if entry.value(group.metric) is not None]
    words = [list(one) for one in dict.fromkeys(tuple(_words(entry)) for entry in kept) if one]
    own = next((str(one.command["config_dir"]) for one in kept if one.command.get("config_dir")), None)
    program = ["python", _program(kept), *(["--config-dir", own] if own else [])]
    without = {tuple(word for word in one if key_of(word) != SEED) for one in words}
    if len(words) > 1 and len(without) == 1:
        seeds = [word.partition("=")[2] for one in words for word in one if key_of(word) == SEED]
        if len(seeds) == len(words):
            shared = without.pop()
            return [shlex.join([*program, "-m", *shared, f"{SEED}={','.join(seeds)}"])]
    return [shlex.join([*program, *one]) for one in words]


def typed_in(entries: Sequence[Entry]) -> str | None:
    """The folder in which the commands were typed: relative paths start there."""
    return next((str(one.command["folder"]) for one in entries if isinstance(one.command.get("folder"), str)), None)


def _program(entries: Sequence[Entry]) -> str:
    """The script that ran, as it is typed."""
    commands = (entry.summary.get("command") for entry in entries)
    programs = [command.split(" ")[0] for command in commands if isinstance(command, str) and "'" not in command[:1]]
    return _shown(programs[0], typed_in(entries)) if programs and programs[0].endswith(".py") else "train.py"


def _shown(program: str, folder: str | None) -> str:
    """A path, relative to the folder if it is inside."""
    path = Path(program)
    is_inside = folder is not None and path.is_absolute() and path.is_relative_to(folder)
    return str(path.relative_to(str(folder))) if is_inside else program


def _words(entry: Entry) -> list[str]:
    keyed = ((key_of(word), word) for word in entry.words)
    return [word for key, word in keyed if not key.startswith(("hydra.", "hydra/")) and key not in OF_THE_SWEEP]
