"""Error messages for a full disk and for files that may not be written."""

from __future__ import annotations

import errno
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def explain(error: OSError, *, elsewhere: str, again: str) -> str:
    """The message of an error; the system's own errors name no remedy, so one is added.

    Args:
        elsewhere: how to choose another place for files outside the cache.
        again: what to do once there is room.
    """
    if error.errno not in (*_FULL, *_REFUSED):  # our own errors have no errno
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
