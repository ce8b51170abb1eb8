"""Several processes on one machine, started by us: a parent that watches its ranks, and says why they failed.

The typed process imports no torch. The first rank writes to its standard streams; what the others write to stderr is
shown if they are the cause. The parent's last line is the cause, its exit code that of the run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llm_lightning.experiments import failures, processes
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.causes import SUPERVISOR, Cause
from llm_lightning.experiments.sweep.stopping import stop_signals
from llm_lightning.signals import STOPPING
from llm_lightning.terminal import say, visible

RUN_DIR = "LLM_LIGHTNING_RUN_DIR"
"""Environment variable with the run folder of all ranks: each would draw another name."""
POLL_SECONDS = 0.1
SILENT_SECONDS = 10.0
"""Seconds until a stopped rank is lost, as `heartbeat.SILENT_SECONDS`."""
ASLEEP_SECONDS = 3.0
FELLOWS_SECONDS, TERM_SECONDS = 2.0, 1.5
"""Seconds for the other ranks to end by themselves after a failure, and then after SIGTERM."""
PASSED_ON_SECONDS, SAVED_SECONDS = 5.0, 600.0
"""Seconds after the stop of one rank until the others get SIGTERM, which one that is saving ignores, and until their
end: the first may be writing for long."""
MOST_BYTES, SHOWN_BYTES = 2**22, 2**14
"""Of a later rank's stderr: kept, and shown."""
_STOPPED = tuple(128 + signum for signum in STOPPING)


# --- in a rank -------------------------------------------------------------------------------------------------------


def take_place(full: Any) -> None:
    """In a rank that a supervisor started: work in the folder of all, with a log of its own.

    Args:
        full: the composed configuration with Hydra's own part, changed in place.
    """
    from omegaconf import open_dict

    if SUPERVISOR not in os.environ:
        return
    with open_dict(full):
        full.hydra.run.dir = os.environ[RUN_DIR].replace("${", "\\${")
        if causes.rank():
            full.hydra.job.name = f"{full.hydra.job.name}_rank_{causes.rank()}"


def refuse_other_size(size: int) -> None:
    """Refuse to train if Lightning's number of processes is not the one that was started."""
    if SUPERVISOR in os.environ and size != causes.size():
        raise ValueError(
            f"{causes.size()} processes were started, one for each visible GPU, but Lightning trains in {size}; set "
            "trainer.devices to a number"
        )


# --- the parent ------------------------------------------------------------------------------------------------------


def supervise_run(script: Path, argv: Sequence[str], ranks: int, full: Any) -> int:
    """Run `python SCRIPT ARGV` in all ranks of this machine; return the exit code of the run.

    Args:
        ranks: how many.
        full: the composed configuration with Hydra's own part.

    Raises:
        ValueError: if there are several nodes and no place to meet.
    """
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(full)  # the folder's name asks it for the chosen files
    nodes, run_dir = int(full.trainer.get("num_nodes") or 1), Path(full.hydra.run.dir)
    if nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"trainer.num_nodes={nodes}: set MASTER_ADDR and MASTER_PORT, the same on every node, and NODE_RANK"
        )
    return supervise([sys.executable, str(script), *argv], ranks, nodes=nodes, run_dir=run_dir)


def supervise(command: Sequence[str], ranks: int, *, run_dir: Path, nodes: int = 1) -> int:
    """Run `command` in all ranks of this machine; return the exit code of the run."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, stop_signals() as received:
        shared = _shared_variables(ranks, nodes, run_dir, folder)
        node = int(shared["NODE_RANK"])
        started = [_started(command, shared, node * ranks + local, local) for local in range(ranks)]
        watch = _Watch(started, Path(folder), received)
        try:
            watch.until_all_ended()
            return _concluded(watch, run_dir)
        finally:
            for rank in started:
                rank.close()


def _shared_variables(ranks: int, nodes: int, run_dir: Path, folder: str) -> dict[str, str]:
    """Environment variables of all ranks, by which Lightning sees that it need not start any."""
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": os.environ.get("GROUP_RANK", "0"),
        **environment,
        "LOCAL_WORLD_SIZE": str(ranks),
        "WORLD_SIZE": str(ranks * nodes),
        SUPERVISOR: f"{os.getpid()}:{folder}",
        RUN_DIR: str(run_dir.absolute()),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(eq=False)
class _Rank:
    """A rank that this process started."""

    number: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None
    """What it wrote to stderr; None: that is the terminal's."""
    ended: float | None = None
    """When it was seen to have ended, in seconds since 1970."""
    was_killed: bool = False
    """Whether this process ended it."""
    stopped_since: float | None = None

    @property
    def code(self) -> int:
        return self.process.returncode

    def is_alive(self) -> bool:
        if self.process.poll() is not None and self.ended is None:
            self.ended = time.time()
        return self.ended is None

    def close(self) -> None:
        if self.is_alive():  # this process fails itself
            self.kill()
        if self.errors is not None:
            self.errors.close()

    def kill(self) -> None:
        self.was_killed = True
        processes.kill_with_children(self.process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        self.process.wait()

    def written(self) -> str:
        """The last lines that it wrote to stderr."""
        if self.errors is None:
            return ""
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - SHOWN_BYTES))
        return visible(self.errors.read().decode("utf-8", errors="replace"))

    def shorten(self) -> None:
        """Forget what it wrote if that is long; its file is open for appending."""
        if self.errors is not None and os.fstat(self.errors.fileno()).st_size > MOST_BYTES:
            os.ftruncate(self.errors.fileno(), 0)


def _started(command: Sequence[str], shared: Mapping[str, str], number: int, local: int) -> _Rank:
    environment = {**shared, "LOCAL_RANK": str(local), "RANK": str(number)}
    errors = tempfile.TemporaryFile("a+b") if local else None  # noqa: SIM115 (closed with the rank)
    return _Rank(number, processes.start(command, env=environment, stderr=errors), errors)


class _Watch:
    """Waits for the end of all ranks, hands signals on, and ends those that a failed one has left."""

    def __init__(self, ranks: list[_Rank], folder: Path, received: list[int]) -> None:
        self.ranks, self.folder, self.received = ranks, folder, received
        self.silent: list[Cause] = []
        self.since = time.time()
        self._handed_on = 0
        self._interrupted: float | None = None
        self._failed: float | None = None
        self._saved: float | None = None
        self._has_passed_on = self._has_sent_term = False

    def until_all_ended(self) -> None:
        last = time.monotonic()
        while self._alive():
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - last > ASLEEP_SECONDS:  # ^Z, or a computer that slept: the ranks were stopped as well
                for rank in self.ranks:
                    rank.stopped_since = None
            last = now
            self._hand_on(now)
            self._look_for_stopped(now)
            self._look_for_ends(now)
            for rank in self.ranks:
                rank.shorten()

    def _alive(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.is_alive()]

    def _send(self, signum: int) -> None:
        for rank in self._alive():
            rank.process.send_signal(signum)

    def _hand_on(self, now: float) -> None:
        """Hand signals on; a Ctrl-C has reached the ranks already, unless it was sent to this process alone."""
        for signum in self.received[self._handed_on :]:
            self._handed_on += 1
            if signum == signal.SIGINT:
                self._interrupted = now
            else:
                self._send(signum)
        if self._interrupted is not None and now - self._interrupted > processes.KEYBOARD_SECONDS:
            self._interrupted = None
            self._send(signal.SIGTERM)  # ranks that are already saving ignore it

    def _look_for_stopped(self, now: float) -> None:
        for rank in self._alive():
            if not processes.is_stopped(rank.process.pid):
                rank.stopped_since = None
            elif rank.stopped_since is None:
                rank.stopped_since = now
            elif now - rank.stopped_since > SILENT_SECONDS:
                pid, host = rank.process.pid, platform.node()
                words = f"process {pid} on {host} has not answered for {SILENT_SECONDS:.0f} s"
                self.silent.append(Cause(rank.number, "silent", words, 137, pid=pid, host=host))
                rank.kill()

    def _look_for_ends(self, now: float) -> None:
        codes = [rank.code for rank in self.ranks if not rank.is_alive()]
        if any(code not in (0, *_STOPPED) for code in codes) or any(self.folder.glob("*.json")):
            self._failed = self._failed or now
        elif any(codes):
            self._saved = self._saved or now
            if now - self._saved > PASSED_ON_SECONDS and not self._has_passed_on:
                self._has_passed_on = True  # the signal came to one alone, before it had met the others
                self._send(signal.SIGTERM)
        if self._saved is not None and now - self._saved > SAVED_SECONDS:
            self._failed = self._failed or now
        if self._failed is None or now - self._failed < FELLOWS_SECONDS:
            return
        if not self._has_sent_term:
            self._has_sent_term = True
            for rank in self._alive():
                rank.was_killed = True
            self._send(signal.SIGTERM)
        elif now - self._failed > FELLOWS_SECONDS + TERM_SECONDS:
            for rank in self._alive():
                rank.kill()


# --- the end ---------------------------------------------------------------------------------------------------------


def _concluded(watch: _Watch, run_dir: Path) -> int:
    """Print the cause if the run failed, and return its exit code."""
    ranks = watch.ranks
    if not any(rank.code for rank in ranks):
        return 0
    told = dict(causes.read_for_supervisor(watch.folder))
    found = [*_real(told.values()), *watch.silent, *_deaths(ranks, told)]
    stopped = [rank.code for rank in ranks if rank.code in _STOPPED and not rank.was_killed]
    if watch.received or stopped:
        found = [cause for cause in found if cause.kind != "died"]
        if not found:
            return 128 + watch.received[0] if watch.received else stopped[0]
    found = sorted(found, key=lambda cause: cause.time) or [cause for cause in told.values() if cause.kind == "lost"]
    cause = found[0] if found else _unsaid(ranks)
    _show(cause, ranks, is_same=_is_same(told.values(), ranks))
    if cause.kind in ("died", "silent"):
        failures.record_cause(run_dir, cause.line, cause.exit_code, by_signal=True, since=watch.since)
        causes.write_text(run_dir, cause, len(ranks), watch.since)
    return cause.exit_code


def _real(told: Iterable[Cause]) -> Iterator[Cause]:
    """The causes that ranks found; of one that died, this process knows more."""
    return (cause for cause in told if cause.kind in ("raised", "silent", "stalled"))


def _deaths(ranks: Sequence[_Rank], told: Mapping[int, Cause]) -> Iterator[Cause]:
    """Ranks that ended by a signal of somebody else, or without a word."""
    for rank in ranks:
        if rank.was_killed or rank.number in told or rank.code in (0, *_STOPPED):
            continue
        pid, when = rank.process.pid, rank.ended or time.time()
        how = f"was ended by {_name(-rank.code)}" if rank.code < 0 else f"ended with exit code {rank.code}"
        code = 128 - rank.code if rank.code < 0 else rank.code
        yield Cause(rank.number, "died", f"process {pid} on {platform.node()} {how}", code, when, pid)


def _name(signum: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(signum).name
    return f"signal {signum}"


def _unsaid(ranks: Sequence[_Rank]) -> Cause:
    """The cause where every rank ended because of another one: on another machine."""
    rank = next(rank for rank in ranks if rank.code)
    return Cause(rank.number, "lost", "ended because a rank of another machine did; its own output says why", 1)


def _is_same(told: Iterable[Cause], ranks: Sequence[_Rank]) -> bool:
    """Whether all ranks raised the same."""
    raised = [cause.message for cause in told if cause.kind == "raised"]
    return len(raised) == len(ranks) and len(set(raised)) == 1


def _show(cause: Cause, ranks: Sequence[_Rank], *, is_same: bool) -> None:
    written = next((rank.written() for rank in ranks if rank.number == cause.rank and not is_same), "")
    if written.strip():
        say(f"--- stderr of rank {cause.rank} ---\n{written.rstrip()}", file=sys.stderr)
    if sys.stderr.isatty():  # a progress bar may have left the cursor in its line
        say(file=sys.stderr)
    say(f"error: {cause.message if is_same else cause.line}", file=sys.stderr, flush=True)
