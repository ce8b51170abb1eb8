"""What a search is: its space, what its trials have in common, and the metric that they are judged by.

It is recorded in `study.json`: trials of another kind would not be comparable, so they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llm_lightning.callbacks.monitored import better_when
from llm_lightning.experiments.run_records import Facts, read_facts
from llm_lightning.experiments.settings.changes import MAY_CHANGE
from llm_lightning.experiments.settings.compose import ConfigDirs
from llm_lightning.experiments.sweep.identity import EXTENDS, content_of, files_of
from llm_lightning.experiments.sweep.runner import settings_of
from llm_lightning.experiments.sweep.search.space import Space, space_of
from llm_lightning.experiments.sweep.words import search_words
from llm_lightning.files.atomic import write_atomically
from llm_lightning.files.data_paths import without_paths

FACTS = "study.json"
_FACTS: Facts = {"space": dict, "monitor": str, "monitor_mode": str, "seeds": int, "settings": dict, "content": dict}


@dataclass(frozen=True)
class Plan:
    """A search, before its first trial."""

    space: Space
    settings: Mapping[str, Any]
    """Dotted key -> resolved value of what the trials have in common."""
    content: Mapping[str, str]
    """Digests of the files that the settings name."""
    monitor: str
    mode: str
    seeds: Sequence[int]
    """Of the jobs of each trial."""

    def words(self, params: Mapping[str, Any], seed: int) -> tuple[str, ...]:
        """The overrides of one job."""
        words = self.space.words(params)
        if len(self.seeds) > 1:
            words = [*(word for word in words if not word.startswith("seed=")), f"seed={seed}"]
        return tuple(words)

    def job_name(self, number: int, seed: int) -> str:
        return f"trial_{number}-seed_{seed}" if len(self.seeds) > 1 else f"trial_{number}"

    def facts(self) -> dict[str, Any]:
        return {
            "space": self.space.facts(),
            "monitor": self.monitor,
            "monitor_mode": self.mode,
            "seeds": len(self.seeds),
            "settings": dict(self.settings),
            "content": dict(self.content),
        }


def plan_of(options: Mapping[str, Any], typed: Sequence[str], dirs: ConfigDirs) -> Plan:
    """The search that a command line describes. Every listed value, and both ends of an interval, is checked here.

    Raises:
        ValueError: one line that names the setting.
    """
    space = space_of(search_words(options, typed, dirs), dirs)
    n_seeds = options["seeds"]
    if n_seeds > 1 and "seed" in space.dimensions:
        raise ValueError("seed is searched, and hydra.sweeper.seeds gives each trial several: leave one of them out")
    if n_seeds < 1:
        raise ValueError(f"hydra.sweeper.seeds={n_seeds} must be 1 or more")
    settings = _checked(space, dirs)
    if "logger.csv._target_" not in settings:
        raise ValueError("a search judges the validations in metrics.csv: add logger=csv or logger=default")
    monitor = settings["monitor"]
    if monitor is None:
        raise ValueError("monitor=null: a search needs the metric that it makes better")
    mode = settings["monitor_mode"] or better_when(monitor)
    if mode is None:
        raise ValueError(f"monitor={monitor}: its name does not say which way is better; add monitor_mode=min or max")
    first = settings["seed"]
    common = {key: value for key, value in settings.items() if key not in space.dimensions}
    return Plan(space, common, content_of(common, {}), monitor, mode, [first + index for index in range(n_seeds)])


def _checked(space: Space, dirs: ConfigDirs) -> dict[str, Any]:
    """The settings of the first values; each other end is composed once, with the first values of the other keys."""
    ends = {key: one.ends() for key, one in space.dimensions.items()}
    first = [*space.fixed, *(words[0] for words in ends.values())]
    settings = settings_of(first, dirs)
    for words in ends.values():
        for word in words[1:]:
            other = settings_of([word if one == words[0] else one for one in first], dirs)
            for key in ("monitor", "monitor_mode"):
                if other[key] != settings[key]:
                    raise ValueError(
                        f"{word} has {key}={other[key]}, {words[0]} has {settings[key]}: "
                        f"trials need the same; add {key}=VALUE"
                    )
    return settings


def keep_plan(folder: Path, plan: Plan) -> None:
    """Record the plan in the sweep's folder.

    Raises:
        ValueError: naming the key, if another one is recorded there, or the record is damaged.
    """
    path = folder / FACTS
    recorded = read_facts(path, _FACTS, "delete it, if the command is the one that began the search")
    for key, was, now in _differences(recorded, plan) if recorded else ():
        raise ValueError(
            f"{key}: {now} is not that of the search in {folder} ({was}); "
            "type what it was, or begin another search with run_name=NAME"
        )
    if not recorded:
        write_atomically(path, json.dumps(plan.facts(), indent=2, default=str) + "\n")


def _differences(recorded: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """(key, recorded value, value now); a setting that only one version of the package has is none."""
    facts = json.loads(json.dumps(plan.facts(), default=str))
    space, before = facts["space"], recorded["space"]
    for key in dict.fromkeys([*before, *space]):
        if before.get(key) != space.get(key):
            yield key, _shown(before.get(key)), _shown(space.get(key))
    for key in ("monitor", "monitor_mode"):
        if recorded[key] != facts[key]:
            yield key, recorded[key], facts[key]
    if recorded["seeds"] != facts["seeds"]:
        yield "hydra.sweeper.seeds", recorded["seeds"], facts["seeds"]
    files_before, files_now = files_of(recorded["settings"]), files_of(facts["settings"])
    for key in (recorded["settings"].keys() & facts["settings"].keys()) - files_now.keys() - files_before.keys():
        was, now = (without_paths(one["settings"][key]) for one in (recorded, facts))
        if was != now and (not _matches(key, MAY_CHANGE) or _matches(key, EXTENDS)):
            yield key, was, now
    for key in dict.fromkeys([*files_before, *files_now]):
        was, now = files_before.get(key), files_now.get(key)
        digests = recorded["content"].get(key), facts["content"].get(key)
        if (was != now) if None in digests else (digests[0] != digests[1]):
            yield key, was, f"{now}, as it is today,"


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _shown(distribution: str | None) -> str:
    if distribution is None:
        return "not searched"
    facts = json.loads(distribution)["attributes"]
    if "choices" in facts:
        return ",".join(map(str, facts["choices"]))
    step = f" in steps of {facts['step']}" if facts["step"] else ""
    return f"{facts['low']} to {facts['high']}{step}{', log' * facts['log']}"
