"""`failure.json` in a run folder: why the last session of the run failed. Imports nothing heavy.

It is written when a session fails, and removed when a later one begins to train or finds the run finished. A run that
was stopped and saved has not failed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from llm_lightning.experiments.ranks.launcher import is_main_process
from llm_lightning.experiments.run_folder import CONFIG_JSON, OWNER, changed
from llm_lightning.experiments.run_records import Facts, read_facts
from llm_lightning.files.atomic import write_atomically

FAILURE = "failure.json"
KINDS = ("error", "os", "memory", "signal", "lost")
Kind = Literal["error", "os", "memory", "signal", "lost"]
"""`error`: a ValueError, or any exception that is none of the others. `os`: an OSError. `memory`: out of memory.
`signal`: a signal ended the process. `lost`: nobody saw its end."""
SHOWN = 2000
"""Maximum number of characters of a message."""
FAILURE_FACTS: Facts = {"kind": str, "exception": (str, type(None)), "message": str, "exit_code": (int, type(None)),
                        "ended": str, "lines": list}  # fmt: skip


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass(frozen=True)
class Failure:
    """Why a session of a run failed."""

    kind: Kind
    exception: str | None
    """The name of its class; None if no exception was seen."""
    message: str
    """One line."""
    exit_code: int | None
    ended: str = field(default_factory=_now)
    """ISO 8601, with the zone."""
    lines: Sequence[str] = ()
    """The last lines of output, where no exception was seen."""
    began: bool = True
    """Whether the session had begun to train; if not, a finished run is still finished."""

    @property
    def repeats(self) -> bool:
        """Whether the same command may succeed the next time: the cause was outside the run."""
        return self.kind != "error"

    def write(self, folder: Path) -> None:
        """Replace `failure.json`; the disk may be full, and that must not hide the failure itself."""
        with contextlib.suppress(OSError):
            write_atomically(folder / FAILURE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Failure | None:
        """The failure of the last session; None if it did not fail. Raises ValueError if the file is damaged."""
        facts = read_facts(folder / FAILURE, FAILURE_FACTS, "delete it")
        if not facts:
            return None
        if facts["kind"] not in KINDS:
            raise ValueError(f"{folder / FAILURE} is damaged ('kind' must be one of {', '.join(KINDS)}); delete it")
        known = {name: facts[name] for name in cls.__dataclass_fields__ if name in facts}
        return cls(**known | {"lines": tuple(map(str, facts["lines"])), "began": bool(facts.get("began", True))})


def record(folder: Path, *, kind: Kind, error: Exception, message: str, exit_code: int | None, since: float) -> None:
    """Write `failure.json` for an exception that ended this session, which started at the time `since`.

    Of several ranks, the first that fails is recorded. The folder must not be another process's.
    """
    since = since if is_main_process() else changed(folder / OWNER)  # a rank may start long after the session
    if changed(folder / FAILURE) > since:
        return
    began = changed(folder / CONFIG_JSON) > since
    Failure(kind, type(error).__name__, message, exit_code, began=began).write(folder)


def record_cause(
    folder: Path, message: str, exit_code: int, *, by_signal: bool = False, since: float | None = None
) -> None:
    """Write `failure.json` for an end without an exception, unless this session has one.

    Args:
        since: when the session started; None: as the folder says, while a process of the session lives.
    """
    since = changed(folder / OWNER) if since is None else since
    if changed(folder / FAILURE) <= since:
        kind: Kind = "signal" if by_signal else "error"
        began = changed(folder / CONFIG_JSON) > since
        Failure(kind, None, message, exit_code, began=began).write(folder)


def forget(folder: Path) -> None:
    """Remove the failure of an earlier session."""
    (folder / FAILURE).unlink(missing_ok=True)
