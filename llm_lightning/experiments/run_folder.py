"""The run folder: which process owns it, and whether its run is new, can continue, or is finished.

One process owns a run folder at a time. It holds an OS lock on `.lock`, which the system releases whenever the process
ends, and names itself in `owner.json`. Imports neither torch nor lightning, so that refusals are immediate.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from llm_lightning.experiments.ranks.launcher import is_main_process, launched
from llm_lightning.experiments.run_records import Facts, read_facts, read_summary, refuse_links
from llm_lightning.files.atomic import write_atomically

if TYPE_CHECKING:
    from llm_lightning.weights.checkpoint import Opened

CONFIG, CONFIG_JSON = "config.yaml", "config.json"
"""The settings of a run, every value resolved: for people, and for programs that read thousands."""
OWNER = "owner.json"
State = Literal["fresh", "resumable", "finished"]

# Data loading workers inherit the lock and outlive a killed owner by a few seconds.
WORKERS_DIE_SECONDS = 15.0
# Some network file systems do not share locks between hosts, and another host's processes cannot be looked up. A run
# that writes nothing for this long counts as dead.
SILENT_SECONDS = 600.0
OWNER_FACTS: Facts = {"pid": int, "host": str, "process_start": (str, type(None)), "started": str}


class RunFolderInUseError(ValueError):
    """The run folder belongs to a living process."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process may write to."""

    path: Path
    opened: Opened | None
    """The newest valid checkpoint when the folder was opened."""
    previous_summary: dict[str, Any]
    """`summary.json` of an earlier session, empty if there is none."""
    began: bool = False
    """Whether an earlier session wrote its settings here."""

    @property
    def checkpoint(self) -> Path | None:
        """The file that the run continues from."""
        return self.opened.path if self.opened else None

    @property
    def header(self) -> dict[str, Any]:
        """The header of that file; empty if there is none."""
        return self.opened.header if self.opened else {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def state(self, total_steps: int | None = None) -> State:
        """The state of the run; a finished run is no longer finished if `total_steps` exceeds its plan."""
        finished = self.previous_summary.get("finished", False)
        # Compared with the planned steps, not those reached: a run that stopped early is finished too.
        if finished and (total_steps is None or total_steps <= self.previous_summary["total_steps"]):
            return "finished"
        return "resumable" if self.checkpoint else "fresh"

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the settings, every value resolved."""
        import yaml

        write_atomically(self.path / CONFIG_JSON, json.dumps(config, default=str) + "\n")
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the first is ten times faster, where it is built
        text = yaml.dump(config, Dumper=dumper, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / CONFIG, text)


@contextlib.contextmanager
def open_run(run_dir: str | Path, config: dict[str, Any]) -> Iterator[RunFolder]:
    """Own the run folder at `run_dir`, creating it if needed, until the block ends.

    `config` is written if there is no checkpoint yet. Otherwise the caller first checks that the run may continue with
    `config`, and then calls `write_config`.

    Raises:
        RunFolderInUseError: if a living process owns it; names the process.
        CheckpointError: if it holds checkpoints and none is valid.
        ValueError: if it holds links, or a damaged `owner.json` or `summary.json`.
        OSError: if it cannot be created.
    """
    path = Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    refuse_links(path)
    main = is_main_process()
    with owned(path) if main else contextlib.nullcontext():
        began = (path / CONFIG).is_file()
        run = RunFolder(path, _newest_checkpoint(path), read_summary(path), began)
        if run.checkpoint is None and main:
            run.write_config(config)
        yield run


@contextlib.contextmanager
def leaving_nothing(path: Path) -> Iterator[None]:
    """Leave a run folder unchanged: log nothing there, and remove it if it is empty."""
    root = logging.getLogger()
    files = [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]
    own = [handler for handler in files if path.absolute() in Path(handler.baseFilename).parents]
    for handler in own:
        root.removeHandler(handler)
    try:
        yield
    finally:
        for handler in own:
            root.addHandler(handler)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextlib.contextmanager
def owned(path: Path, what: str = "run") -> Iterator[None]:
    """Own a folder, creating it if needed, until the block ends.

    Args:
        what: "run" or "sweep", for the message.

    Raises:
        RunFolderInUseError: if a living process owns it; names the process.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock, owner_file = FileLock(path / ".lock"), path / OWNER
    _acquire(lock, path, what)
    try:
        _refuse_if_alive(path, what)
        write_atomically(owner_file, json.dumps(_this_process(), indent=2) + "\n")
        try:
            _sweep(path)
            yield
        finally:
            owner_file.unlink(missing_ok=True)
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path, what: str) -> None:
    """Take the OS lock, waiting only for a dead owner's leftover workers."""
    deadline = time.monotonic() + WORKERS_DIE_SECONDS
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            owner = read_owner(path)
            if is_alive(owner) or time.monotonic() > deadline:
                raise RunFolderInUseError(_in_use(path, owner, what)) from None
        time.sleep(0.05)


def _refuse_if_alive(path: Path, what: str) -> None:
    """Refuse if the owner is alive although the lock was free: the file system may not share locks between hosts."""
    owner = read_owner(path)
    if is_alive(owner):
        raise RunFolderInUseError(_in_use(path, owner, what))
    if owner and owner["host"] != platform.node() and not _is_of_earlier_attempt(owner):
        silent = silent_seconds(path)
        if silent < SILENT_SECONDS:
            remedy = f"it wrote there {silent:.0f} seconds ago. If that process is dead, delete {path / 'owner.json'}"
            raise RunFolderInUseError(f"{_in_use(path, owner, what)}; {remedy}")


def _is_of_earlier_attempt(owner: dict[str, Any]) -> bool:
    """Whether the launcher has ended the owner, on a node that may be gone, before it started this process."""
    mine, its = _launch(), owner.get("launch")
    if mine is None or not isinstance(its, dict) or its.get("id") != mine["id"]:
        return False
    # The agents of torchrun count their own restarts, and start no process before all earlier ones have ended.
    is_earlier = isinstance(its.get("attempt"), int) and its["attempt"] < mine["attempt"]
    return is_earlier or launched().by == "torchrun"


def silent_seconds(path: Path) -> float:
    """Seconds since the owner last wrote to a folder."""
    written = [path / OWNER, path / "metrics.csv", *(path / "checkpoints").glob("*")]
    return time.time() - max(map(changed, written))


def changed(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_anothers(path: Path) -> bool:
    """Whether a process that is not of this session works in the folder, or may do so."""
    try:
        owner = read_owner(path)
    except (ValueError, OSError):
        return True
    if not owner or owner["pid"] == os.getpid():
        return False
    if not is_main_process() and owner.get("launch") == _launch() is not None:
        return False
    if owner["host"] != platform.node():
        return silent_seconds(path) < SILENT_SECONDS
    if not is_alive(owner):
        return False
    # Lightning's later ranks are children of the first; torchrun's are its siblings.
    return is_main_process() or os.getppid() not in (owner["pid"], _parent(owner["pid"]))


def _sweep(path: Path) -> None:
    """Remove temporary files of an owner that was killed while it wrote."""
    for name in (".", "checkpoints", "plots", "tensorboard"):
        for stray in (path / name).glob(".*.tmp"):
            stray.unlink(missing_ok=True)


def _newest_checkpoint(path: Path) -> Opened | None:
    if not (path / "checkpoints").is_dir():
        return None
    from llm_lightning.weights.checkpoint import open_newest

    return open_newest(path / "checkpoints")


def living_owner(path: Path) -> dict[str, Any]:
    """`owner.json` of the process of this host that works in a run folder; empty if there is none."""
    owner = read_owner(path)
    return owner if is_alive(owner) else {}


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "process_start": process_start(os.getpid()),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "launch": _launch(),
    }


def _launch() -> dict[str, Any] | None:
    """What all processes of one attempt of a launcher share; None if it gives the run no id."""
    here = launched()
    return {"id": here.id, "attempt": here.attempt} if here.id is not None else None


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that `owner.json` names lives on this host."""
    if not owner or owner["host"] != platform.node() or owner["process_start"] is None:
        return False  # or unknown: then the lock decides
    return process_start(owner["pid"]) == owner["process_start"]


def process_start(pid: int) -> str | None:
    """When a living process started, as the system writes it; with the pid, it identifies the process uniquely.

    None if there is no such process, and always on Windows.
    """
    if Path("/proc/self/stat").exists():
        fields = _stat(pid)
        return None if not fields or fields[0] in "ZX" else fields[19]  # man 5 proc_pid_stat: state, starttime
    if os.name == "nt":
        return None
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    return shown.stdout.strip() or None


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _in_use(path: Path, owner: dict[str, Any], what: str) -> str:
    who = f"process {owner['pid']} on {owner['host']} (since {owner['started']})" if owner else "another process"
    return f"{what} folder {path} is in use by {who}; wait for it to end, stop it, or choose another run_name"


def read_owner(path: Path) -> dict[str, Any]:
    """`owner.json` of a run folder; empty if there is none. Raises ValueError if it is damaged."""
    return read_facts(path / OWNER, OWNER_FACTS, "make sure that no process works in the folder, and delete it")
