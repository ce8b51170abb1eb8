"""One attempt at a job, in whatever process the launcher chose: claim its share, train in a child, record the end.

The process that calls `Attempt` never trains, so it can watch: it stops its child, which then saves, when it gets a
signal, when the sweep stops or has died, or when somebody makes a file `stop` in the job's folder.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Protocol

from llm_lightning.experiments import processes
from llm_lightning.experiments.command_line import one_run
from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_folder import is_main_process, living_owner
from llm_lightning.experiments.run_records import read_summary
from llm_lightning.experiments.settings.nodes import plain
from llm_lightning.experiments.settings.overrides import run_dir_override
from llm_lightning.experiments.sweep import claims
from llm_lightning.experiments.sweep.folder import STOP, Outcome, SweepRef, Watch, write_attempt
from llm_lightning.experiments.sweep.forked import ForkedChild, can_fork
from llm_lightning.files.download import cache_dir
from llm_lightning.signals import STOPPING
from llm_lightning.terminal import say, visible

POLL_SECONDS = 0.05
WATCH_SECONDS = 0.5
"""Seconds between two looks at the sweep's files."""
AGAIN_SECONDS = 5.0
"""Seconds between two signals to a child that is to stop: the first may arrive before it listens."""
LAST_LINES = 20
"""Number of lines of a failed job's output that are kept."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_signals: list[int] = []


class Child(Protocol):
    """A process that trains."""

    def poll(self) -> int | None:
        """The exit code as `subprocess` gives it, None while it lives."""

    def send_signal(self, signum: int) -> None: ...

    def close(self) -> None: ...


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
    threads: int | None = None
    """Threads of the job; None leaves that open."""
    slots: int | None = None
    """Number of jobs on this machine at a time, if the launcher itself sets no limit."""
    is_parallel: bool = False
    """Whether others run beside it: its lines carry its name, and it claims its GPUs."""
    jobs_per_gpu: int = 1
    handled: tuple[int, ...] = field(default=STOPPING)

    def __call__(self, config: Any) -> float | None:
        """Run the job that Hydra has just composed; return the best value of its monitored metric."""
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        run_dir = Path(hydra.runtime.output_dir).absolute()
        words = [*hydra.overrides.task, *one_run(hydra), run_dir_override(run_dir)]
        trainer = plain(config.trainer)
        if self.sweep is None or not is_main_process():  # of several processes that SLURM starts, the first records
            code = self._train(words, run_dir, trainer, lambda: bool(_signals))
            if code and self.sweep is None:
                raise ChildProcessError(f"{run_dir} failed (exit code {code})")
        else:
            self._recorded(words, run_dir, trainer, self.sweep, Watch(self.sweep))
        return read_summary(run_dir).get("best_value")

    # --- the record ----------------------------------------------------------------------------------------------

    def _recorded(self, words: list[str], run_dir: Path, trainer: Any, sweep: SweepRef, watch: Watch) -> None:
        """Run a job unless the sweep is over, and write how it went to its folder."""
        over = _every(WATCH_SECONDS, lambda: watch.is_over() or (run_dir / STOP).exists())

        def stops() -> bool:
            return bool(_signals) or over()

        if watch.is_over():
            return
        began, lines = time.monotonic(), collections.deque[str](maxlen=LAST_LINES)
        with stop_signals(self.handled):
            write_attempt(run_dir, sweep, "running")
            with requeues(run_dir, sweep):
                code = self._train(words, run_dir, trainer, stops, lines)
            outcome = outcome_of(code, run_dir, stopped=stops(), lines=lines)
            seconds = round(time.monotonic() - began, 2)
            (run_dir / STOP).unlink(missing_ok=True)
            write_attempt(run_dir, sweep, outcome, exit_code=code, seconds=seconds, signals=list(_signals))

    # --- the child -----------------------------------------------------------------------------------------------

    def _train(
        self,
        words: list[str],
        run_dir: Path,
        trainer: Any,
        stops: Callable[[], bool],
        lines: collections.deque[str] | None = None,
    ) -> int:
        """Train in a child process, as soon as the job's folder, slot and GPUs are free; return the exit code."""
        name = run_dir.name
        with contextlib.ExitStack() as held:
            if not _wait_for_owner(run_dir, stops):
                return 0
            if self.slots is not None:
                folder, slots = cache_dir() / "slots" / (self.sweep.id if self.sweep else "one"), range(self.slots)
                if held.enter_context(claims.claimed(folder, [str(n) for n in slots], 1, gives_up=stops)) is None:
                    return 0
            environment = dict(os.environ)
            present = claims.visible_gpus() if trainer["accelerator"] != "cpu" else []
            if self.is_parallel and present:
                got = self._claim_gpus(held, name, trainer, present, stops)
                if got is None:
                    return 0
                if not isinstance(trainer.get("devices"), list):
                    environment[claims.VISIBLE] = ",".join(got)
            if self.threads is not None:
                environment |= dict.fromkeys(THREADS, str(self.threads))
            forks = can_fork(trainer, has_gpus=bool(present))
            return self._in_child([self.script, *self.options, *words], name, environment, forks, stops, lines)

    def _claim_gpus(
        self, held: contextlib.ExitStack, name: str, trainer: Any, present: list[str], stops: Callable[[], bool]
    ) -> list[str] | None:
        wanted = claims.gpus_wanted(trainer, present)
        folder = claims.machine_folder(cache_dir())

        def waits() -> None:
            say(f"{name}: waits for a GPU", flush=True)

        claim = claims.claimed(folder, present, wanted, shares=self.jobs_per_gpu, gives_up=stops, waits=waits)
        return held.enter_context(claim)

    def _in_child(
        self,
        argv: list[str],
        name: str,
        environment: dict[str, str],
        forks: bool,
        stops: Callable[[], bool],
        lines: collections.deque[str] | None,
    ) -> int:
        reader: threading.Thread | None = None
        output: Connection | None = None
        if self.is_parallel:
            source, output = Pipe(duplex=False)
            kept = lines if lines is not None else collections.deque[str](maxlen=LAST_LINES)
            reader = threading.Thread(target=_pass_on, args=(source, name, kept), daemon=True)
            reader.start()
        child = start_child(argv, environment, output, threads=self.threads, forks=forks)
        if output is not None:
            output.close()
        try:
            code = wait_for(child, stops)
        finally:
            child.close()
        if reader is not None:
            reader.join(timeout=5.0)  # a grandchild may keep the pipe open
        return code


def start_child(
    argv: Sequence[str], environment: dict[str, str], output: Connection | None, *, threads: int | None, forks: bool
) -> Child:
    """Start `argv`, a script and its words: as a fork of the fork server, or as a fresh process."""
    if forks:
        try:
            return ForkedChild(argv, environment, output, threads)
        except (OSError, EOFError) as error:
            say(f"starting a fresh process instead of a fork: {error}", file=sys.stderr)
    pipes: dict[str, Any] = {}
    if output is not None:
        pipes = {"stdout": output.fileno(), "stderr": subprocess.STDOUT}
    with usr2_blocked():
        return FreshChild(processes.start([sys.executable, *argv], env=environment, **pipes))


@dataclass
class FreshChild:
    """A child process with an interpreter of its own."""

    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def send_signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def close(self) -> None:
        pass


def wait_for(child: Child, stops: Callable[[], bool]) -> int:
    """Wait for a child, and stop it when `stops` says so; its exit code as a shell gives it."""
    signalled: float | None = None
    while (code := child.poll()) is None:
        now = time.monotonic()
        if stops() and (signalled is None or now - signalled > AGAIN_SECONDS):
            first = signalled is None and _signals and _signals[0] != signal.SIGINT
            child.send_signal(_signals[0] if first else signal.SIGTERM)
            signalled = now
        time.sleep(POLL_SECONDS)
    return 128 - code if code < 0 else code


def outcome_of(code: int, run_dir: Path, *, stopped: bool, lines: Sequence[str]) -> Outcome:
    """How an attempt ended; a failure that the run could not record itself is recorded here."""
    if code == 0:
        return "stopped" if stopped and not read_summary(run_dir).get("finished") else "finished"
    by_signal = code - 128 if 128 < code < 160 else None
    if stopped and (by_signal is not None or code == 255):  # 255: the fork server was killed as well
        return "stopped"
    failure = Failure.read(run_dir)
    if failure is None:
        if by_signal is not None:
            failure = Failure("signal", None, f"ended by {_signal_name(by_signal)}", code)
        else:
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


def _wait_for_owner(run_dir: Path, stops: Callable[[], bool]) -> bool:
    """Wait until no process works in the job's folder: one of a sweep that was killed may still be saving."""
    said = False
    while owner := living_owner(run_dir):
        if stops():
            return False
        if not said:
            say(f"{run_dir.name}: waits for process {owner['pid']}, which is ending in its folder", flush=True)
            said = True
        time.sleep(WATCH_SECONDS)
    return True


def _pass_on(source: Connection, name: str, lines: collections.deque[str]) -> None:
    """Print the lines of a job with its name; of a progress bar, which rewrites its line, only the end."""
    with contextlib.suppress(OSError), os.fdopen(os.dup(source.fileno()), "rb") as stream:
        for raw in stream:
            text = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]
            if text.strip():
                lines.append(visible(text))
                say(f"[{name}] {text}", flush=True)


# --- signals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals(handled: Sequence[int] = STOPPING) -> Iterator[list[int]]:
    """Collect the signals that ask this process to stop; ignored ones stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield _signals
        return
    taken = [signum for signum in handled if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, lambda number, _: _signals.append(number)) for signum in taken}
    try:
        yield _signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def requeues(run_dir: Path, sweep: SweepRef) -> Iterator[None]:
    """Save before submitit requeues: its SIGUSR2 handler ends the process, here after the child has saved.

    SIGUSR2 announces the end of a job's time, or its preemption.
    """
    usr2 = getattr(signal, "SIGUSR2", None)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(usr2) if usr2 is not None and in_main_thread else None
    if not callable(previous):
        yield
        return
    announced: list[int] = []

    def save_first(signum: int, _: Any) -> None:
        announced.append(signum)
        _signals.append(signal.SIGTERM)

    signal.signal(usr2, save_first)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(usr2, previous)  # type: ignore[arg-type]
        if announced:
            write_attempt(run_dir, sweep, "requeued")
            previous(announced[0], None)  # ends this process; the launcher starts the job again


@contextlib.contextmanager
def usr2_blocked() -> Iterator[None]:
    """A child that is started here never sees SIGUSR2, which SLURM sends to all processes of a job."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _every(seconds: float, look: Callable[[], bool]) -> Callable[[], bool]:
    """`look`, asked at most once in `seconds`, and no more once it said yes."""
    last, answer = -seconds, False

    def asked() -> bool:
        nonlocal last, answer
        if not answer and time.monotonic() - last >= seconds:
            last, answer = time.monotonic(), look()
        return answer

    return asked
