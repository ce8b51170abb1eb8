"""The last handler of every command: an unforeseen exception gives one line, and its traceback goes to a file.

Foreseen errors are ValueErrors and OSErrors. Any other exception is a fault of this program, and its line says where.
Code that `allow_targets` admits is the user's: its exceptions keep their traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from llm_lightning.files.atomic import write_atomically
from llm_lightning.terminal import one_line, say, visible

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h; no other error exits with it."""
SHOW_TRACEBACK = "LLM_LIGHTNING_TRACEBACK"
TRACEBACK = "traceback.txt"
"""File in the run folder."""

_PACKAGE = Path(__file__).parents[1]
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


def report(error: BaseException, *, prefix: str, file: Path) -> int:
    """Print one line on an unforeseen exception, write its traceback to `file`, and return the exit code.

    Args:
        prefix: the beginning of the line.
        file: overwritten; commands without a run folder use `cache_file`.
    """
    say(f"{prefix}{described(error, write(error, file))} ({SHOW_TRACEBACK}=1 shows it)", file=sys.stderr)
    return EXIT_CODE


def write(error: BaseException, file: Path) -> str:
    """Write the traceback to `file`, and show it if the user wants that; return where it is."""
    if os.environ.get(SHOW_TRACEBACK):
        say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    with contextlib.suppress(OSError):  # the disk may be the cause
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, visible("".join(traceback.format_exception(error))))
        return f"the traceback is in {file}"
    return f"the traceback could not be written to {file}"


def described(error: BaseException, written: str) -> str:
    """One line: what happened, at which place of this package, and `written`."""
    words = one_line(error) or "no message"
    return f"unforeseen {type(error).__name__} at {_place(error)}: {words}; a fault of llm-lightning: {written}"


def cache_file(command: str) -> Path:
    """The traceback file of a command without a run folder; the command's next failure replaces it."""
    from llm_lightning.files.download import cache_dir  # late: help must be instant

    return cache_dir() / "tracebacks" / f"{command}.txt"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the device's memory was too small, which is no fault of the program."""
    return type(error).__name__ in _OUT_OF_MEMORY or "DefaultCPUAllocator: can't allocate" in str(error)


def passes_through(error: BaseException, packages: Sequence[str]) -> bool:
    """Whether the traceback of `error`, or of one of its causes, contains code of `packages`."""
    names = (str(frame.f_globals.get("__name__")) for one in chain(error) for frame, _ in _frames(one))
    return any(f"{name}.".startswith(f"{package}.") for name in names for package in packages)


def stop_writing() -> None:
    """Discard further standard output, whose reader has gone: `--help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def chain(error: BaseException) -> Sequence[BaseException]:
    """An exception and its causes, the first one last."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return seen


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


def _place(error: BaseException) -> str:
    """`FILE:LINE` of the innermost frame of this package, else of the innermost frame."""
    frames = [(Path(frame.f_code.co_filename), line) for frame, line in _frames(error)]
    ours = [(file.relative_to(_PACKAGE.parent), line) for file, line in frames if file.is_relative_to(_PACKAGE)]
    file, line = (ours or frames or [(Path("?"), 0)])[-1]
    return f"{file}:{line}"
