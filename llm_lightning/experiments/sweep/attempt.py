"""One attempt at a job, in whatever process the launcher chose: claim its share, train in a child, record the end.

The process that calls `Attempt` never trains, so it can watch: it stops its child, which then saves, when it gets a
signal, when the sweep stops or has died, or when somebody makes a file `stop` in the job's folder.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_lightning.experiments.command_line import one_run
from llm_lightning.experiments.failures import SHOWN, Failure
from llm_lightning.experiments.ranks.launcher import is_main_process, is_one_of_several
from llm_lightning.experiments.run_folder import living_owner
from llm_lightning.experiments.run_records import read_summary
from llm_lightning.experiments.settings.nodes import plain
from llm_lightning.experiments.settings.overrides import run_dir_override
from llm_lightning.experiments.sweep import claims
from llm_lightning.experiments.sweep.children import Orders, lines_with_name, start_child, wait_for
from llm_lightning.experiments.sweep.folder import (
    STOP,
    Outcome,
    Process,
    SweepRef,
    Watch,
    write_attempt,
)
from llm_lightning.experiments.sweep.forked import can_fork
from llm_lightning.experiments.sweep.stopping import Requeueing, requeueing, stop_signals
from llm_lightning.files.download import cache_dir
from llm_lightning.terminal import one_line, say

WATCH_SECONDS = 0.5
"""Seconds between two looks at the sweep's files."""
SWEEP_STOPS_SECONDS = 5.0
"""Seconds in which the sweep says that it stops too, after a signal to a job: a terminal sends it to all."""
LAST_LINES = 20
"""Number of lines of a failed job's output that are kept."""

under_way = threading.Lock()
"""Held while this process attempts a job."""


@dataclass(frozen=True)
class Share:
    """What a job gets of its machine."""

    threads: int | None = None
    """Number of threads; None: as many as torch takes."""
    gpus: tuple[str, ...] = ()
    """The machine's GPUs, of which each job claims its own; empty if there is none, or if a scheduler allots them."""
    jobs_per_gpu: int = 1
    forks: bool = False
    """Whether this process attempts many jobs, so that a server that imports once for all pays."""
    names_lines: bool = False
    """Whether other jobs print beside it."""


@dataclass(frozen=True)
class Attempt:
    """The function that a launcher calls for each job.

    Under another sweeper than ours (`hydra/sweeper=basic`) there is no record, and a failure raises.
    """

    script: str
    """What a child process runs."""
    options: tuple[str, ...]
    """Command-line options for every job: `--config-dir`."""
    sweep: SweepRef | None = None
    share: Share = Share()

    def __call__(self, config: Any) -> float | None:
        """Run the job that Hydra has just composed; return the best value of its monitored metric."""
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        run_dir = Path(hydra.runtime.output_dir).absolute()
        words = [*hydra.overrides.task, *one_run(hydra), run_dir_override(run_dir)]
        argv = [self.script, *self.options, *words]
        job = _Job(argv, run_dir, str(hydra.runtime.cwd), plain(config.trainer), self.share)
        with under_way:
            if self.sweep is not None and is_main_process():
                _record(job, self.sweep)
            else:  # of several tasks of one job, the first records
                with stop_signals() as received:
                    code = job.train(lambda: bool(received), received, first=self.sweep is None)
                if code and self.sweep is None:
                    raise ChildProcessError(f"{run_dir} failed (exit code {code})")
        return read_summary(run_dir).get("best_value")


# --- the record ------------------------------------------------------------------------------------------------------


def _record(job: _Job, sweep: SweepRef) -> None:
    """Run a job unless the sweep is over, and write how it went to its folder."""
    watch, run_dir = Watch(sweep), job.run_dir
    over = _every(WATCH_SECONDS, lambda: watch.is_over() or (run_dir / STOP).exists())
    if watch.is_over():
        return
    began = time.monotonic()
    with stop_signals() as received, requeueing() as requeue:
        write_attempt(run_dir, sweep, "running")

        def stops() -> bool:
            return bool(received) or bool(requeue and requeue.announced) or over()

        try:
            code = job.train(stops, received)
        except Exception as error:  # a claim that cannot be met, a disk that is full
            code = _refused(error, run_dir)
        finished = code == 0 and read_summary(run_dir).get("finished")
        is_over = over() or (bool(received) and _sweep_stops(sweep, over))
        if requeue and not finished and not is_over and requeue.is_due(received):
            outcome = _requeued(requeue, run_dir, sweep)
        else:
            foreign = received[0] if received and not is_over else None
            outcome = outcome_of(code, run_dir, stopped=is_over, lines=job.lines, foreign=foreign, over=over)
        (run_dir / STOP).unlink(missing_ok=True)
        seconds = round(time.monotonic() - began, 2)
        write_attempt(run_dir, sweep, outcome, exit_code=code, seconds=seconds, signals=list(received))


def _refused(error: Exception, run_dir: Path) -> int:
    """Record an error before there was a child."""
    message = one_line(error, SHOWN) or type(error).__name__
    Failure("os" if isinstance(error, OSError) else "error", type(error).__name__, message, 1).write(run_dir)
    say(f"{run_dir.name}: error: {message}", file=sys.stderr, flush=True)
    return 1


def _requeued(requeue: Requeueing, run_dir: Path, sweep: SweepRef) -> Outcome:
    """Let the launcher requeue a job that has saved, which ends this process; or record why it does not."""
    write_attempt(run_dir, sweep, "requeued")
    why = requeue()
    message = f"the scheduler took the machine back (time limit, preemption): {why}"
    remedy = "a longer hydra.launcher.timeout_min, or hydra.launcher.max_num_timeout=3, lets it go on"
    Failure("signal", None, f"{message}; {remedy}", 128 + requeue.signum).write(run_dir)
    return "failed"


def _sweep_stops(sweep: SweepRef, over: Callable[[], bool], seconds: float = SWEEP_STOPS_SECONDS) -> bool:
    """Whether the sweep stops: this is its process, or it says so within some time."""
    deadline = time.monotonic() + seconds
    while not (sweep.head == Process.this() or over()):
        if time.monotonic() > deadline:
            return False
        time.sleep(WATCH_SECONDS)
    return True


def outcome_of(
    code: int,
    run_dir: Path,
    *,
    stopped: bool,
    lines: Sequence[str] = (),
    foreign: int | None = None,
    over: Callable[[], bool] = lambda: False,
) -> Outcome:
    """How an attempt ended; a failure that the run could not record itself is recorded here.

    Args:
        code: the child's, as a shell gives it.
        stopped: whether the sweep, or a person, told the job to stop.
        lines: the child's last output.
        foreign: a signal that the launcher or a person sent while the sweep went on.
        over: asked again after a signal to the child: a terminal's reaches it before the sweep has written a word.
    """
    if code == 0 and (foreign is None or read_summary(run_dir).get("finished")):
        return "stopped" if stopped and not read_summary(run_dir).get("finished") else "finished"
    by_signal = code - 128 if 128 < code < 160 else None
    if by_signal in (signal.SIGINT, getattr(signal, "SIGHUP", None)) and not stopped and foreign is None:
        deadline = time.monotonic() + SWEEP_STOPS_SECONDS
        while not (stopped := over()) and time.monotonic() < deadline:
            time.sleep(WATCH_SECONDS)
    if stopped and (by_signal is not None or code == 255):  # 255: the fork server was killed as well
        return "stopped"
    failure = Failure.read(run_dir)
    if foreign is not None:
        reason = f"ended by {_signal_name(foreign)} of its launcher or of a person, while the sweep went on"
        failure = Failure("signal", None, reason, 128 + foreign)
    elif failure is None and by_signal is not None:
        failure = Failure("signal", None, f"ended by {_signal_name(by_signal)}", code)
    elif failure is None:
        failure = Failure("error", None, f"ended with exit code {code}, without a word why", code)
    if not failure.lines:
        replace(failure, lines=_last(run_dir, lines)).write(run_dir)
    return "failed"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _last(run_dir: Path, lines: Sequence[str]) -> list[str]:
    """The last lines of a job's output, or of its log."""
    if lines:
        return list(lines)
    with contextlib.suppress(OSError):
        return (run_dir / "train.log").read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return []


# --- the child -------------------------------------------------------------------------------------------------------


class _Job:
    """A job in this process: the words of its child, and the share that it claims."""

    def __init__(self, argv: list[str], run_dir: Path, folder: str, trainer: Mapping[str, Any], share: Share) -> None:
        self.argv, self.run_dir, self.folder, self.trainer, self.share = argv, run_dir, folder, trainer, share
        self.name = run_dir.name
        self.lines = collections.deque[str](maxlen=LAST_LINES)

    def train(self, stops: Callable[[], bool], received: Sequence[int], *, first: bool = True) -> int:
        """Train in a child process, as soon as the job's folder and GPUs are free; return the exit code.

        Args:
            first: whether it is the first or only process of the job.
        """
        with contextlib.ExitStack() as held:
            if first and not self._wait_for_owner(stops):
                return 0
            claim = held.enter_context(self._claimed_gpus(stops))
            if claim is None:
                return 0
            orders = self._orders(claim)
            output = held.enter_context(lines_with_name(self.name, self.lines)) if self.share.names_lines else None
            child = start_child(orders, output)
            if output is not None:
                output.close()
            try:
                return wait_for(child, stops, received)
            finally:
                child.close()

    def _wait_for_owner(self, stops: Callable[[], bool]) -> bool:
        """Wait until no process works in the job's folder: one of a sweep that was killed may still be saving."""
        said = False
        while owner := living_owner(self.run_dir):
            if stops():
                return False
            if not said:
                say(f"{self.name}: waits for process {owner['pid']}, which is ending in its folder", flush=True)
                said = True
            time.sleep(WATCH_SECONDS)
        return True

    @contextlib.contextmanager
    def _claimed_gpus(self, stops: Callable[[], bool]) -> Iterator[claims.Claim | None]:
        """Claim the job's GPUs; empty if it wants none, None if `stops` said so."""
        present = self.share.gpus
        wanted = claims.gpus_wanted(self.trainer, present)
        if not wanted or is_one_of_several():  # each task of a job would claim all: its launcher gives them out
            yield claims.Claim()
            return

        def waits() -> None:
            say(f"{self.name}: waits for a GPU", flush=True)

        folder, shares = claims.machine_folder(cache_dir()), self.share.jobs_per_gpu
        with claims.claimed(folder, present, wanted, shares=shares, gives_up=stops, waits=waits) as claim:
            yield claim

    def _orders(self, claim: claims.Claim) -> Orders:
        environment = dict(os.environ)
        if claim.names:
            listed = claims.listed(self.trainer.get("devices"))  # by number, of all that are there
            environment[claims.VISIBLE] = ",".join(self.share.gpus if listed else claim.names)
        threads = claims.threads_of(self.share.threads, self.trainer, environment)
        if threads is not None:
            environment |= dict.fromkeys(claims.THREADS, str(threads))
        forks = self.share.forks and can_fork(self.trainer, has_gpus=bool(self.share.gpus))
        return Orders(self.argv, environment, self.folder, threads, forks, claim.descriptors)


def _every(seconds: float, look: Callable[[], bool]) -> Callable[[], bool]:
    """`look`, asked at most once in `seconds`, and no more once it said yes."""
    last, answer = -seconds, False

    def asked() -> bool:
        nonlocal last, answer
        if not answer and time.monotonic() - last >= seconds:
            last, answer = time.monotonic(), look()
        return answer

    return asked
