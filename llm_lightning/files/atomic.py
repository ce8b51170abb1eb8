"""Small files written all or nothing. Standard library only: entry points import it before anything heavy."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError of the block name `path`: a failed write does not say of which file.

    An error without an errno has words of its own and is left alone.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file at `path`: whenever the process dies, the old content or the new one stands there, whole.

    The temporary file stands beside the target, so the rename never crosses file systems, and is named
    `.NAME.PID.tmp`, so the next owner of the folder can tell a stray one and sweep it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        with naming(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != "nt":  # a folder cannot be opened there
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_figure(path: str | Path, figure: Figure) -> None:
    """Write a picture in the format of the file's suffix, PNG without one."""
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png", dpi=120)
    write_atomically(path, image.getvalue())
