"""All runs below a folder, as plain records: found, chosen, sorted."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.failures import FAILURE
from llm_lightning.experiments.run_folder import CONFIG, CONFIG_JSON
from llm_lightning.experiments.run_status import FACTS, STATUSES, Names, Run, read_run
from llm_lightning.nearest import did_you_mean

PLACES = ("run_name", "resume")
"""Settings that say where a run is, not what it computes."""
MOST_NAMED = 40
"""Maximum number of known names in a message."""


def runs(folder: str | Path = "outputs", *, every_setting: bool = False) -> list[dict[str, Any]]:
    """The runs at any depth of a folder, as plain records, which `pandas.DataFrame` takes.

    Args:
        every_setting: give all settings of each run, not only those in which runs of one task differ.

    Returns:
        for each run its facts (`FACTS`), metrics (`val/loss`) and settings (`optimizer.lr`).

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.

    Example:
        >>> table = pandas.DataFrame(llm_lightning.runs("outputs"))
        >>> table.groupby("optimizer.lr")["val/loss"].mean()
    """
    return records(read_runs(folder), every_setting=every_setting)


def records(found: Sequence[Run], *, every_setting: bool = False) -> list[dict[str, Any]]:
    """Each run as one dict: the facts first."""
    keys = set(differing(found))
    return [
        run.facts
        | {
            key: value
            for key, value in (run.metrics | run.settings).items()
            if key not in run.facts and (every_setting or key in run.metrics or key in keys)
        }
        for run in found
    ]


def differing(found: Iterable[Run]) -> list[str]:
    """The settings in which runs of one task differ, in the order of the files.

    Runs of two tasks have different settings in any case. A place is no difference, unless there is no other.
    """
    first: dict[Any, dict[str, Any]] = {}
    order: dict[str, None] = {}
    keys: set[str] = set()
    for run in found:
        if run.settings:
            order |= dict.fromkeys(run.settings)
            other = first.setdefault(run.settings.get("task._target_"), run.settings)
            keys |= {key for key, _ in other.items() ^ run.settings.items()}
    chosen = keys.difference(PLACES) or keys
    return [key for key in order if key in chosen]


def read_runs(folder: str | Path) -> list[Run]:
    """The runs at any depth of a folder, sorted by name, numbers by their value.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; give the folder that holds the runs")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; give the folder that holds the runs")
    found = [read_run(path, names, _name(path, root)) for path, names in _run_folders(root)]
    return sorted(found, key=lambda run: natural(run.facts["name"]))


def _name(path: Path, root: Path) -> str:
    return path.absolute().name if path == root else path.relative_to(root).as_posix()


def _run_folders(root: Path) -> Iterator[tuple[Path, Names]]:
    """Each run folder with its content. Runs are not looked for inside a run, nor behind a link.

    A folder that was exported for transformers has a `config.json`, too, but no `.lock`.
    """
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                inside = list(entries)
        except OSError:  # removed since, or not to be read by this user
            continue
        names = {entry.name: entry.is_file(follow_symlinks=False) for entry in inside}
        if names.keys() & {CONFIG, FAILURE} or names.keys() >= {CONFIG_JSON, ".lock"}:
            yield folder, names
        else:
            folders = (entry.name for entry in inside if entry.is_dir(follow_symlinks=False))
            waiting += [folder / name for name in folders if not name.startswith(".")]


def select(found: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that fulfil every condition `KEY=VALUE`; VALUE may have wildcards, or list alternatives: `a,b`.

    Raises:
        ValueError: if a condition is misspelt.
    """
    chosen = list(found)
    for condition in conditions if found else ():
        key, equals, wanted = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition} must be KEY=VALUE, such as status=failed")
        refuse_unknown(found, [key], "--where")
        if key == "status":
            _refuse_no_status(wanted)
        chosen = [run for run in chosen if _fits(run.values.get(key), wanted, key)]
    return chosen


def _refuse_no_status(wanted: str) -> None:
    for word in wanted.split(","):
        if not fnmatch.filter(STATUSES, word):
            hint = did_you_mean(word, STATUSES)
            raise ValueError(f"--where status={word}: {hint}a run is {', '.join(STATUSES)}")


def _fits(value: Any, wanted: str, key: str) -> bool:
    texts = [as_text(value), *([Path(str(value)).name] if key == "name" else [])]
    return any(
        text == pattern or fnmatch.fnmatchcase(text, pattern) or _equal_numbers(value, pattern)
        for text in texts
        for pattern in (wanted, *wanted.split(","))
    )


def _equal_numbers(value: Any, text: str) -> bool:
    try:
        return not isinstance(value, (bool, str)) and value is not None and float(text) == value
    except ValueError:
        return False


def ordered(found: Sequence[Run], key: str, *, reverse: bool = False) -> list[Run]:
    """The runs sorted by a value: numbers, then texts; those without it are last in both directions."""
    known = [run for run in found if not _is_missing(run.values.get(key))]
    missing = [run for run in found if _is_missing(run.values.get(key))]
    return [*sorted(known, key=lambda run: _sort_key(run.values[key]), reverse=reverse), *missing]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _sort_key(value: Any) -> tuple[int, float, list[tuple[int, float, str]]]:
    return (1, 0.0, natural(value)) if isinstance(value, str) else (0, value, [])


def natural(text: str) -> list[tuple[int, float, str]]:
    """A key that sorts the numbers in a text by their value: `lr_1e-4`, `lr_0.001`, `lr_2`, `lr_10`."""
    parts = re.split(r"([0-9]{1,15}(?:\.[0-9]{1,15})?(?:e[+-]?[0-9]{1,3})?)", text)
    numbered = [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]
    return [*numbered, (2, 0.0, text)]


def refuse_unknown(found: Sequence[Run], keys: Iterable[str], option: str) -> None:
    """Refuse a key that no run has.

    Raises:
        ValueError: naming the nearest key and others.
    """
    known = list(dict.fromkeys([*FACTS, *(key for run in found for key in run.metrics)]))
    settings = dict.fromkeys(key for run in found for key in run.settings)
    for key in keys:
        if key not in known and key not in settings:
            hint = did_you_mean(key, [*known, *settings])
            shown = [*known, *differing(found)][:MOST_NAMED]
            raise ValueError(f"{option} {key}: no run has it; {hint}There are {', '.join(shown)}, and every setting")


def as_text(value: Any) -> str:
    """A value as it is typed in a setting."""
    return value if isinstance(value, str) else json.dumps(value)
