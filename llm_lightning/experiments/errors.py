"""Exceptions as the command line shows them: one line on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments import unforeseen
from llm_lightning.experiments.run_folder import is_main_process
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.files.disk_errors import explain
from llm_lightning.terminal import one_line, say, visible

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
    """
    try:
        return 0, action()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a KeyboardInterrupt before training into an exit with code 1.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        say("interrupted", file=sys.stderr)
        return INTERRUPTED, None
    except (ValueError, OSError) as error:
        _report(error, log_dir, is_own=unforeseen.passes_through(error, own or _allowed()))
        return USAGE_ERROR, None
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)  # callbacks.checkpoints.Interrupted
        if exit_code is not None:
            if is_main_process():  # all processes of a run stop together, with the same message
                say(error, file=sys.stderr)
            return exit_code, None
        if unforeseen.passes_through(error, own or _allowed()):
            raise
        if unforeseen.is_out_of_memory(error):
            _report(MemoryError(f"{error}; {_SAVE_MEMORY}").with_traceback(error.__traceback__), log_dir)
            return USAGE_ERROR, None
        file = log_dir / unforeseen.TRACEBACK if log_dir is not None else unforeseen.cache_file("train")
        return unforeseen.report(error, prefix="error: ", file=file), None


def _allowed() -> list[str]:
    """Packages that `allow_targets` on the command line names."""
    values = [word.partition("=")[2] for word in sys.argv[1:] if key_of(word) == "allow_targets"]
    return [name for value in values for name in re.findall(r"[\w.]+", value)]


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Print a thread's exception, except an OSError: TensorBoard raises that again in the main thread."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _report(error: BaseException, log_dir: Path | None, *, is_own: bool = False) -> None:
    if isinstance(error, BrokenPipeError):
        unforeseen.stop_writing()
    if is_own or os.environ.get(unforeseen.SHOW_TRACEBACK):
        say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    elif log_dir is not None:
        with contextlib.suppress(OSError):  # the disk may be the cause
            text = visible("".join(traceback.format_exception(error)))
            (log_dir / unforeseen.TRACEBACK).write_text(text, "utf-8")
    say(f"error: {one_line(_message(error))}", file=sys.stderr)


def _message(error: BaseException) -> str:
    return explain(error, elsewhere=_ELSEWHERE, again=_AGAIN) if isinstance(error, OSError) else str(error)
