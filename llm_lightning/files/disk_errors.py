"""What a user reads when the disk is full, or a file may not be written."""

from __future__ import annotations

import errno
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def explain(error: OSError, *, elsewhere: str, again: str) -> str:
    """The words of an error; one of the system's own, which names no remedy, is given one.

    Args:
        elsewhere: how another place is chosen for files that are not those of the cache.
        again: what to do when there is room.
    """
    if error.errno not in (*_FULL, *_REFUSED):  # ours have no errno
        return str(error)
    if _is_in_cache(error.filename):
        there = "make room there" if error.errno in _FULL else "make it accessible"
        remedy = f"{there}, or set LLM_LIGHTNING_CACHE to another folder"
    elif error.errno in _FULL:
        remedy = f"make room and {again}"
    else:
        remedy = f"make it accessible, or {elsewhere}" if error.errno == errno.EACCES else elsewhere
    return f"{error.filename or 'cannot write'}: {error.strerror}; {remedy}"


def _is_in_cache(name: object) -> bool:
    from llm_lightning.files.atomic import cache_dir

    return isinstance(name, str) and Path(name).absolute().is_relative_to(cache_dir().absolute())
