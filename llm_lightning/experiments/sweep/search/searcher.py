"""A search: ask Optuna for the parameters of a trial, run its jobs as a sweep does, and tell it the value.

    words -> space and what the trials share (plan.py) -> trials of a batch are asked (study.py) -> their jobs run, one
    seed after the other (runner.py), each validation judged (judge.py, trial.py) -> told in their order -> table

Trials run in batches of as many as the launcher runs at a time. What is asked and pruned depends on the batches before
alone, so the same command goes on after a kill as if nothing had happened.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import open_dict
from optuna.pruners import MedianPruner
from optuna.trial import TrialState

from llm_lightning.experiments.run_folder import owned
from llm_lightning.experiments.run_records import refuse_links
from llm_lightning.experiments.settings.compose import ConfigDirs
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.experiments.summary import shown_from
from llm_lightning.experiments.sweep import folder as records
from llm_lightning.experiments.sweep.folder import SweepRef
from llm_lightning.experiments.sweep.identity import Identity, content_of, names_files
from llm_lightning.experiments.sweep.launchers import remove_links, traits_of
from llm_lightning.experiments.sweep.runner import Job, Runner, config_files, settings_of
from llm_lightning.experiments.sweep.search.judge import Judge, Rows, pruner_of
from llm_lightning.experiments.sweep.search.plan import Plan, keep_plan, plan_of
from llm_lightning.experiments.sweep.search.study import JOURNAL, SAMPLERS, Study, size_of
from llm_lightning.experiments.sweep.search.table import best_lines, trial_lines
from llm_lightning.experiments.sweep.search.trial import SearchTrial, watched
from llm_lightning.experiments.sweep.stopping import stop_signals
from llm_lightning.experiments.sweep.words import Listed, sweep_name
from llm_lightning.nearest import did_you_mean
from llm_lightning.terminal import counted, say

MANY = 10_000
"""Jobs at a time that no machine runs."""
FAILED_AT_FIRST = 3
"""If so many trials of a start fail before any trial has a value, the cause is none of their parameters."""
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def run_search(options: Mapping[str, Any], typed: Sequence[str], config: Any, hydra_context: Any, task: Any) -> None:
    """Run the trials of the search that are missing.

    Args:
        options: `hydra.sweeper`.
        typed: the overrides of the command line.
        config: the composed configuration, Hydra's part included.
        task: what Hydra calls for each job.

    Raises:
        ValueError: before the first trial, if a setting is wrong or the folder holds another search.
        RunFolderInUseError: if another process runs this search.
        ChildProcessError: if the first trials all failed, or an error of the system ended a job.
    """
    dirs = config_files(config, task)
    limits = Limits.of(options)
    plan = plan_of(options, typed, dirs)
    if config.run_name is None:
        listed = Listed("", (*plan.space.typed(), f"seeds={len(plan.seeds)}"), tuple(plan.space.dimensions))
        with open_dict(config):
            config.run_name = sweep_name([listed], config.hydra.runtime.choices.get("sweep"), typed)
    folder = Path(config.hydra.sweep.dir).absolute()
    runner = Runner(options, config, hydra_context, task.attempt, folder)
    at_a_time = _at_a_time(runner)
    with owned(folder, what="sweep"):
        remove_links(folder)
        refuse_links(folder)
        keep_plan(folder, plan)
        study = Study.open(folder, plan.mode, plan.space, sampler=limits.sampler, seed=int(options["seed"]))
        if limits.sampler == "grid":
            limits = limits.of_grid(size_of(study.grid()))
        _Search(runner, plan, study, limits, dirs, at_a_time).run()


def _at_a_time(runner: Runner) -> int:
    """Number of trials of a batch."""
    asked = runner.options["n_jobs"]
    traits = traits_of(runner.config.hydra.launcher, MANY, int(runner.options["jobs_per_gpu"]))
    if traits.in_this_process:
        if asked not in (None, 1):
            raise ValueError(
                f"hydra.sweeper.n_jobs={asked} needs a launcher that runs jobs at a time: hydra/launcher=joblib"
            )
        return 1
    if asked is None and not (traits.workers or traits.at_a_time):
        raise ValueError("this launcher has no number of jobs at a time: add hydra.sweeper.n_jobs=N")
    return int(asked or traits.workers or traits.at_a_time)


@dataclass(frozen=True)
class Limits:
    """When a search ends, and how it prunes."""

    sampler: str
    n_trials: int | None
    timeout: float | None
    pruner: MedianPruner | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Limits:
        """Those of `hydra.sweeper`. Raises ValueError naming the key that is wrong."""
        sampler, pruner, n_trials, timeout = (options[key] for key in ("sampler", "pruner", "n_trials", "timeout"))
        if sampler not in SAMPLERS:
            hint = did_you_mean(str(sampler), SAMPLERS)
            raise ValueError(f"hydra.sweeper.sampler={sampler}: {hint}there are {', '.join(SAMPLERS)}")
        if pruner not in (None, "median"):
            raise ValueError(f"hydra.sweeper.pruner={pruner}: there are median and null")
        for key, kinds in (("n_trials", int), ("timeout", (int, float)), ("n_jobs", int)):
            value = options[key]
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value <= 0):
                raise ValueError(f"hydra.sweeper.{key}={value} must be a number above 0, or null")
        for key in ("pruner_startup", "pruner_warmup", "seed"):
            if options[key] < 0:
                raise ValueError(f"hydra.sweeper.{key}={options[key]} must not be negative")
        if n_trials is None and timeout is None and sampler != "grid":
            raise ValueError("a search needs an end: add hydra.sweeper.n_trials=N, or timeout=SECONDS")
        median = MedianPruner(
            n_startup_trials=options["pruner_startup"],
            n_warmup_steps=options["pruner_warmup"] + 1,  # validations count from 1
        )
        return cls(sampler, n_trials, timeout, median if pruner else None)

    def of_grid(self, size: int) -> Limits:
        """The same, with at most a trial for each point of the grid."""
        return Limits(self.sampler, min(size, self.n_trials or size), self.timeout, self.pruner)


@dataclass
class _Search:
    """One start of a search."""

    runner: Runner
    plan: Plan
    study: Study
    limits: Limits
    dirs: ConfigDirs
    at_a_time: int
    received: Sequence[int] = ()
    content: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    failed: int = 0
    """Trials that failed in this start before any had a value."""

    @property
    def name(self) -> str:
        return self.runner.name

    def run(self) -> None:
        self._announce()
        sweep = records.begin(self.runner.folder)
        stopped: list[SearchTrial] = []
        has_run = False
        try:
            with stop_signals() as self.received:
                while not stopped and not self.received and (numbers := self._next()):
                    has_run = True
                    stopped = self._run_batch(numbers, sweep)
        finally:
            records.end(sweep)
            page = self.runner.last_report(has_run=has_run)
        self._conclude(stopped, page)

    def _next(self) -> range:
        """The numbers of the next batch; empty if the search ends."""
        trials = self.study.trials()
        is_over = self.limits.timeout is not None and time.monotonic() - self.began > self.limits.timeout
        if is_over or self.failed >= FAILED_AT_FIRST:
            return range(0)
        first = next((trial.number for trial in trials if not trial.state.is_finished()), len(trials))
        last = self.limits.n_trials or first + self.at_a_time
        start = first - first % self.at_a_time
        return range(start, min(start + self.at_a_time, last)) if first < last else range(0)

    def _run_batch(self, numbers: range, sweep: SweepRef) -> list[SearchTrial]:
        """Run trials to their ends, and tell them in their order; returns those that are stopped instead."""
        past = self.study.past(numbers.start)
        asked = [self.study.ask(past, number) for number in numbers]
        prunes = pruner_of(past, self.limits.pruner)
        better = {"min": min, "max": max}[self.plan.mode]
        is_over_files = any(map(names_files, self.plan.space.dimensions))
        trials = [
            SearchTrial(one.number, one.params, self.plan.monitor, Judge(better, prunes), is_over_files)
            for one in asked
            if not one.state.is_finished()
        ]
        for trial in trials:
            self._place(trial)
        for position in range(len(self.plan.seeds)):
            self._run_jobs(trials, position, sweep)
        for trial in trials:
            if trial.end is not None:
                self._tell(trial)
        return [trial for trial in trials if trial.end is None]

    def _place(self, trial: SearchTrial) -> None:
        """Compose the jobs of a trial; one whose values do not go together fails."""
        swept = (*self.plan.space.dimensions, *["seed"] * (len(self.plan.seeds) > 1))
        jobs = []
        try:
            for seed in self.plan.seeds:
                words = self.plan.words(trial.params, seed)
                settings = settings_of(words, self.dirs)
                identity = Identity(settings, content_of(settings, self.content), swept)
                name = self.plan.job_name(trial.number, seed)
                jobs.append(Job(Listed(name, words, swept), identity, self.runner.folder / name))
        except ValueError as error:
            trial.fail(str(error))
        for job in jobs:
            self._refuse_another(job)
        trial.jobs = jobs
        said = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        of = f" ({trial.number + 1} of {self.limits.n_trials})" if self.limits.n_trials else ""
        say(f"Search {self.name}: trial {trial.number}{of}: {said}", flush=True)

    def _refuse_another(self, job: Job) -> None:
        """Refuse the folder of other parameters, which a study that was moved away has left."""
        recorded = records.read_words(job.folder)
        keys = self.plan.space.dimensions
        before, now = ({word for word in words if key_of(word) in keys} for words in (recorded, job.listed.words))
        if recorded and before != now:
            raise ValueError(
                f"{job.folder} holds another trial ({' '.join(sorted(before))}); move it away, "
                "or begin another search with run_name=NAME"
            )

    def _run_jobs(self, trials: Sequence[SearchTrial], position: int, sweep: SweepRef) -> None:
        """Run the jobs with one of the seeds, of those trials that go on."""
        going = [trial for trial in trials if trial.end is None and len(trial.judge.best_of_jobs) == position]
        going = [trial for trial in going if position == 0 or trial.has_ended(trial.jobs[position - 1])]
        todo = {trial.number: job for trial in going if not self.received and (job := trial.begin(position))}
        if not todo:
            return
        running = [trial for trial in going if trial.number in todo]
        rows = {trial.number: Rows(todo[trial.number].folder, self.plan.monitor) for trial in running}

        def look() -> None:
            for trial in running:
                trial.look(position, rows[trial.number])
                self.study.report(trial.number, trial.judge.values)

        self.runner.record(list(todo.values()))
        with watched(look):
            self.runner.launch(list(todo.values()), sweep, self.received, announces=False)
        for trial in running:
            trial.conclude(position)

    def _tell(self, trial: SearchTrial) -> None:
        assert trial.end is not None
        self.study.report(trial.number, trial.judge.values)
        value = trial.judge.value() if trial.end == "complete" else None
        extra = {"jobs": trial.values} | ({"reason": trial.reason} if trial.reason else {})
        self.study.tell(trial.number, STATES[trial.end], value, **extra)
        any_value = any(one.value is not None for one in self.study.told())
        self.failed = 0 if any_value else self.failed + (trial.end == "failed")
        shown = f"{trial.end}: {self.plan.monitor} {value:.4f}" if value is not None else str(trial.reason)
        shown = f"failed: {shown}" if trial.end == "failed" else shown
        best = self.study.best()
        rest = f"; the best is trial {best.number}, {best.value:.4f}" if best else ""
        say(f"Search {self.name}: trial {trial.number} {shown}{rest}", flush=True)

    # --- words -------------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        where, ended = shown_from(Path.cwd(), self.runner.folder), len(self.study.told())
        of = f"{ended} of {self.limits.n_trials} trials" if self.limits.n_trials else counted(ended, "trial")
        say(f"Search {self.name} in {where}: {of} ended before", flush=True)

    def _conclude(self, stopped: Sequence[SearchTrial], page: Path | None) -> None:
        say()
        for line in trial_lines(self.study.trials(), self.plan.monitor):
            say(line)
        for line in best_lines(self.study.best(), self.plan, self.runner.attempt):
            say(line)
        if page is not None:
            say(f"Report: {shown_from(Path.cwd(), page)}")
        journal = shown_from(Path.cwd(), self.runner.folder / JOURNAL)
        say(f"Search {self.name}: optuna-dashboard {journal} shows it (pip install optuna-dashboard)")
        if self.received:
            say(f"Search {self.name}: stopped; the same command continues", file=sys.stderr)
            sys.exit(128 + self.received[0])
        for trial in stopped:
            if trial.reason:
                raise ChildProcessError(f"{trial.reason}; mend the cause, and the same command continues")
        if stopped:
            numbers = ", ".join(str(trial.number) for trial in stopped)
            say(f"Search {self.name}: trial {numbers} was stopped before its end; the same command continues")
        told = self.study.told()
        if told and all(trial.state is TrialState.FAIL for trial in told):
            n_trials = self.limits.n_trials
            is_over = n_trials is not None and len(told) >= n_trials
            again = "a larger hydra.sweeper.n_trials goes on" if is_over else "the same command continues"
            raise ChildProcessError(
                f"no trial has a value, and {len(told)} failed, the last: "
                f"{told[-1].user_attrs.get('reason')}; mend the cause, and {again}"
            )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
