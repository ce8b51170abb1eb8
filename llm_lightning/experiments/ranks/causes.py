"""Why a rank of a run ended: told to whoever prints it, and not to be mistaken for what it causes in the others.

Our supervisor reads the causes of its ranks from files, torchrun's agent from `TORCHELASTIC_ERROR_FILE`. Under any
other launcher the rank prints its cause itself. `error.txt` of the run folder has it in every case. Imports nothing
heavy.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from llm_lightning.experiments.ranks.launcher import launched
from llm_lightning.experiments.run_folder import OWNER, changed
from llm_lightning.experiments.unforeseen import chain
from llm_lightning.files.atomic import write_atomically
from llm_lightning.terminal import one_line

SUPERVISOR = "LLM_LIGHTNING_SUPERVISOR"
"""Environment variable of a rank that our supervisor started: its pid, a colon, and the folder of the causes."""
ELASTIC = "TORCHELASTIC_ERROR_FILE"
ERROR_TEXT = "error.txt"
"""File in the run folder: the cause, with its rank and time."""
FELLOW_FAILED = 1
"""Exit code of a rank that ends because another has failed."""
CAUSE_COMES_SECONDS = 4.0
"""Seconds that a rank which lost another waits for the cause."""

Kind = Literal["raised", "silent", "stalled", "died", "lost", "fellow"]
"""`raised`: an exception. `silent`: another rank found this one not to answer. `stalled`: no progress. `died`: the
process ended without a word. `lost`: the connection to other ranks broke. `fellow`: ended because another failed."""

_OF_ANOTHERS_END = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "socket closed",
    "remote process exited", "communicator was aborted", "ncclremoteerror", "ncclsystemerror", "read error",
    "write error", "timed out waiting", "wait timeout", "failed to recv", "sendbytes failed", "recvvalue failed",
    "connectfullmesh failed", "socket timeout", "application timeout caused pair closure",
)  # fmt: skip
"""What gloo, NCCL and torch's store say when another process has gone, in lower case."""


@dataclass(frozen=True)
class Cause:
    """Why a run ends."""

    rank: int
    """The rank that caused it."""
    kind: Kind
    message: str
    """One line."""
    exit_code: int
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=platform.node)

    @property
    def line(self) -> str:
        return f"rank {self.rank}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Group:
    """What this process knows of the ranks of its run."""

    def __init__(self) -> None:
        self.rank: int | None = None
        self.size: int | None = None
        self.run_dir: Path | None = None
        self.tell: Callable[[Cause], None] | None = None
        self.leave: Callable[[], None] | None = None
        self.announced: Cause | None = None
        self.heard: Cause | None = None
        self.has_heard = threading.Event()


_group = _Group()


def rank() -> int:
    """The number of this process in its run; before the ranks have met, what its launcher says."""
    return launched().rank if _group.rank is None else _group.rank


def size() -> int:
    """The number of processes of the run; before the ranks have met, what the launcher says."""
    return _group.size or launched().processes or 1


def begin() -> None:
    """Forget what an earlier run of this process knew."""
    global _group
    _group = _Group()


def join(rank: int, size: int, run_dir: Path) -> None:
    """Note that the ranks of a run have met: which this one is, and where it works."""
    begin()
    _group.rank, _group.size, _group.run_dir = rank, size, run_dir


def connect(tell: Callable[[Cause], None], leave: Callable[[], None]) -> None:
    """Note how this rank tells the others a cause, and that it ends as it should."""
    _group.tell, _group.leave = tell, leave


def leave() -> None:
    """Tell the other ranks that this one ends, whatever it had to tell before."""
    if _group.leave is not None:
        _group.leave()


def works_in(run_dir: Path) -> bool:
    """Whether this process is a rank of the run in the folder, as all ranks have agreed."""
    return _group.run_dir is not None and _group.run_dir.absolute() == run_dir.absolute()


def raised(message: str, exit_code: int) -> Cause:
    """The cause that is an exception of this process."""
    return Cause(rank(), "raised", one_line(message), exit_code)


# --- telling ---------------------------------------------------------------------------------------------------------


def announce(cause: Cause, folder: Path | None = None) -> bool:
    """Tell the launcher, the other ranks and the run folder why the run ends; nothing in a run of one process.

    Of several causes that this process finds, the first counts.

    Returns:
        whether a supervisor prints it.
    """
    if size() == 1:
        return False
    if _group.announced is None:
        _group.announced = cause
        if _group.tell is not None:
            _group.tell(cause)
        if folder is not None and cause.kind not in ("lost", "fellow"):
            write_text(folder, cause)
        write_elastic(os.environ.get(ELASTIC), cause)
        _write_for_supervisor(cause)
    return is_supervised()


def is_supervised() -> bool:
    """Whether our supervisor started this process, and lives."""
    return _supervisors_folder() is not None


def write_text(folder: Path, cause: Cause, ranks: int | None = None, since: float | None = None) -> None:
    """Write `error.txt` of a run folder, unless this session of the run has one already.

    Args:
        ranks: how many the run has; None: as this process knows.
        since: when the session started; None: as the folder says, while a process of the session lives.
    """
    path = folder / ERROR_TEXT
    when = datetime.fromtimestamp(cause.time).astimezone().isoformat(timespec="seconds")
    where = f"rank {cause.rank} of {ranks or size()} (process {cause.pid} on {cause.host})"
    with contextlib.suppress(OSError):  # the disk may be the cause
        if changed(path) <= (changed(folder / OWNER) if since is None else since):
            write_atomically(path, f"{when} {where}: {cause.message}\n")


def forget(folder: Path) -> None:
    """Remove the cause of an earlier session."""
    (folder / ERROR_TEXT).unlink(missing_ok=True)


def write_elastic(file: str | None, cause: Cause) -> None:
    """Write the file from which torchrun's agent takes its Root Cause, as torch's `errors.record` does.

    The agent shows `py_callstack`, and takes the earliest time, in whole seconds: what follows from it comes later.
    """
    if not file or Path(file).exists():
        return
    own = cause.rank == rank() and cause.kind != "lost"
    facts = {"py_callstack": cause.line, "timestamp": str(int(cause.time) + (not own))}
    with contextlib.suppress(OSError):
        write_atomically(Path(file), json.dumps({"message": {"message": cause.line, "extraInfo": facts}}))


def _write_for_supervisor(cause: Cause) -> None:
    folder = _supervisors_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            write_atomically(folder / f"{rank()}.json", json.dumps(cause.as_dict()))


def _supervisors_folder() -> Path | None:
    """Where the supervisor looks for causes; None if there is none, or none any more."""
    pid, _, folder = os.environ.get(SUPERVISOR, "").partition(":")
    return Path(folder) if pid.isdigit() and int(pid) == os.getppid() and Path(folder).is_dir() else None


def read_for_supervisor(folder: Path) -> Iterator[tuple[int, Cause]]:
    """(rank that told it, cause) of every cause that ranks have told."""
    for path in sorted(folder.glob("*.json")):
        yield int(path.stem), Cause(**json.loads(path.read_text("utf-8")))


# --- what follows from another's end ---------------------------------------------------------------------------------


def is_consequence(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank has gone."""
    first = chain(error)[-1]
    words = str(first).lower()
    return size() > 1 and isinstance(first, RuntimeError) and any(part in words for part in _OF_ANOTHERS_END)


def hear(cause: Cause) -> None:
    """Note a cause that another rank has told; the first one counts."""
    if _group.heard is None:
        _group.heard = cause
        _group.has_heard.set()


def real_cause() -> Cause | None:
    """Wait for the cause of another rank's end; None if none comes."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher, which ends this rank as well
    _group.has_heard.wait(CAUSE_COMES_SECONDS)
    return _group.heard


def as_fellow(cause: Cause) -> None:
    """Tell the launcher that this rank ends because of another's cause."""
    write_elastic(os.environ.get(ELASTIC), cause)
    if _group.announced is None:
        _write_for_supervisor(Cause(rank(), "fellow", cause.line, FELLOW_FAILED))


def end_at_once(code: int) -> None:
    """End this process, whatever its main thread is doing, and the processes that load its data."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
