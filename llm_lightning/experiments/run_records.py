"""Read the JSON files of a run folder, which may be someone else's or damaged, and check their required keys.

Imports nothing heavy, so that refusals are immediate.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_lightning.terminal import one_line

COMMAND = "command.json"
"""File in a run folder: the command line that started the run, the folder it was typed in, and the planned steps."""
SUMMARY = "summary.json"
"""File in a run folder: the results of a run that ended by itself."""
PRUNED = "pruned.json"
"""File in a run folder: why a search stopped the run before its last step."""
Settings = dict[str, Any]
"""A checked configuration as nested dicts, every value resolved."""
Facts = Mapping[str, type | tuple[type, ...]]
"""The keys that a JSON object must have, and their types."""
COMMAND_FACTS: Facts = {"folder": str, "config_dir": (str, type(None)), "overrides": list}
SUMMARY_FACTS: Facts = {"finished": bool, "total_steps": int}
SUMMARY_REMEDY = "delete it: the run then goes on from its newest checkpoint"
SHOWN = 300
"""Maximum number of characters of a foreign text in a message."""


@dataclass(frozen=True)
class Start:
    """How one session of a run was started."""

    folder: str
    """Where the command line was typed; relative paths start there."""
    config_dir: str | None
    overrides: Sequence[str]
    resume: str | None = None
    """The run folder that `resume=` names."""
    notes: Sequence[str] = ()
    """Lines to log before training: typed settings without effect."""
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """`optimizer.rates`, the table behind `optimizer.lr=auto`; the run records the rate alone."""

    def record(self, places: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
        """The content of `command.json`; `places` locates the data and the first weights."""
        return {
            "folder": self.folder,
            "config_dir": self.config_dir,
            "overrides": list(self.overrides),
            "places": places,
            "total_steps": total_steps,
        }


def read_facts(path: Path, facts: Facts, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file.

    Raises:
        ValueError: naming the file and the remedy, if it is damaged or lacks one of `facts`.
    """
    try:
        content = json.loads(path.read_bytes().decode())
        if not isinstance(content, dict):
            raise ValueError(f"holds a JSON {type(content).__name__}, not an object")
        for key, kinds in facts.items():
            if key not in content:
                raise ValueError(f"has no '{key}'")
            if not isinstance(content[key], kinds) or (kinds is int and isinstance(content[key], bool)):
                raise ValueError(f"'{key}' holds a JSON {type(content[key]).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UnicodeDecodeError:
        raise _damaged(path, "not UTF-8", remedy) from None
    except RecursionError:
        raise _damaged(path, "nested too deeply", remedy) from None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"not JSON: {error.msg} at character {error.pos}", remedy) from None
    except ValueError as error:  # ours, or a number of too many digits
        raise _damaged(path, str(error), remedy) from None
    return content


def _damaged(path: Path, reason: str, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}); {remedy}")


def read_command(folder: Path, typed: str) -> dict[str, Any]:
    """`command.json` of a run folder, which the user typed as `typed`.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if `typed` is a file of a run, or `command.json` is damaged.
    """
    if folder.is_file():
        run = folder.parents[1] if folder.parent.name == "checkpoints" else folder.parent
        raise ValueError(f"resume={typed} is a file; give its run folder: resume={run}")
    if not (folder / COMMAND).is_file() or (folder / COMMAND).is_symlink():
        raise FileNotFoundError(f"resume={typed}: no run in that folder (it has no {COMMAND} of its own)")
    command = read_facts(folder / COMMAND, COMMAND_FACTS, "type the settings of the run again, with run_name")
    if not all(isinstance(word, str) for word in command["overrides"]):
        raise _damaged(folder / COMMAND, "'overrides' must hold strings", "type the settings again, with run_name")
    return command


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a run folder; empty if there is none. Raises ValueError if it is damaged."""
    return read_facts(folder / SUMMARY, SUMMARY_FACTS, SUMMARY_REMEDY)


def damaged_summary(folder: Path, reason: str) -> ValueError:
    """The error for a `summary.json` without a value that its reader needs."""
    return _damaged(folder / SUMMARY, reason, SUMMARY_REMEDY)


def refuse_links(folder: Path) -> None:
    """Refuse a run folder if writing to it could change something outside: it must hold only its own files and folders.

    A checkpoint may have several names, such as `last.ckpt`: checkpoints are replaced, never changed in place.

    Raises:
        ValueError: naming the first link, device or pipe.
    """
    bad = sorted(_not_its_own(folder))
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(
            f"{folder} is not continued: {one_line(bad[0], SHOWN)}{more}, and a run writes only to files of its own; "
            "remove that, or copy the folder with cp -rL and continue the copy"
        )


def _not_its_own(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):  # follows no link
        for name in (*folders, *files):
            path = Path(parent, name)
            shown = path.relative_to(folder)
            try:
                info = path.lstat()
            except FileNotFoundError:  # another process writes here: the lock is not taken yet
                continue
            if stat.S_ISLNK(info.st_mode):
                yield f"{shown} is a link to {path.readlink()}"
            elif not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
                yield f"{shown} is not a regular file"
            elif stat.S_ISREG(info.st_mode) and info.st_nlink > 1 and not _is_checkpoint(shown):
                yield f"{shown} has another name elsewhere (a hard link)"


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and path.suffix in (".ckpt", ".tmp")
