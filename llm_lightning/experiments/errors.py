"""Exceptions as the command line shows them: one line on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments import failures, unforeseen
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.causes import Cause
from llm_lightning.experiments.ranks.launcher import is_main_process
from llm_lightning.experiments.run_folder import RunFolderInUseError, is_anothers
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.files.disk_errors import explain
from llm_lightning.signals import Stopped
from llm_lightning.slurm import not_requeued
from llm_lightning.terminal import one_line, say, visible

UNCAUGHT = 1
"""Python's exit code for an exception that nothing catches."""
USAGE_ERROR = 2
INTERRUPTED = 130
_ELSEWHERE = "choose another folder, with run_name or hydra.run.dir"
_AGAIN = "continue with resume=RUN_FOLDER; what was written before is intact"
_SAVE_MEMORY = (
    "out of memory: lower data.batch_size and raise trainer.accumulate_grad_batches by as much, "
    "set model.activation_checkpointing=true, or take a smaller model"
)


def run_guarded(action: Callable[[], Any]) -> None:
    """Call `action`; if it raises, print one line on stderr and exit."""
    code, _ = guarded(action)
    if code:
        sys.exit(code)


def guarded(action: Callable[[], Any], log_dir: Path | None = None, own: Sequence[str] = ()) -> tuple[int, Any]:
    """Call `action` and return (exit code, result); an exception becomes one line on stderr.

    Exceptions in the packages `own`, by default those of `allow_targets` on the command line, keep their traceback.
    It is recorded in the run folder `log_dir`, unless that is another process's.
    """
    since = time.time()
    try:
        return 0, action()
    except Stopped as stop:
        if is_main_process():
            say("; ".join(filter(None, [stop.message, not_requeued()])), file=sys.stderr)
        return 128 + stop.signum, None
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a KeyboardInterrupt before training into an exit with code 1.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        if is_main_process():
            say("interrupted", file=sys.stderr)
        return INTERRUPTED, None
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)  # callbacks.signals.Interrupted
        if exit_code is not None:
            if is_main_process():  # all processes of a run stop together, with the same message
                say(error, file=sys.stderr)
            return exit_code, None
        if log_dir is not None and _is_anothers(log_dir, error):
            log_dir = None
        if causes.is_consequence(error):
            return _give_way(error, log_dir), None
        code = _failed(error, log_dir, own or _allowed(), since)
        if code == UNCAUGHT:
            raise
        return code, None
    finally:
        causes.leave()


def _failed(error: Exception, log_dir: Path | None, own: Sequence[str], since: float) -> int:
    """Report an exception of this process where it is read; return the exit code, UNCAUGHT if it is yet to be shown."""
    cause = cause_of(error, log_dir, own)
    if log_dir is not None:
        _record(error, log_dir, cause.exit_code, since)
    is_told = causes.announce(cause, log_dir)  # then the supervisor prints the line
    if cause.exit_code == UNCAUGHT:
        return UNCAUGHT
    prefix = "error: " if causes.size() == 1 else f"error: rank {cause.rank}: "
    if cause.exit_code == USAGE_ERROR:
        is_own = unforeseen.passes_through(error, own)
        _report(error, log_dir, None if is_told else prefix + cause.message, is_own=is_own)
        return USAGE_ERROR
    if is_told:
        unforeseen.write(error, _traceback_file(log_dir))
        return unforeseen.EXIT_CODE
    return unforeseen.report(error, prefix=prefix, file=_traceback_file(log_dir))


def cause_of(error: Exception, log_dir: Path | None, own: Sequence[str]) -> Cause:
    """The cause that an exception of this process is: its line, and the exit code.

    Args:
        own: packages of the user.
    """
    is_own = unforeseen.passes_through(error, own)
    is_foreseen = isinstance(error, (ValueError, OSError)) or (unforeseen.is_out_of_memory(error) and not is_own)
    if is_foreseen:
        return causes.raised(_message(error), USAGE_ERROR)
    if is_own:
        return causes.raised(f"{type(error).__name__}: {error}", UNCAUGHT)
    written = f"the traceback is in {_traceback_file(log_dir)}"
    return causes.raised(unforeseen.described(error, written), unforeseen.EXIT_CODE)


def _traceback_file(log_dir: Path | None) -> Path:
    return log_dir / unforeseen.TRACEBACK if log_dir is not None else unforeseen.cache_file("train")


def _give_way(error: Exception, log_dir: Path | None) -> int:
    """End because another rank has; say nothing unless no cause is known."""
    cause = causes.real_cause()
    if cause is not None:
        causes.as_fellow(cause)
        return causes.FELLOW_FAILED
    lost = Cause(causes.rank(), "lost", f"lost the connection to other ranks: {one_line(error)}", causes.FELLOW_FAILED)
    if not causes.announce(lost, log_dir):
        _report(error, log_dir, f"error: {lost.line}")
    return causes.FELLOW_FAILED


def _allowed() -> list[str]:
    """Packages that `allow_targets` on the command line names."""
    values = [word.partition("=")[2] for word in sys.argv[1:] if key_of(word) == "allow_targets"]
    return [name for value in values for name in re.findall(r"[\w.]+", value)]


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Print a thread's exception, except an OSError: TensorBoard raises that again in the main thread."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


@contextlib.contextmanager
def recording(run_dir: Path) -> Iterator[None]:
    """Record an exception of the block in the run folder, and let it pass."""
    since = time.time()
    try:
        yield
    except Exception as error:
        if not hasattr(error, "exit_code") and not _is_anothers(run_dir, error):
            _record(error, run_dir, None, since)
        raise


def _is_anothers(run_dir: Path, error: Exception) -> bool:
    if isinstance(error, RunFolderInUseError):
        return True
    return not causes.works_in(run_dir) and is_anothers(run_dir)


def _record(error: Exception, run_dir: Path, exit_code: int | None, since: float) -> None:
    is_os = isinstance(error, OSError)
    kind: failures.Kind = "memory" if unforeseen.is_out_of_memory(error) else "os" if is_os else "error"
    message = one_line(_message(error), failures.SHOWN) or "no message"
    failures.record(run_dir, kind=kind, error=error, message=message, exit_code=exit_code, since=since)


def _report(error: BaseException, log_dir: Path | None, line: str | None, *, is_own: bool = False) -> None:
    """Write or show the traceback, and print the line."""
    if isinstance(error, BrokenPipeError):
        unforeseen.stop_writing()
    if is_own or os.environ.get(unforeseen.SHOW_TRACEBACK):
        say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    elif log_dir is not None:
        with contextlib.suppress(OSError):  # the disk may be the cause
            text = visible("".join(traceback.format_exception(error)))
            (log_dir / unforeseen.TRACEBACK).write_text(text, "utf-8")
    if line is not None:
        say(line, file=sys.stderr)


def _message(error: BaseException) -> str:
    if unforeseen.is_out_of_memory(error):
        return "; ".join(filter(None, [str(error), _SAVE_MEMORY]))
    return explain(error, elsewhere=_ELSEWHERE, again=_AGAIN) if isinstance(error, OSError) else str(error)
