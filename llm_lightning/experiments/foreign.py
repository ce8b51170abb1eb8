"""`resume=FOLDER`: which recorded settings of a run folder are trusted, since it may be someone else's.

`command.json` holds the command line that started the run. Only settings that can neither run code nor reach outside
the folder are reused, besides data and first weights elsewhere that have the recorded digest, which `whereabouts.py`
compares. Every other setting is refused by name until it is typed again with `resume=`. The list names what is
allowed, not what is known to be dangerous: Hydra has many ways to write the same.

Imports nothing heavy, so that refusals are immediate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.run_records import COMMAND, SHOWN, read_command, refuse_links
from llm_lightning.experiments.settings.overrides import (
    key_of,
    parsed,
    quoted,
    run_dir_override,
    split_options,
    unquoted,
)
from llm_lightning.experiments.settings.yaml_files import declared_settings
from llm_lightning.files.data_paths import data_path_of
from llm_lightning.terminal import one_line
from llm_lightning.weights.releases import RELEASES
from llm_lightning.weights.renamed import MOVED, RENAMED, REPLACED

NOT_TAKEN_OVER = ("resume", "pipeline", "sweep", "allow_targets", "hydra")
"""Top-level keys of settings that start other runs or let code run."""
TARGETS = re.compile(
    r"llm_lightning(\.\w+)+|torch\.optim\.[A-Z]\w+|lightning\.Trainer|lightning\.pytorch\.(callbacks\.[A-Z]\w+"
    r"|strategies\.(SingleDevice|DDP|FSDP|ModelParallel)Strategy|loggers\.(CSV|TensorBoard)Logger"
    r"|profilers\.(Simple|Advanced|PyTorch)Profiler)",
    re.ASCII,
)
"""Classes that compute, or write only where their checked arguments say; others may load files or call a server."""
PLACE_NAMES = re.compile(r"(^|_)(dir|dirs|dirpath|path|paths|file|files|folder|root|uri|url|location|registry)$")
"""Names of foreign classes' arguments that are places, whatever their value."""
LISTED = 5
"""Maximum number of settings that a refusal lists."""
REMEDY = "A run folder may be someone else's: type what you trust again with resume=, or start a new run"


def continued(typed: Sequence[str], config_dir: Path) -> list[str]:
    """The command line that continues the run of the last `resume=FOLDER` in `typed`; other typed words win.

    `resume=FOLDER` stays, for `whereabouts.py` and for the processes that Lightning starts.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the run cannot be continued, or its `command.json` has settings that must be typed again.
    """
    name = unquoted([word for word in typed if word.startswith("resume=")][-1].removeprefix("resume="))
    folder = Path(os.path.abspath(name))  # noqa: PTH100 (as Hydra reads hydra.run.dir: without `..`)
    several = [word for word in typed if word in ("-m", "--multirun") or key_of(word) == "sweep"]
    if several:
        raise ValueError(f"resume= continues one run; leave {several[0]} out")
    command = read_command(folder, name)
    refuse_links(folder)
    ours = ("resume", "hydra.run.dir")  # the folder may have moved
    mine = [word for word in typed if key_of(word) not in ours]
    keys = {key_of(word) for word in mine} | {"hydra.run.dir"}
    recorded = [_translated(word) for word in command["overrides"]]
    old = [word for word in recorded if key_of(word) not in keys]
    refused = [f"{word} ({reason})" for word in old if (reason := _reason(word, folder, command, config_dir))]
    if command["config_dir"] is not None and not any(word.startswith(("--config-dir", "-cd")) for word in mine):
        refused.insert(0, f"--config-dir={command['config_dir']} (files that can set anything)")
    if refused:
        more = f"; and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
        listed = "; ".join(one_line(word, SHOWN) for word in refused[:LISTED])
        raise ValueError(f"resume={name}: its {COMMAND} asks for {listed}{more}. {REMEDY}")
    options, settings = split_options(mine)
    return [*options, *old, *settings, f"resume={quoted(folder)}", run_dir_override(folder)]


def _translated(word: str) -> str:
    """A recorded override with its current key, or the current name of its class."""
    key, value = key_of(word), word.partition("=")[2]
    if key.endswith("._target_") and value in MOVED:
        return f"{word.partition('=')[0]}={MOVED[value]}"
    today = RENAMED.get(key) or REPLACED.get(key)
    return word.replace(key, today, 1) if today else word


def recorded_value(command: Mapping[str, Any], key: str) -> Any:
    """The value of a setting in the overrides of a `command.json`; None if it is not among them."""
    values = [parsed(word).value() for word in command["overrides"] if key_of(word) == key]
    return values[-1] if values else None


def _reason(word: str, folder: Path, command: Mapping[str, Any], config_dir: Path) -> str | None:
    """Why a recorded word must be typed again; None if it is trusted."""
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
    name = re.sub(r"\[\d+\]|(?<=\.mixture)\.\d+", "", key)
    last = name.rpartition(".")[2]
    text = str(value)
    is_setting = name in declared_settings(config_dir)
    if value is None:
        return None
    if last == "_target_":
        return None if TARGETS.fullmatch(text) else "a class that is not ours"
    if last == "_args_":
        return "arguments without a name"
    if "${" in text and not (is_setting and re.fullmatch(r"\$\{(?!hydra\b)[A-Za-z_][\w.]*\}", text)):
        return "a value from elsewhere"
    with_digest = "init_from" if name == "init_from" else data_path_of(key)  # files elsewhere, known by their content
    if with_digest:
        return None if _has_digest(with_digest, text, folder, command) else "a path whose content was not recorded"
    if name in ("data.hf_dataset", "data.mixture.hf_dataset", "task.reference"):
        return "a path" if _looks_like_a_path(text) or Path(text).exists() else None
    if is_setting or not isinstance(value, str):
        return None
    is_place = PLACE_NAMES.search(last) is not None or _looks_like_a_path(text)
    return "a path outside the run folder" if is_place and not _is_inside(text, folder) else None


def _has_digest(key: str, text: str, folder: Path, command: Mapping[str, Any]) -> bool:
    """Whether a digest was recorded for this setting's file; it is compared when the file is read."""
    if key == "init_from" and text in RELEASES:
        return True
    places = command.get("places")
    place = places.get(key) if isinstance(places, dict) else None
    if isinstance(place, dict) and isinstance(place.get("digest"), str):
        return True
    # Earlier versions recorded the digest only in checkpoints; a run with one no longer reads the first weights.
    return any((folder / "checkpoints").glob("step_*.ckpt"))


def _looks_like_a_path(text: str) -> bool:
    words = re.split(r"[/\\]", text)
    is_one = len(words) > 1 and (words[0] in ("", "~") or bool(re.match(r"[A-Za-z]:", text)) or "://" in text)
    return is_one or ".." in words or text.startswith("~")


def _is_inside(text: str, folder: Path) -> bool:
    return "://" not in text and Path(os.path.normpath(Path(text).expanduser().absolute())).is_relative_to(folder)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf below a value, including keys that are not identifiers."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(f"{key}[{index}]", inner)
    else:
        yield key, value


def _top_level(config_dir: Path) -> set[str]:
    groups = {path.name for path in config_dir.iterdir() if path.is_dir()}
    return groups | {key.partition(".")[0] for key in declared_settings(config_dir)}
