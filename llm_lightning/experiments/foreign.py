"""What of a run folder is believed: every folder that a run continues in may be someone else's.

`command.json` says what was typed to start the run. Of that, only settings which can neither run code nor reach beyond
the folder are taken over. Data and first weights that lie elsewhere are, too, if they have the recorded digest, which
`whereabouts.py` sees to. All else is refused by name and counts once it is typed again beside `resume=`. The list is
one of what is allowed, not of what is known to be dangerous: Hydra can be told the same thing in many ways.

Imports nothing heavy: a refusal comes at once.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.settings.overrides import key_of, parsed, quoted, run_dir_is, unquoted
from llm_lightning.terminal import one_line

COMMAND = "command.json"
"""In a run folder: what was typed to start the run, and where."""
SUMMARY = "summary.json"
"""In a run folder: what a run reached that has ended by itself."""
Facts = Mapping[str, type | tuple[type, ...]]
"""The keys that a JSON object must have, and of which type."""
COMMAND_FACTS: Facts = {"folder": str, "config_dir": (str, type(None)), "overrides": list}
SUMMARY_FACTS: Facts = {"finished": bool, "total_steps": int}
SUMMARY_REMEDY = "delete it: the run then goes on from its newest checkpoint"

NOT_TAKEN_OVER = ("resume", "pipeline", "sweep", "allow_targets", "hydra")
"""First parts of settings that start other runs, or let code run."""
WITH_DIGEST = ("data.path", "init_from", "task.reference")
"""Settings that name files beyond the run folder, which are recognised by their digest."""
NO_FILE = {
    "init_from": re.compile(r"null|None|gpt2-(small|medium|large|xl)"),
    "task.reference": re.compile(r"auto|copy|adapter_off|adapter_clone|cached"),
}
"""Values of those that name no file."""
TARGETS = re.compile(
    r"llm_lightning(\.\w+)+|lightning\.Trainer|lightning\.pytorch\.(callbacks\.[A-Z]\w+"
    r"|strategies\.(SingleDevice|DDP|FSDP|ModelParallel)Strategy|loggers\.(CSV|TensorBoard)Logger"
    r"|profilers\.(Simple|Advanced|PyTorch)Profiler)",
    re.ASCII,
)
"""Classes that compute, or write where their arguments say, which are looked at; others may load files or talk to a
server."""
PLACE_NAMES = re.compile(r"(^|_)(dir|dirs|dirpath|path|paths|file|files|folder|root|uri|url|location|registry)$")
"""Arguments of classes of others that name a place, whatever their value looks like."""
WITH_A_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")
"""Options of Hydra whose value is the next word."""
LISTED, SHOWN = 5, 300
"""Settings that a refusal lists, and characters of each."""
REMEDY = "A run folder may be someone else's: type what you trust again beside resume=, or start a new run"


# --- files ---------------------------------------------------------------------------------------------------------


def read_facts(path: Path, facts: Facts, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file.

    Raises:
        ValueError: naming the file and the remedy, if it is damaged or lacks one of `facts`.
    """
    try:
        found = json.loads(path.read_bytes().decode())
        if not isinstance(found, dict):
            raise ValueError(f"holds a JSON {type(found).__name__}, not an object")
        for key, kinds in facts.items():
            if key not in found:
                raise ValueError(f"has no '{key}'")
            if not isinstance(found[key], kinds) or (kinds is int and isinstance(found[key], bool)):
                raise ValueError(f"'{key}' holds a JSON {type(found[key]).__name__}")
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
    return found


def _damaged(path: Path, reason: str, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}); {remedy}")


def read_command(folder: Path, typed: str) -> dict[str, Any]:
    """`command.json` of a run folder, which the user typed as `typed`.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if what was typed is a file of a run, or `command.json` is damaged.
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
    """The error for a `summary.json` that lacks what a reader of it needs."""
    return _damaged(folder / SUMMARY, reason, SUMMARY_REMEDY)


def refuse_links(folder: Path) -> None:
    """Refuse a run folder in which writing could change something outside: it holds files and folders of its own.

    Checkpoints may have several names, as `last.ckpt` is one of another's: they are replaced, never written into.

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
            except FileNotFoundError:  # of another process that writes here: the lock is still to come
                continue
            if stat.S_ISLNK(info.st_mode):
                yield f"{shown} is a link to {path.readlink()}"
            elif not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
                yield f"{shown} is no regular file"
            elif stat.S_ISREG(info.st_mode) and info.st_nlink > 1 and not _is_checkpoint(shown):
                yield f"{shown} has another name elsewhere (a hard link)"


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and path.suffix in (".ckpt", ".tmp")


# --- settings ------------------------------------------------------------------------------------------------------


def continued(typed: Sequence[str], config_dir: Path) -> list[str]:
    """The command line that continues the run of the last `resume=FOLDER` in `typed`; what else stands there wins.

    `resume=FOLDER` stays, so that `whereabouts.py` and the processes that Lightning starts know of it.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if it is in no state to be continued, or its `command.json` asks for what must be typed.
    """
    name = unquoted([word for word in typed if word.startswith("resume=")][-1].removeprefix("resume="))
    folder = Path(os.path.abspath(name))  # noqa: PTH100 (as Hydra reads hydra.run.dir: without `..`)
    several = [word for word in typed if word in ("-m", "--multirun") or key_of(word) == "sweep"]
    if several:
        raise ValueError(f"resume= continues one run; leave {several[0]} out")
    command = read_command(folder, name)
    refuse_links(folder)
    ours = ("resume", "hydra.run.dir")  # this folder, wherever it was
    mine = [word for word in typed if key_of(word) not in ours]
    keys = {key_of(word) for word in mine} | {"hydra.run.dir"}
    old = [word for word in command["overrides"] if key_of(word) not in keys]
    refused = [f"{word} ({reason})" for word in old if (reason := _reason(word, folder, command, config_dir))]
    if command["config_dir"] is not None and not any(word.startswith(("--config-dir", "-cd")) for word in mine):
        refused.insert(0, f"--config-dir={command['config_dir']} (files that can set anything)")
    if refused:
        more = f"; and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
        asked = "; ".join(one_line(word, SHOWN) for word in refused[:LISTED])
        raise ValueError(f"resume={name}: its {COMMAND} asks for {asked}{more}. {REMEDY}")
    options, settings = _split_options(mine)
    return [*options, *old, *settings, f"resume={quoted(folder)}", run_dir_is(folder)]


def recorded_value(command: Mapping[str, Any], key: str) -> Any:
    """The value that the words of a `command.json` give to a setting; None if they do not name it."""
    values = [parsed(word).value() for word in command["overrides"] if key_of(word) == key]
    return values[-1] if values else None


def _reason(word: str, folder: Path, command: Mapping[str, Any], config_dir: Path) -> str | None:
    """Why a recorded word must be typed again; None where it may be taken over."""
    try:
        override = parsed(word)
    except ValueError:
        return "not a setting"
    key, first = override.key_or_group, override.key_or_group.partition(".")[0]
    if first == "hydra" or key.startswith("hydra/"):
        return "a setting of Hydra's own"
    if first in NOT_TAKEN_OVER:
        return "starts other runs" if first != "allow_targets" else "lets code run"
    if override.package is not None or "/" in key or override.is_sweep_override():
        return "not a plain setting"
    if first not in _top_level(config_dir):
        return "unknown"
    leaves = _leaves(key, None if override.is_delete() else override.value())
    reasons = (_reason_of_value(name, value, folder, command, config_dir) for name, value in leaves)
    return next((reason for reason in reasons if reason), None)


def _reason_of_value(key: str, value: Any, folder: Path, command: Mapping[str, Any], config_dir: Path) -> str | None:
    name = re.sub(r"\[\d+\]", "", key)
    last = name.rpartition(".")[2]
    text = str(value)
    is_setting = name in _settings(config_dir)
    if value is None:
        return None
    if last == "_target_":
        return None if TARGETS.fullmatch(text) else "a class that is not ours"
    if last == "_args_":
        return "arguments without a name"
    if "${" in text and not (is_setting and re.fullmatch(r"\$\{(?!hydra\b)[A-Za-z_][\w.]*\}", text)):
        return "a value from elsewhere"
    if name in WITH_DIGEST:
        return None if _has_digest(name, text, folder, command) else "a path whose content was not recorded"
    if name == "data.hf_dataset":
        return "a path" if _looks_like_a_path(text) or Path(text).exists() else None
    if is_setting or not isinstance(value, str):
        return None
    is_place = PLACE_NAMES.search(last) is not None or _looks_like_a_path(text)
    return "a path outside the run folder" if is_place and not _is_inside(text, folder) else None


def _has_digest(key: str, text: str, folder: Path, command: Mapping[str, Any]) -> bool:
    """Whether there is something to compare a file of this setting with. That is done when it is read."""
    if key in NO_FILE and NO_FILE[key].fullmatch(text):
        return True
    places = command.get("places")
    place = places.get(key) if isinstance(places, dict) else None
    if isinstance(place, dict) and isinstance(place.get("digest"), str):
        return True
    # Earlier versions kept the digest in checkpoints only, which hold all of the first weights that is needed.
    return key != "task.reference" and any((folder / "checkpoints").glob("step_*.ckpt"))


def _looks_like_a_path(text: str) -> bool:
    words = re.split(r"[/\\]", text)
    is_one = len(words) > 1 and (words[0] in ("", "~") or bool(re.match(r"[A-Za-z]:", text)) or "://" in text)
    return is_one or ".." in words or text.startswith("~")


def _is_inside(text: str, folder: Path) -> bool:
    return "://" not in text and Path(os.path.normpath(Path(text).expanduser().absolute())).is_relative_to(folder)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below a value, keys that are no identifiers included."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(f"{key}[{index}]", inner)
    else:
        yield key, value


def _settings(config_dir: Path) -> frozenset[str]:
    """The dotted keys of our own files. None but `WITH_DIGEST` and data.hf_dataset names a file."""
    from llm_lightning.experiments.settings.help import declared_settings

    return declared_settings(config_dir)


def _top_level(config_dir: Path) -> set[str]:
    groups = {path.name for path in config_dir.iterdir() if path.is_dir()}
    return groups | {key.partition(".")[0] for key in _settings(config_dir)}


def _split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of the command line, each with its value, and settings: argparse wants the settings in one piece."""
    options: list[str] = []
    settings: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            settings.append(word)
            continue
        options.append(word)
        if word in WITH_A_VALUE:
            options += [value for value in [next(rest, None)] if value is not None]
    return options, settings
