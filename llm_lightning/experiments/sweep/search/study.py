"""The study of a search in Optuna's journal file, which `optuna-dashboard` and `optuna.load_study` open.

A trial is recorded by one line when it is asked, with all of its parameters, and by one when it is told. Whatever is
killed in between, the same command goes on with the same trial. Suggestions depend on the seed of the study, on the
number of the trial, and on the trials of earlier batches alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from llm_lightning.experiments.sweep.search.space import Space

JOURNAL = "study.journal"
SAMPLERS = ("tpe", "random", "grid")
KEPT = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""States that are told, and count as trials."""


@dataclass
class Study:
    """The trials of a search, on disk."""

    study: optuna.Study
    space: Space
    sampler: str
    seed: int

    @classmethod
    def open(cls, folder: Path, mode: str, space: Space, *, sampler: str = "tpe", seed: int = 1) -> Study:
        """Open the study of a sweep's folder, which this process owns, or begin one.

        Args:
            mode: `min` or `max`.

        Raises:
            ValueError: naming the file, if it is damaged, or holds another kind of study.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / JOURNAL
        mend(path)
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
        direction = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}[mode]
        found = optuna.get_all_study_names(storage)
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} studies, not the one of this folder; move it away")
        own = RandomSampler(seed=seed)  # never asked: `ask` samples in memory
        if found:
            study = optuna.load_study(study_name=found[0], storage=storage, sampler=own)
            if study.direction is not direction:
                raise ValueError(
                    f"monitor_mode={mode}: the study in {path} has the other direction; type another run_name"
                )
        else:
            study = optuna.create_study(study_name=folder.name, storage=storage, sampler=own, direction=direction)
        return cls(study, space, sampler, seed)

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def told(self) -> list[FrozenTrial]:
        """The trials that have ended, by number."""
        return [trial for trial in self.trials() if trial.state in KEPT]

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value; the first of equal ones."""
        complete = [trial for trial in self.told() if trial.state is TrialState.COMPLETE and trial.value is not None]
        sign = 1 if self.study.direction is StudyDirection.MINIMIZE else -1
        return min(complete, key=lambda trial: sign * float(trial.value or 0), default=None)

    # --- ask ---------------------------------------------------------------------------------------------------------

    def past(self, before: int) -> optuna.Study:
        """The trials with lower numbers, in memory: what the sampler and the pruner know."""
        past = optuna.create_study(direction=self.study.direction, sampler=RandomSampler(seed=self.seed))
        past.add_trials(trial for trial in self.trials() if trial.number < before)
        return past

    def ask(self, past: optuna.Study, number: int) -> FrozenTrial:
        """The trial with this number: the recorded one, else a new one, with all parameters in one line.

        Args:
            past: gets the trial as a running one, so that others of its batch differ.
        """
        trials = self.trials()
        if number < len(trials):
            recorded = trials[number]
            past.add_trial(_running(recorded.params, recorded.distributions))
            return recorded
        assert number == len(trials) == len(past.get_trials(deepcopy=False)), "trials are asked in their order"
        past.sampler = self._sampler(number)
        asked = past.ask(self.space.distributions)
        self.study.add_trial(_running(asked.params, asked.distributions))
        return self.trials()[number]

    def _sampler(self, number: int) -> BaseSampler:
        own = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sampler == "grid":
            return GridSampler(self.grid(), seed=self.seed)  # the grid is shuffled once, and taken by number
        return TPESampler(seed=own) if self.sampler == "tpe" else RandomSampler(seed=own)

    def grid(self) -> dict[str, list[Any]]:
        """The listed values of each key. Raises ValueError if one has an interval."""
        return {key: one.values() for key, one in self.space.dimensions.items()}

    # --- tell --------------------------------------------------------------------------------------------------------

    def report(self, number: int, values: Mapping[int, float]) -> None:
        """Record the values at validations, for `optuna-dashboard` and later trials."""
        recorded = self.trials()[number]
        trial = Trial(self.study, recorded._trial_id)
        for validation, value in values.items():
            if validation not in recorded.intermediate_values:
                trial.report(value, validation)

    def tell(self, number: int, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        """Record the end of a trial; `attributes` are kept beside it."""
        trial = Trial(self.study, self.trials()[number]._trial_id)
        for name, content in attributes.items():
            trial.set_user_attr(name, content)
        self.study.tell(number, value, state)


def _running(params: Mapping[str, Any], distributions: Mapping[str, Any]) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, params=dict(params), distributions=dict(distributions))


def size_of(grid: Mapping[str, Sequence[Any]]) -> int:
    """Number of combinations."""
    return int(np.prod([len(values) for values in grid.values()]))


def mend(path: Path) -> None:
    """Cut what a killed process has left: an unfinished last line, and its lock.

    No other process asks or tells, since this one owns the folder. A lock of a dashboard that writes a note at this
    moment may go too: a line is written by one call, so that the two do not mix.

    Raises:
        ValueError: naming the line, if another one is damaged.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink(missing_ok=True)
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is damaged; move the file away, and the trials run again"
            ) from None
