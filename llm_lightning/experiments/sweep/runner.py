"""What all kinds of sweeps share: a job with its folder, its record, and the launcher that runs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.ranks.launcher import is_one_of_several
from llm_lightning.experiments.report.watching import SweepReport
from llm_lightning.experiments.run_records import read_summary
from llm_lightning.experiments.settings.checks import check_job
from llm_lightning.experiments.settings.compose import PLUGINS, ConfigDirs, SharedCompositions, config_dirs
from llm_lightning.experiments.settings.nodes import dotted, leaves, plain
from llm_lightning.experiments.settings.overrides import key_of, parsed, quoted
from llm_lightning.experiments.settings.yaml_files import load
from llm_lightning.experiments.sweep import folder as records
from llm_lightning.experiments.sweep.attempt import Attempt
from llm_lightning.experiments.sweep.folder import SweepRef
from llm_lightning.experiments.sweep.forked import PROJECT
from llm_lightning.experiments.sweep.identity import Identity
from llm_lightning.experiments.sweep.launchers import end_with, traits_of
from llm_lightning.experiments.sweep.launching import Launching
from llm_lightning.experiments.sweep.words import Listed
from llm_lightning.terminal import say


@dataclass(frozen=True)
class Job:
    """A job of this sweep, and its folder."""

    listed: Listed
    identity: Identity
    folder: Path
    before: Identity | None = None
    """The job as an earlier start of the sweep recorded it."""

    @property
    def name(self) -> str:
        return self.folder.name

    def state(self) -> str:
        """`finished`, `failed` or `open`, by its folder; `failed` if it failed of itself, so that it would again."""
        if read_summary(self.folder).get("finished"):
            return "finished"
        failure = Failure.read(self.folder)
        return "open" if failure is None or failure.repeats else "failed"


def config_files(config: Any, task: Any) -> SharedCompositions:
    """The YAML files of a sweep's jobs, after the checks that concern every kind of sweep.

    Args:
        config: the composed configuration, Hydra's part included.
        task: what Hydra calls for each job.

    Raises:
        ValueError: if the sweep was started by a launcher of processes, or its settings would reach no job or train
            nothing.
    """
    if is_one_of_several():
        raise ValueError("a sweep starts the processes of each job itself: type it once, without a launcher")
    if config.get("plot_lr"):  # its jobs would draw one over the other, and end without having trained
        raise ValueError("plot_lr=true draws the schedule of one run, not of a sweep: leave -m or plot_lr out")
    dirs = SharedCompositions(config_dirs(task.own_config_dir, task.config_dir).folders)
    _refuse_other_keys(dirs, config.hydra.runtime.choices.get("sweep"))
    _refuse_subdir(config.hydra.overrides.hydra)
    return dirs


def _refuse_other_keys(dirs: ConfigDirs, option: str | None) -> None:
    """Refuse settings of a sweep's file that its jobs would not get."""
    file = dirs.file_of("sweep", option) if option else None
    others = [key for key in (dotted(load(file)) if file else {}) if not f"{key}.".startswith("hydra.")]
    if others:
        raise ValueError(f"{others[0]} in {file} would reach no job: write it under hydra.sweeper.params")


def _refuse_subdir(typed: Sequence[str]) -> None:
    """Refuse a name for the folders of all jobs, which the sweeper names."""
    if any(key_of(word) == "hydra.sweep.subdir" for word in typed):
        raise ValueError("hydra.sweep.subdir has no effect: jobs are named by what varies; leave it out")


def settings_of(words: Sequence[str], dirs: ConfigDirs) -> dict[str, Any]:
    """The settings of a job, composed and checked."""
    return leaves(plain(check_job([parsed(word) for word in words], dirs).config))


@dataclass(frozen=True)
class Runner:
    """The launcher of one start of a sweep, which runs jobs."""

    options: Mapping[str, Any]
    """`hydra.sweeper`."""
    config: Any
    """The composed configuration, Hydra's part included."""
    hydra_context: Any
    attempt: Attempt
    """To copy: what a job runs."""
    folder: Path
    """The sweep's."""

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def report(self) -> SweepReport:
        """Written again as jobs end."""
        return SweepReport(self.folder)

    def last_report(self, *, has_run: bool) -> Path | None:
        """The report, written unless it is there and no job has run."""
        page = self.folder / "report.html"
        return self.report.write() if has_run or not page.is_file() else page

    def record(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            before = job.before.swept if job.before else ()
            swept = tuple(dict.fromkeys([*job.identity.swept, *before]))
            records.write_job(job.folder, replace(job.identity, swept=swept), job.listed.words)

    def launch(self, todo: Sequence[Job], sweep: SweepRef, received: Sequence[int], *, announces: bool = True) -> None:
        """Run jobs, and wait until all have ended, or `received` has a signal.

        Args:
            announces: whether each job is said to begin, where the launcher runs them one after the other.
        """
        if not todo:
            return
        traits = traits_of(self.config.hydra.launcher, len(todo), int(self.options["jobs_per_gpu"]))
        attempt = replace(self.attempt, sweep=sweep, share=traits.share)
        if not traits.in_this_process:
            make = partial(self._launcher, attempt)
            Launching(sweep, todo, traits, make, self._overrides, received, self.report.job_ended).run()
            return
        launcher = self._launcher(attempt, None)
        for number, job in enumerate(todo):
            if received:
                return
            if announces:
                say(f"Sweep {self.name}: job {number + 1} of {len(todo)}, {job.name}", flush=True)
            launcher.launch([self._overrides(job)], initial_job_idx=number)
            self.report.job_ended()

    def _launcher(self, attempt: Attempt, workers: int | None) -> Any:
        from hydra.core.plugins import Plugins

        importable = [str(PROJECT), str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(importable))  # for processes that a launcher starts
        config = self.config.copy()
        with open_dict(config):
            if not config.hydra.verbose:  # the sweep itself says what it runs
                config.hydra.hydra_logging.root.level = "WARNING"
                logging.getLogger("hydra_plugins").setLevel(logging.WARNING)
            config.hydra.sweep.dir = str(self.folder)
            if workers is not None and "n_jobs" in config.hydra.launcher:
                config.hydra.launcher.n_jobs = workers
        launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=attempt, config=config
        )
        if workers is not None and workers > 1 and attempt.sweep is not None:
            launcher.joblib |= {"initializer": end_with, "initargs": (attempt.sweep.head,)}
        return launcher

    def _overrides(self, job: Job) -> list[str]:
        return [*job.listed.words, f"hydra.sweep.dir={quoted(self.folder)}", f"hydra.sweep.subdir={quoted(job.name)}"]
