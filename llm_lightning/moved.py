"""Where a file lies now that was named by an absolute path, when the folder around it was moved, renamed or copied."""

from __future__ import annotations

from pathlib import Path


def moved_with(name: str | Path, witness: Path) -> list[Path]:
    """Places where `name` would be if it had been moved together with `witness`, the likeliest first.

    They end like `name` (the longer the common end, the likelier) and begin with a folder around `witness`. Only what
    exists is listed; whether it is the same is for the caller to find out, by its digest.
    """
    path = Path(name)
    if not path.is_absolute():
        return []
    ends = [Path(*path.parts[start:]) for start in range(1, len(path.parts))]
    places = (folder / end for end in ends for folder in witness.absolute().parents)
    return list(dict.fromkeys(place for place in places if place != path and place.exists()))
