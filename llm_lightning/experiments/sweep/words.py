"""The jobs of a sweep as words of the command line: one list of KEY=VALUE for each job, and its name.

Nothing is composed here, so a sweep with too many jobs is refused at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hydra.core.override_parser.types import Glob, IntervalSweep

from llm_lightning.experiments.settings.checks import values_of
from llm_lightning.experiments.settings.compose import ConfigDirs
from llm_lightning.experiments.settings.groups import without_null_groups
from llm_lightning.experiments.settings.meaning import word_as_meant
from llm_lightning.experiments.settings.overrides import key_of, parsed, unquoted
from llm_lightning.experiments.settings.spelling import split_values
from llm_lightning.nearest import nearest

CANNOT_VARY = ("run_name", "resume", "pipeline", "sweep", "allow_targets", "hydra")
"""Top-level keys of settings that are those of the whole sweep."""
LONGEST_NAME = 80
"""Maximum number of characters of a job's name."""
LONGEST_VALUE = 24
"""Maximum number of characters of one value in it: of a path, the end is kept."""


@dataclass(frozen=True)
class Listed:
    """A job before it is composed."""

    name: str
    words: tuple[str, ...]
    """Its overrides, each with one value."""
    swept: tuple[str, ...]
    """The keys that have several values in the sweep."""


def list_jobs(options: Mapping[str, Any], typed: Sequence[str], dirs: ConfigDirs) -> list[Listed]:
    """The jobs of a sweep: each listed job with each combination of values; the last key varies fastest.

    Args:
        options: `hydra.sweeper`: params, jobs, only, max_jobs.
        typed: the overrides of the command line; they beat `jobs`, which beat `params`.

    Raises:
        ValueError: one line, if a key cannot vary, a value is missing, or there are too many jobs.
    """
    own = [word for word in typed if key_of(word) != "sweep"]
    for word in set(typed).difference(own):
        _count(word, dirs)  # refuses several sweeps: they would all be left out
    shared = _words_of(options.get("params"), "hydra.sweeper.params", dirs)
    listed = _chosen(options.get("jobs"), options.get("only"))
    groups = [(name, _later_wins([*shared, *_words_of(node, name, dirs), *own])) for name, node in listed.items()]
    _refuse_missing(word for _, words in groups for word in words)
    distinct = dict.fromkeys(word for _, words in groups for word in words)
    counts = {word: _count(word, dirs) for word in distinct}
    n_jobs = sum(math.prod(counts[word] for word in words) for _, words in groups)
    if n_jobs > options["max_jobs"]:
        raise ValueError(
            f"this sweep has {n_jobs:,} jobs, more than hydra.sweeper.max_jobs={options['max_jobs']}: "
            f"leave values out, or add hydra.sweeper.max_jobs={n_jobs}"
        )
    values = {word: _values(word, dirs) for word in distinct}
    return [job for name, words in groups for job in _combinations(name, words, values)]


def search_words(options: Mapping[str, Any], typed: Sequence[str], dirs: ConfigDirs) -> list[str]:
    """The words of a search, one for each key: `params`, then what is typed, which beats them.

    Raises:
        ValueError: one line, if a value is missing, or an option is for sweeps without a search.
    """
    for key in ("jobs", "only", "retry_failed"):
        if options.get(key):
            raise ValueError(f"hydra.sweeper.{key} has no effect in a search, which chooses each trial; leave it out")
    own = [word for word in typed if key_of(word) != "sweep"]
    words = _later_wins([*_words_of(options.get("params"), "hydra.sweeper.params", dirs), *own])
    _refuse_missing(words)
    for word in words:
        refuse_fixed(word)
    return words


def refuse_fixed(word: str) -> None:
    """Refuse several values of a key that is the whole sweep's."""
    override = parsed(word)
    key = override.key_or_group
    if override.is_sweep_override() and key.partition(".")[0].partition("/")[0] in CANNOT_VARY:
        raise ValueError(f"'{word}': {key} cannot vary in a sweep; give it one value")


def sweep_name(jobs: Sequence[Listed], option: str | None, typed: Sequence[str]) -> str:
    """A name for a sweep without `run_name`: the same for the same jobs, in whatever order they are typed.

    Args:
        option: NAME of `sweep=NAME`; it is the name if nothing else is typed.
        typed: the overrides of the command line.
    """
    if option and all(key_of(word) == "sweep" for word in typed):
        return _fitting(_safe(option.replace("/", "_")))
    keys = sorted({key for job in jobs for key in job.swept})
    label = option or "-".join(_short(key, keys) for key in keys) or "one"
    text = "\n".join(sorted("\0".join(sorted(job.words)) for job in jobs))
    return f"{_fitting(_safe(label.replace('/', '_')))}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _words_of(node: Any, where: str, dirs: ConfigDirs) -> list[str]:
    if node is not None and not isinstance(node, Mapping):
        raise ValueError(f"{where} must be a list of KEY: VALUE lines, not {node!r}")
    words = []
    for key, value in (node or {}).items():
        text = value if isinstance(value, str) else _as_typed(value)  # a string may hold several values
        words.append(word_as_meant(f"{key}={text}", dirs.folders, is_multirun=True))
    return without_null_groups(words, dirs.folders[-1])


def _as_typed(value: Any) -> str:
    """A value of a YAML file in Hydra's grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_as_typed(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_typed, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _chosen(jobs: Any, only: Any) -> dict[str, Any]:
    """The listed jobs to run; one without a name if none are listed."""
    if not jobs:
        return {"": None}
    if not isinstance(jobs, Mapping):
        raise ValueError("hydra.sweeper.jobs must be NAME: {KEY: VALUE, ...} for each job")
    patterns = [only] if isinstance(only, str) else list(only or ["*"])
    for pattern in patterns:
        if not any(fnmatchcase(name, str(pattern)) for name in jobs):
            near = nearest(str(pattern), list(jobs))
            hint = f"did you mean '{near}'?" if near else f"there are {', '.join(jobs)}"
            raise ValueError(f"hydra.sweeper.only={pattern}: no such job; {hint}")
    return {name: node for name, node in jobs.items() if any(fnmatchcase(name, str(one)) for one in patterns)}


def _refuse_missing(words: Iterable[str]) -> None:
    """Refuse `KEY: ???` of a file that the command line does not set."""
    for word in words:
        key, _, value = word.partition("=")
        if value == "???":
            raise ValueError(f"{key} has no default in this sweep: add {key}=VALUE")


def _later_wins(words: Sequence[str]) -> list[str]:
    """The words without those whose key is given again."""
    last = {key_of(word): index for index, word in enumerate(words)}
    return [word for index, word in enumerate(words) if last[key_of(word)] == index]


def _count(word: str, dirs: ConfigDirs) -> int:
    """The number of values of an override."""
    override = parsed(word)
    key = override.key_or_group
    if not override.is_sweep_override():
        return 1
    refuse_fixed(word)
    value = override.value()
    if isinstance(value, IntervalSweep):
        raise ValueError(
            f"'{word}' lists no values: an interval has no end of them; write them out, as {key}=A,B,C, "
            "or search it: hydra/sweeper=optuna"
        )
    if isinstance(value, Glob):
        return len(values_of(override, dirs))
    return sum(1 for _ in override.sweep_string_iterator())


def _values(word: str, dirs: ConfigDirs) -> list[tuple[str, str]]:
    """(override with one value, the value for the name) of each value of an override.

    A name has the value as it was typed, if values were listed: Hydra makes 0.0001 of 1e-4.
    """
    lines = [str(one.input_line) for one in values_of(parsed(word), dirs)]
    listed = split_values(word.partition("=")[2])
    names = listed if len(listed) == len(lines) else [line.partition("=")[2] for line in lines]
    return list(zip(lines, names, strict=True))


def _combinations(name: str, words: Sequence[str], values: Mapping[str, list[tuple[str, str]]]) -> Iterator[Listed]:
    swept = [key_of(word) for word in words if parsed(word).is_sweep_override()]
    for chosen in itertools.product(*(values[word] for word in words)):
        parts = [
            f"{_short(key_of(one), swept)}_{_value(key_of(one), value)}"
            for one, value in chosen
            if key_of(one) in swept
        ]
        full = "-".join([*filter(None, [_safe(name)]), *parts]) or "job"
        yield Listed(_fitting(full), tuple(one for one, _ in chosen), tuple(swept))


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key, with as many before it as tell it from the others."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = parts[-length:]
        if sum(other.split(".")[-length:] == end for other in keys) == 1:
            return _safe("_".join(end))
    return _safe("_".join(parts))


def _value(key: str, text: str) -> str:
    if key == "data.mixture" and (shares := _shares(text)):
        return _safe(shares)
    return _safe(unquoted(text.strip()))[-LONGEST_VALUE:].lstrip("_.") or "empty"


def _shares(text: str) -> str:
    """`web_0.7_books_0.3` of a mixture; "" if it is none."""
    sources = parsed(f"mixture={text}").value()
    is_mixture = isinstance(sources, list) and all(isinstance(one, Mapping) for one in sources)
    return "_".join(f"{one.get('name')}_{one.get('weight', 1)}" for one in sources) if is_mixture else ""


def _safe(text: str) -> str:
    """Only characters that a path and Hydra's grammar take without quotes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")


def _fitting(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
