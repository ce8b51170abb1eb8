"""The known name nearest to a wrong one, for messages. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`; None if the likeness (0 to 1) of all is below `cutoff`."""
    return next(iter(difflib.get_close_matches(str(name), list(known), 1, cutoff)), None)


def did_you_mean(name: object, known: Iterable[str], shown: str = "{}") -> str:
    """`did you mean NAME? `, or nothing if no known name is near; `shown` puts NAME between quotes or braces."""
    near = nearest(name, known)
    return f"did you mean {shown.format(near)}? " if near is not None else ""
