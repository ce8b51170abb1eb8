"""What the files of one run folder say: settings, progress, metrics, and whether it runs, has finished, or why not.

Nothing is changed, and no lock is taken: one taken for a look could refuse a run that starts at that moment. A damaged
file makes its run `unreadable`, and is no exception. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llm_lightning.experiments.failures import FAILURE, Failure
from llm_lightning.experiments.run_folder import (
    CONFIG,
    CONFIG_JSON,
    OWNER,
    SILENT_SECONDS,
    is_alive,
    read_owner,
    silent_seconds,
)
from llm_lightning.experiments.run_records import COMMAND, PRUNED, SUMMARY, read_facts, read_summary
from llm_lightning.experiments.summary import duration
from llm_lightning.files.metrics_csv import column, last_rows
from llm_lightning.terminal import one_line
from llm_lightning.weights.renamed import with_keys_of_today

STATUSES = {
    "running": "its process lives",
    "foreign": "a process on another host works there, or died",
    "finished": "nothing is left to do",
    "stopped": "it ended, saved, before its last step",
    "failed": "an exception or a signal ended it",
    "died": "its process is gone and left no reason",
    "unreadable": "one of its files is damaged",
}
FACTS = ("name", "folder", "task", "status", "reason", "steps", "total_steps", "seconds", "monitor", "best_value")
"""What is said of every run; None where it is unknown."""
METRICS = "metrics.csv"
MOST_NODES = 20_000
"""Of settings in YAML, where aliases can make a short text endless."""

Names = Mapping[str, bool]
"""The names in a folder, and whether each is a regular file."""
Read = TypeVar("Read")


@dataclass(frozen=True)
class Run:
    """What the files of one run say, as plain values."""

    facts: dict[str, Any]
    metrics: dict[str, float]
    """Of the summary; of a run that has not finished, the last ones."""
    settings: dict[str, Any]
    """Nested keys joined by dots; lists as JSON."""

    @property
    def values(self) -> dict[str, Any]:
        """All of them; a fact hides a setting of the same name."""
        return {**self.settings, **self.metrics, **self.facts}


class _Files(NamedTuple):
    """The records of a run; empty where there are none."""

    settings: dict[str, Any]
    summary: dict[str, Any]
    owner: dict[str, Any]
    failure: Failure | None
    total_steps: int | None
    """As planned when the last session began to train."""
    saved_steps: int
    """Of the newest checkpoint."""
    pruned: str | None
    """Why a search stopped it."""


@dataclass
class _Progress:
    steps: int
    metrics: dict[str, float]
    best_value: float | None


def read_run(path: Path, names: Names, name: str) -> Run:
    """Read the files of a run folder.

    Args:
        names: what is there.
        name: of the run, in the list.
    """
    problems: list[str] = []
    files = _read_files(path, names, problems)
    summary, settings = files.summary, files.settings
    monitor = summary.get("monitor") or settings.get("monitor")  # a run without checkpoints sums up none
    steps = max(_count(summary.get("steps")) or 0, files.saved_steps)
    progress = _Progress(steps, _metrics_of(summary), _number(summary.get("best_value")))
    if not _ended(files):
        _guarded(names, path, METRICS, partial(_read_on, progress, path, settings), None, problems)
    elif progress.best_value is None:
        _guarded(names, path, METRICS, partial(_read_best, progress, path, settings), None, problems)
    status, reason = ("unreadable", problems[0]) if problems else _status(path, files, progress.steps)
    facts = {
        "name": name,
        "folder": str(path),
        "task": _text(summary.get("task")) or task_of(settings),
        "status": status,
        "reason": reason,
        "steps": progress.steps,
        "total_steps": files.total_steps or _count(summary.get("total_steps")),
        "seconds": _seconds(path, files, status),
        "monitor": _text(monitor),
        "best_value": progress.best_value,
    }
    return Run(facts, progress.metrics, settings)


def _read_files(path: Path, names: Names, problems: list[str]) -> _Files:
    def read(name: str, action: Callable[[Path], Read], without: Read) -> Read:
        return _guarded(names, path, name, partial(action, path), without, problems)

    nothing: dict[str, Any] = {}
    settings = read(CONFIG_JSON, _from_json, nothing) if CONFIG_JSON in names else read(CONFIG, _from_yaml, nothing)
    command = read(COMMAND, lambda folder: read_facts(folder / COMMAND, {}, "delete it"), nothing)
    return _Files(
        settings=with_keys_of_today(_flat(settings)),
        summary=read(SUMMARY, read_summary, nothing),
        owner=read(OWNER, read_owner, nothing),
        failure=read(FAILURE, Failure.read, None),
        total_steps=_count(command.get("total_steps")),
        saved_steps=max(_saved_steps(path), default=0),
        pruned=_text(read(PRUNED, lambda folder: read_facts(folder / PRUNED, {}, "delete it"), nothing).get("reason")),
    )


def _guarded(names: Names, path: Path, name: str, read: Callable[[], Read], without: Read, problems: list[str]) -> Read:
    """What `read` returns; `without` if there is no such file, or if it is damaged, which is added to `problems`."""
    if name not in names:
        return without
    try:
        if not names[name]:  # a pipe would be waited for
            raise ValueError(f"{path / name} is not a regular file")
        return read()
    except FileNotFoundError:  # removed since
        return without
    except (ValueError, OSError, RecursionError) as error:
        problems.append(one_line(error))
        return without


def _from_json(path: Path) -> dict[str, Any]:
    return read_facts(path / CONFIG_JSON, {}, f"delete it: {CONFIG} has the same")


def _from_yaml(path: Path) -> dict[str, Any]:
    """The settings of a run that wrote no JSON yet."""
    import yaml

    try:
        content = (path / CONFIG).read_text("utf-8")
        settings = _from_blocks(content) or _loaded(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path / CONFIG} is damaged: it holds no settings")
    if "*" in content and sum(1 for _ in islice(_nodes(settings), MOST_NODES)) == MOST_NODES:
        raise ValueError(f"{path / CONFIG} is damaged: it has more than {MOST_NODES:,} values")
    return settings


def _from_blocks(content: str) -> dict[str, Any] | None:
    """The settings, each distinct block parsed once: those of many runs are equal. None if that cannot be done."""
    import yaml

    if "&" in content:  # an anchor, to which another block may refer
        return None
    try:
        blocks = [_loaded_once(block) for block in re.split(r"\n(?=[^\s#-])", content)]
    except yaml.YAMLError:
        return None
    if not all(isinstance(block, dict) and len(block) == 1 for block in blocks):
        return None
    return {key: value for block in blocks for key, value in block.items()}


def _loaded(content: str) -> Any:
    import yaml

    # The first is seven times faster, where it is built.
    return yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


_loaded_once = lru_cache(maxsize=4096)(_loaded)


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ():
        yield from _nodes(child)


def _flat(settings: Mapping[Any, Any], prefix: str = "", flat: dict[str, Any] | None = None) -> dict[str, Any]:
    """Nested settings in one dict, keys joined by dots; what is not plain becomes JSON."""
    flat = {} if flat is None else flat
    for key, value in settings.items():
        if isinstance(value, dict):
            _flat(value, f"{prefix}{key}.", flat)
        else:
            is_plain = value is None or isinstance(value, (str, int, float))
            flat[f"{prefix}{key}"] = value if is_plain else json.dumps(value, default=str, skipkeys=True)
    return flat


def task_of(settings: Mapping[str, Any]) -> str | None:
    """`sft` for `llm_lightning.tasks.sft.SFTModule`."""
    parts = str(settings.get("task._target_") or "").split(".")
    return parts[-2] if len(parts) > 1 else None


def _ended(files: _Files) -> bool:
    """Whether the summary is of the last session that trained: none has planned or saved further steps since."""
    summary = files.summary
    planned, total, steps = files.total_steps, _count(summary.get("total_steps")), _count(summary.get("steps"))
    went_on = planned is not None and total is not None and planned > total
    return bool(summary.get("finished")) and not went_on and (steps is None or files.saved_steps <= steps)


def _read_on(progress: _Progress, path: Path, settings: Mapping[str, Any]) -> None:
    """Replace the figures of an earlier session by the last ones that were logged."""
    rows = last_rows(path / METRICS)
    cells = {name: cell for row in rows for name, cell in row.items()}
    latest = {name: value for name, cell in cells.items() if (value := _parsed(cell)) is not None and "/" in name}
    trained = [int(row["step"]) + 1 for row in rows if any(name.startswith("train/") for name in row)]
    values = _read_best(progress, path, settings)
    progress.steps = max([progress.steps, *trained])
    progress.metrics = {**progress.metrics, **latest} | ({str(settings.get("monitor")): values[-1]} if values else {})


def _read_best(progress: _Progress, path: Path, settings: Mapping[str, Any]) -> list[float]:
    """Take the best value from the validations; return the monitored metric at each of them."""
    monitor, mode = settings.get("monitor"), settings.get("monitor_mode")
    values = [value for value in column(path / METRICS, str(monitor)) if math.isfinite(value)]
    if values and mode in ("min", "max"):
        progress.best_value = min(values) if mode == "min" else max(values)
    return values


def _saved_steps(path: Path) -> list[int]:
    try:
        with os.scandir(path / "checkpoints") as entries:
            names = [entry.name for entry in entries]
    except OSError:
        return []
    return [int(found[1]) for name in names if (found := re.fullmatch(r"step_([0-9]{1,18})\.ckpt", name))]


def _status(path: Path, files: _Files, steps: int) -> tuple[str, str | None]:
    """The status of a run, and the reason for it in one line."""
    owner, failure = files.owner, files.failure
    silent, is_foreign = (silent_seconds(path), owner["host"] != platform.node()) if owner else (0.0, False)
    is_unknown = bool(owner) and not is_foreign and owner["process_start"] is None  # Windows
    if is_alive(owner) or (is_unknown and silent < SILENT_SECONDS):
        return "running", None
    is_last = failure is not None and (_time(failure.ended) or 0.0) >= (_time(owner.get("started")) or 0.0)
    if failure is not None and is_last and (failure.began or not _ended(files)):
        return "failed", one_line(failure.message)
    if is_foreign:
        free = "; the same command continues it" if silent >= SILENT_SECONDS else ""
        return "foreign", f"process {owner['pid']} of {owner['host']} wrote {duration(silent)} ago{free}"
    if files.pruned and not _ended(files):
        return "stopped", one_line(files.pruned)
    if owner:
        return "died", f"process {owner['pid']} is gone; it wrote {duration(silent)} ago"
    if _ended(files):
        return "finished", None
    if files.summary.get("stopped_by") == "time":
        return "stopped", "its time was over"
    return "stopped", None if steps else "not begun"


def _seconds(path: Path, files: _Files, status: str) -> float | None:
    """Of the whole run, if it ended by itself; of the last session, if it still runs or has died."""
    started = _time(files.owner.get("started"))
    if started is None:
        seconds = _number(files.summary.get("seconds"))
        return seconds if seconds is not None and math.isfinite(seconds) else None
    now = time.time()
    return round(max(0.0, (now if status == "running" else now - silent_seconds(path)) - started), 1)


def _metrics_of(summary: Mapping[str, Any]) -> dict[str, float]:
    metrics = summary.get("metrics")
    pairs = metrics.items() if isinstance(metrics, dict) else ()
    return {str(name): number for name, value in pairs if (number := _number(value)) is not None}


def _parsed(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _time(iso: Any) -> float | None:
    try:
        return datetime.fromisoformat(iso).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
