"""What a report knows of each run: all that its files say, and what the sweep planned.

    folders -> runs (run_list.py), jobs that have not begun -> entries, with their curves

A damaged file costs its content and leaves a note, and is no exception.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from llm_lightning.callbacks.monitored import better_when
from llm_lightning.experiments.run_list import natural, read_runs
from llm_lightning.experiments.run_records import COMMAND, read_facts, read_summary
from llm_lightning.experiments.run_status import FACTS, METRICS, Run, task_of
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.experiments.sweep.folder import JOB, SWEEP
from llm_lightning.experiments.sweep.identity import EXTENDS
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.terminal import one_line

WAITING = "waiting"
"""The status of a job that has not begun."""
MOST_POINTS = 200
"""Of a curve, after thinning."""
OPEN = (None, "auto")
"""Values of settings that a run fills in."""
PEAK_MEMORY = "train/peak_memory_gib"
Curves = Mapping[str, Sequence[tuple[int, float]]]
"""metric -> (step, value)"""


@dataclass(frozen=True)
class Entry:
    """One run, or a job that has not begun."""

    run: Run
    source: str
    """The folder of the report in which it was found, as it was typed."""
    job: Mapping[str, Any]
    """`job.json`; empty for a run outside a sweep. So are the next two, where there are no such files."""
    summary: Mapping[str, Any]
    command: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    """Files that could not be read."""

    @property
    def name(self) -> str:
        return str(self.run.facts["name"])

    @property
    def folder(self) -> Path:
        return Path(self.run.facts["folder"])

    @property
    def status(self) -> str:
        return str(self.run.facts["status"])

    @property
    def task(self) -> str | None:
        value: str | None = self.run.facts["task"]
        return value

    @property
    def monitor(self) -> str | None:
        value = self.run.facts["monitor"] or self.settings.get("monitor")
        return value if isinstance(value, str) else None

    @property
    def mode(self) -> str | None:
        """`min` or `max`: which value of the monitored metric is better."""
        typed = self.run.settings.get("monitor_mode") or self.settings.get("monitor_mode")
        return typed or better_when(self.monitor or "")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings as the sweep planned them, else those of the run, where open ones are filled in."""
        return self._planned | self.limits

    @cached_property
    def limits(self) -> dict[str, Any]:
        """What the sweep plans otherwise than the run has it: a finished job that is to go on has its old limits."""
        own, planned = self.run.settings, self._planned
        both = (key for key in own if _is_limit(key) and planned.get(key) not in OPEN)
        return {key: own[key] for key in both if own[key] != planned[key]}

    @cached_property
    def _planned(self) -> dict[str, Any]:
        planned = self.job.get("settings")
        if not isinstance(planned, dict):
            return self.run.settings
        return {key: _plain(value) for key, value in planned.items()}

    @cached_property
    def nodes(self) -> set[str]:
        """The dotted keys above those of the settings: `data`, `callbacks.samples`."""
        parts = (key.split(".") for key in self.settings)
        return {".".join(one[:length]) for one in parts for length in range(1, len(one))}

    @property
    def words(self) -> list[str]:
        """The overrides: of its job, unless it is yet to go on, else as they were typed."""
        planned, typed = _texts(self.job, "words"), _texts(self.command, "overrides")
        return typed or planned if self.limits else planned or typed

    @property
    def added(self) -> list[str]:
        """Keys that the files of settings do not have: `+optimizer.alpha=0.95`."""
        return [key_of(word) for word in self.words if word.startswith("+")]

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    @property
    def swept(self) -> list[str]:
        return _texts(self.job, "swept")

    @property
    def content(self) -> Mapping[str, str]:
        """Setting that names a file -> digest of its content."""
        content = self.job.get("content")
        return content if isinstance(content, dict) else {}

    def value(self, metric: str) -> float | None:
        """A metric of a run that has finished, at its best for the monitored one; None where there is none."""
        if self.status != "finished":
            return None
        best = self.run.facts["best_value"] if metric == self.monitor else None
        value = best if best is not None else self.run.metrics.get(metric)
        return float(value) if value is not None and math.isfinite(value) else None

    @property
    def items(self) -> tuple[str, int | None, float | None]:
        """The name of what was trained on (`token`), how many, and how many a second."""
        item = str(self.summary.get("item") or "token")
        n, rate = (self.summary.get(name) for name in (f"{item}s", f"{item}s_per_second"))
        return item, n if is_number(n) else None, rate if is_number(rate) else None

    @cached_property
    def curves(self) -> Curves:
        """The curves of `metrics.csv`, thinned; none if it is damaged."""
        path = self.folder / METRICS
        try:
            _refuse_special(path)
            info = path.stat()
            return _curves(path, info.st_mtime_ns, info.st_size)
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, OSError) as error:
            self.problems.append(f"no curves: {one_line(error) if str(error) else type(error).__name__}")
            return {}

    @cached_property
    def peak_memory(self) -> float | None:
        """In GiB."""
        return next((value for _, value in self.curves.get(PEAK_MEMORY, ())), None)


def read_entries(folder: Path, source: str) -> list[Entry]:
    """Every run and every waiting job below a folder, sorted by name.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.
    """
    found = [_entry(run, source) for run in read_runs(folder)]
    _open_again(found)
    found += [_waiting(path, folder, source) for path in _without_run(folder, {entry.folder for entry in found})]
    return sorted(found, key=lambda entry: natural(entry.name))


def _open_again(entries: Sequence[Entry]) -> None:
    """Give runs outside a sweep the settings that its jobs left open, where those filled in the same: `auto`, null."""
    jobs = [entry for entry in entries if entry.job]
    pairs = ((entry.run.settings, key, value) for entry in jobs for key, value in entry.settings.items())
    left = {(key, own[key]): value for own, key, value in pairs if value in OPEN and own.get(key) not in OPEN}
    for entry in entries if left else ():
        if not entry.job:
            entry.settings.update({key: left[key, one] for key, one in entry.settings.items() if (key, one) in left})


def read_sweep(folder: Path) -> dict[str, Any]:
    """`sweep.json`; empty if the folder is no sweep's, or the file is damaged."""
    return _read(folder / SWEEP, [])


def _entry(run: Run, source: str) -> Entry:
    folder, problems = Path(run.facts["folder"]), list[str]()
    summary = {} if run.facts["status"] == "unreadable" else _read(folder, problems, read_summary)
    return Entry(run, source, _read(folder / JOB, problems), summary, _read(folder / COMMAND, problems), problems)


def _waiting(folder: Path, root: Path, source: str) -> Entry:
    problems: list[str] = []
    job = _read(folder / JOB, problems)
    planned = job.get("settings")
    settings: dict[str, Any] = planned if isinstance(planned, dict) else {}
    facts: dict[str, Any] = dict.fromkeys(FACTS) | {
        "name": folder.relative_to(root).as_posix(),
        "folder": str(folder),
        "status": WAITING,
        "steps": 0,
    }
    facts |= {"task": task_of(settings), "monitor": settings.get("monitor"), "reason": None}
    return Entry(Run(facts, {}, {}), source, job, {}, {}, problems)


def _without_run(folder: Path, known: set[Path]) -> Iterator[Path]:
    """Folders of jobs in which no run has begun."""
    return (path.parent for path in folder.glob(f"**/{JOB}") if path.parent not in known)


def _refuse_special(path: Path) -> None:
    """Refuse a pipe, which would be waited for, and a link, which may lead anywhere."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is not a regular file")


def _read_json(path: Path) -> dict[str, Any]:
    _refuse_special(path)
    return read_facts(path, {}, "delete it")


def _read(path: Path, problems: list[str], read: Callable[[Path], dict[str, Any]] = _read_json) -> dict[str, Any]:
    """What a file holds; nothing if it is damaged, which is added to `problems`."""
    try:
        return read(path)
    except (ValueError, OSError) as error:
        problems.append(one_line(error))
        return {}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@cache
def _is_limit(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in EXTENDS)


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    value = record.get(key)
    return list(map(str, value)) if isinstance(value, list) else []


def _plain(value: Any) -> Any:
    """Lists as JSON, as `run_status` has them."""
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, default=str)


@lru_cache(maxsize=4096)
def _curves(path: Path, changed: int, size: int) -> Curves:
    """Read once, and again only when the file has changed: a sweep's report is written many times."""
    curves = read_metrics(path)
    peak = curves.pop(PEAK_MEMORY, [])
    thin: dict[str, Sequence[tuple[int, float]]] = {name: thinned(points) for name, points in curves.items()}
    return thin | ({PEAK_MEMORY: [max(peak, key=lambda point: point[1])]} if peak else {})


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most that many points: the mean of each stretch of equally many, so that no noise is picked out."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]
