"""A sweep: list its jobs, leave out what is done, run the others by the launcher, and say how all ended.

    words of the command line -> jobs (words.py) -> composed and checked; what each *is* (identity.py)
    -> matched with the folders that are there (folder.py) -> attempts (attempt.py) by the launcher -> table

The same command runs what is missing; more values add jobs.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_folder import owned
from llm_lightning.experiments.run_records import read_summary, refuse_links
from llm_lightning.experiments.settings.compose import ConfigDirs
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.experiments.summary import shown_from
from llm_lightning.experiments.sweep import folder as records
from llm_lightning.experiments.sweep.identity import Identity, changed_limits, content_of
from llm_lightning.experiments.sweep.launchers import remove_links
from llm_lightning.experiments.sweep.runner import Job, Runner, config_files, settings_of
from llm_lightning.experiments.sweep.stopping import stop_signals
from llm_lightning.experiments.sweep.words import Listed, list_jobs, sweep_name
from llm_lightning.terminal import counted, say

MANY = 20
"""From this number of jobs on, a bar shows how many are composed."""


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
    dirs = config_files(config, task)
    for key, default in (("n_trials", None), ("timeout", None), ("pruner", None), ("n_jobs", None), ("seeds", 1)):
        if options[key] != default:
            raise ValueError(f"hydra.sweeper.{key} has no effect without a search: add hydra/sweeper=optuna")
    listed = list_jobs(options, typed, dirs)
    if config.run_name is None:
        with open_dict(config):
            config.run_name = sweep_name(listed, config.hydra.runtime.choices.get("sweep"), typed)
    folder = Path(config.hydra.sweep.dir).absolute()
    composed = _composed(listed, dirs)
    with owned(folder, what="sweep"):
        remove_links(folder)
        refuse_links(folder)
        jobs = _placed(composed, folder, lambda one: settings_of(_choices(one, dirs), dirs))
        _Sweep(Runner(options, config, hydra_context, task.attempt, folder), jobs).run()


def _composed(listed: Sequence[Listed], dirs: ConfigDirs) -> list[tuple[Listed, Identity]]:
    """What each job is; of equal jobs, the first."""
    from tqdm import tqdm

    content: dict[str, str] = {}
    kept: dict[str, tuple[Listed, Identity]] = {}
    for job in tqdm(listed, desc="Composing", unit="job", leave=False, disable=None if len(listed) > MANY else True):
        settings = settings_of(job.words, dirs)
        identity = Identity(settings, content_of(settings, content), job.swept)
        same, _ = kept.setdefault(identity.digest(), (job, identity))
        if same is not job:
            say(f"{job.name} is the same job as {same.name}: it runs once", flush=True)
    return list(kept.values())


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

    def __init__(self, runner: Runner, jobs: Sequence[Job]) -> None:
        self.runner, self.jobs = runner, jobs
        self.options, self.folder, self.name = runner.options, runner.folder, runner.name

    def run(self) -> None:
        todo = list(self._to_do())
        self.runner.record([*todo, *(job for job in self.jobs if job.before and not job.before.is_recorded)])
        self._announce(todo)
        sweep = records.begin(self.folder)
        received: list[int] = []
        try:
            with stop_signals() as received:
                self.runner.launch(todo, sweep, received)
        finally:
            records.end(sweep)
            page = self.runner.last_report(has_run=bool(todo))
        self._conclude(received, page)

    def _to_do(self) -> Iterator[Job]:
        for job in self.jobs:
            state = job.state()
            if state == "finished":
                if job.before and changed_limits(job.identity.settings, job.before.settings):
                    yield job  # its run says whether anything is left to do
            elif state == "open" or self.options["retry_failed"]:
                yield job

    def _announce(self, todo: Sequence[Job]) -> None:
        finished = sum(job.state() == "finished" for job in self.jobs)
        failed = sum(job.state() == "failed" for job in self.jobs) if not self.options["retry_failed"] else 0
        parts = [f"{finished} finished"] * bool(finished) + [f"{failed} failed before"] * bool(failed)
        say(
            f"Sweep {self.name} in {shown_from(Path.cwd(), self.folder)}: "
            f"{', '.join([counted(len(self.jobs), 'job'), *parts, f'{len(todo)} to run'])}",
            flush=True,
        )

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
        by_dir = any(key_of(word) == "hydra.sweep.dir" for word in self.runner.config.hydra.overrides.hydra)
        where = f"hydra.sweep.dir={shown_from(Path.cwd(), self.folder)}" if by_dir else f"run_name={self.name}"
        say(f"Sweep {self.name}: no job failed{rest}. To add jobs, type more values with {where}")

    def _failure(self, job: Job) -> Failure | None:
        return None if read_summary(job.folder).get("finished") else Failure.read(job.folder)
