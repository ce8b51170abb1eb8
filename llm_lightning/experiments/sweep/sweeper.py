"""A sweep: list its jobs, leave out what is done, run the others by the launcher, and say how all ended.

    words of the command line -> jobs (words.py) -> composed and checked; what each *is* (identity.py)
    -> matched with the folders that are there (folder.py) -> attempts (attempt.py) by the launcher -> table

The same command runs what is missing; more values add jobs.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.report.watching import SweepReport
from llm_lightning.experiments.run_folder import is_main_process, owned
from llm_lightning.experiments.run_records import read_summary, refuse_links
from llm_lightning.experiments.settings.checks import check_job
from llm_lightning.experiments.settings.compose import PLUGINS, ConfigDirs, SharedCompositions, config_dirs
from llm_lightning.experiments.settings.nodes import dotted, leaves, plain
from llm_lightning.experiments.settings.overrides import key_of, parsed, quoted
from llm_lightning.experiments.settings.yaml_files import load
from llm_lightning.experiments.summary import shown_from
from llm_lightning.experiments.sweep import folder as records
from llm_lightning.experiments.sweep.attempt import Attempt
from llm_lightning.experiments.sweep.folder import SweepRef
from llm_lightning.experiments.sweep.forked import PROJECT
from llm_lightning.experiments.sweep.identity import Identity, changed_limits, content_of
from llm_lightning.experiments.sweep.launchers import end_with, remove_links, traits_of
from llm_lightning.experiments.sweep.launching import Launching
from llm_lightning.experiments.sweep.stopping import stop_signals
from llm_lightning.experiments.sweep.words import Listed, list_jobs, sweep_name
from llm_lightning.terminal import counted, say

MANY = 20
"""From this number of jobs on, a bar shows how many are composed."""


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


def run_sweep(options: Mapping[str, Any], typed: Sequence[str], config: Any, hydra_context: Any, task: Any) -> None:
    """Run the jobs of the sweep that are not finished.

    Args:
        options: `hydra.sweeper`.
        typed: the overrides of the command line.
        config: the composed configuration, Hydra's part included.
        task: the `Attempt` to copy: what a job runs.

    Raises:
        ValueError: before the first job, if a job has a wrong setting or the folder a damaged file.
        RunFolderInUseError: if another process runs this sweep.
        ChildProcessError: if jobs failed.
    """
    if not is_main_process() or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a sweep starts the processes of each job itself: type it once, without a launcher")
    attempt: Attempt = task.attempt
    dirs = SharedCompositions(config_dirs(task.own_config_dir, task.config_dir).folders)
    option = config.hydra.runtime.choices.get("sweep")
    _refuse_other_keys(dirs, option)
    _refuse_subdir(config.hydra.overrides.hydra)
    listed = list_jobs(options, typed, dirs)
    if config.run_name is None:
        with open_dict(config):
            config.run_name = sweep_name(listed, option, typed)
    folder = Path(config.hydra.sweep.dir).absolute()
    composed = _composed(listed, dirs)
    with owned(folder, what="sweep"):
        remove_links(folder)
        refuse_links(folder)
        jobs = _placed(composed, folder, lambda one: _settings_of(_choices(one, dirs), dirs))
        _Sweep(options, config, hydra_context, attempt, folder, jobs).run()


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


def _composed(listed: Sequence[Listed], dirs: ConfigDirs) -> list[tuple[Listed, Identity]]:
    """What each job is; of equal jobs, the first."""
    from tqdm import tqdm

    content: dict[str, str] = {}
    kept: dict[str, tuple[Listed, Identity]] = {}
    for job in tqdm(listed, desc="Composing", unit="job", leave=False, disable=None if len(listed) > MANY else True):
        settings = _settings_of(job.words, dirs)
        identity = Identity(settings, content_of(settings, content), job.swept)
        same, _ = kept.setdefault(identity.digest(), (job, identity))
        if same is not job:
            say(f"{job.name} is the same job as {same.name}: it runs once", flush=True)
    return list(kept.values())


def _settings_of(words: Sequence[str], dirs: ConfigDirs) -> dict[str, Any]:
    """The settings of a job, composed and checked."""
    return leaves(plain(check_job([parsed(word) for word in words], dirs).config))


def _choices(job: Listed, dirs: ConfigDirs) -> list[str]:
    """The words of a job that choose files: without the others, it has the default of every key."""
    groups = dirs.groups()
    return [word for word in job.words if key_of(word) in groups]


def _placed(
    composed: Sequence[tuple[Listed, Identity]], folder: Path, defaults: Callable[[Listed], Mapping[str, Any]]
) -> list[Job]:
    """Each job with its folder: the one that holds it already, else a new one with its name."""
    before = records.read_jobs(folder)
    all_swept = {key for _, identity in composed for key in identity.swept}
    by_digest = {identity.digest(all_swept): path for path, identity in reversed(before.items())}
    taken = {path.name.casefold() for path in folder.iterdir()}
    jobs: list[Job] = []
    for listed, identity in composed:
        path = by_digest.get(identity.digest(all_swept))
        if path is None:
            free = {path: other for path, other in before.items() if path not in {job.folder for job in jobs}}
            path = _similar(listed, identity, free, defaults)
        if path is None:
            name = listed.name
            if name.casefold() in taken:
                name = f"{name}-{identity.digest()[:6]}"
            path = folder / name
        taken.add(path.name.casefold())
        jobs.append(Job(listed, identity, path, before.get(path)))
    return jobs


def _similar(
    listed: Listed,
    identity: Identity,
    before: Mapping[Path, Identity],
    defaults: Callable[[Listed], Mapping[str, Any]],
) -> Path | None:
    """The folder of the same job as another version, another sweep or the run alone recorded it.

    Also of one that failed before its first checkpoint, and whose data or first weights were mended since.
    """
    known: Mapping[str, Any] = {}
    for path, other in before.items():
        is_blank = other.content != identity.content and not read_summary(path) and not any(path.glob("*/*.ckpt"))
        if identity.knows_as_much_as(other) and not is_blank:
            continue  # by_digest has it, if it is the same
        known = known or defaults(listed)
        if identity.is_same(other, known.get, with_content=not is_blank):
            return path
    return None


class _Sweep:
    """The jobs of one start of a sweep, and the launcher that runs them."""

    def __init__(
        self,
        options: Mapping[str, Any],
        config: Any,
        hydra_context: Any,
        attempt: Attempt,
        folder: Path,
        jobs: Sequence[Job],
    ) -> None:
        self.options, self.config, self.hydra_context = options, config, hydra_context
        self.attempt, self.folder, self.jobs = attempt, folder, jobs
        self.name = folder.name
        self.report = SweepReport(folder)

    def run(self) -> None:
        todo = list(self._to_do())
        self._record([*todo, *(job for job in self.jobs if job.before and not job.before.is_recorded)])
        self._announce(todo)
        sweep = records.begin(self.folder)
        received: list[int] = []
        try:
            with stop_signals() as received:
                self._launch(todo, sweep, received)
        finally:
            records.end(sweep)
            page = self._last_report(todo)
        self._conclude(received, page)

    def _last_report(self, todo: Collection[Job]) -> Path | None:
        """The report, written unless it is there and no job ran."""
        page = self.folder / "report.html"
        return page if not todo and page.is_file() else self.report.write()

    def _to_do(self) -> Iterator[Job]:
        for job in self.jobs:
            state = job.state()
            if state == "finished":
                if job.before and changed_limits(job.identity.settings, job.before.settings):
                    yield job  # its run says whether anything is left to do
            elif state == "open" or self.options["retry_failed"]:
                yield job

    def _record(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            before = job.before.swept if job.before else ()
            swept = tuple(dict.fromkeys([*job.identity.swept, *before]))
            records.write_job(job.folder, replace(job.identity, swept=swept), job.listed.words)

    def _announce(self, todo: Sequence[Job]) -> None:
        finished = sum(job.state() == "finished" for job in self.jobs)
        failed = sum(job.state() == "failed" for job in self.jobs) if not self.options["retry_failed"] else 0
        parts = [f"{finished} finished"] * bool(finished) + [f"{failed} failed before"] * bool(failed)
        say(
            f"Sweep {self.name} in {shown_from(Path.cwd(), self.folder)}: "
            f"{', '.join([counted(len(self.jobs), 'job'), *parts, f'{len(todo)} to run'])}",
            flush=True,
        )

    # --- launching ---------------------------------------------------------------------------------------------------

    def _launch(self, todo: Sequence[Job], sweep: SweepRef, received: Sequence[int]) -> None:
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

    # --- the end -----------------------------------------------------------------------------------------------------

    def _conclude(self, received: Sequence[int], page: Path | None) -> None:
        from llm_lightning.experiments.run_list import runs
        from llm_lightning.experiments.run_table import table, terminal_width

        ours = {job.folder for job in self.jobs}
        found = runs(self.folder)
        shown = [record for record in found if Path(record["folder"]).absolute() in ours]
        say()
        for line in table(shown, width=terminal_width()):
            say(line)
        if len(found) > len(shown):
            say(f"{counted(len(found) - len(shown), 'other run')} in this folder: no job of this command")
        if page is not None:
            say(f"Report: {shown_from(Path.cwd(), page)}")
        if received:
            left = sum(job.state() != "finished" for job in self.jobs)
            say(f"Sweep {self.name}: stopped, {counted(left, 'job')} left; the same command continues", file=sys.stderr)
            sys.exit(128 + received[0])
        failures = [failure for job in self.jobs if (failure := self._failure(job)) is not None]
        again = [word for word in sys.argv[1:] if key_of(word) != "hydra.sweeper.retry_failed"]
        if failures:
            if not all(failure.repeats for failure in failures):
                again.append("hydra.sweeper.retry_failed=true")
            command = shlex.join(["python", str(shown_from(Path.cwd(), Path(sys.argv[0]))), *again])
            raise ChildProcessError(
                f"{len(failures)} of {counted(len(self.jobs), 'job')} failed; once the cause is mended, run only them:"
                f" {command}"
            )
        unfinished = sum(job.state() != "finished" for job in self.jobs)
        rest = f"; {counted(unfinished, 'job')} stopped before the end" if unfinished else ""
        by_dir = any(key_of(word) == "hydra.sweep.dir" for word in self.config.hydra.overrides.hydra)
        where = f"hydra.sweep.dir={shown_from(Path.cwd(), self.folder)}" if by_dir else f"run_name={self.name}"
        say(f"Sweep {self.name}: no job failed{rest}. To add jobs, type more values with {where}")

    def _failure(self, job: Job) -> Failure | None:
        return None if read_summary(job.folder).get("finished") else Failure.read(job.folder)
