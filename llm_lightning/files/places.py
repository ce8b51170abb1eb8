"""Where the files are that a run was made from: its data, its first weights, its reference.

A run keeps each place as it was typed, as it was found, and relative to the run folder. A project that was moved or
copied takes its files along, so that the last is looked at first; what counts is the digest of what is there.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")


def place_of(typed: str | Sequence[str], found: Iterable[str], run_dir: str | Path, digest: str) -> dict[str, Any]:
    """What a run keeps of one of its places, as plain values.

    Args:
        typed: the setting.
        found: the absolute paths that it meant.
        run_dir: the run folder.
        digest: of what was there.
    """
    words = list(found)
    return {
        "typed": typed if isinstance(typed, str) else list(typed),
        "found": words,
        "from_run": _relative(words, Path(run_dir)),
        "digest": digest,
    }


def candidates(place: Any, run_dir: Path | None) -> list[list[str]]:
    """Where to look for a recorded place, the likeliest first; nothing for what is no place."""
    place = place if isinstance(place, Mapping) else {}
    moved = _texts(place.get("from_run")) if run_dir is not None else []
    # As text: the folders on the way may be links, and `..` means the folder that is written before it.
    near = [os.path.normpath(Path(run_dir).absolute() / word) for word in moved]  # type: ignore[arg-type]
    return [words for words in (near, _texts(place.get("found"))) if words]


def existing(options: Iterable[Sequence[str]]) -> list[list[str]]:
    """Those of `options` of which every path, or folder of a glob, is there; each once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for words in options:
        if words and all(Path(word).expanduser().exists() or glob.has_magic(word) for word in words):
            found.setdefault(tuple(str(Path(word).expanduser().resolve()) for word in words), list(words))
    return list(found.values())


def run_dir_of(checkpoint: Path | None) -> Path | None:
    """The run folder that a checkpoint lies in; None if it lies elsewhere."""
    if checkpoint is None or checkpoint.absolute().parent.name != "checkpoints":
        return None
    return checkpoint.absolute().parents[1]


def parent_names(header: Mapping[str, Any], checkpoint: Path | None) -> list[str]:
    """Where the first weights of a checkpoint's run may be now, the likeliest first; a name as it is."""
    lineage = header.get("lineage", {})
    run_dir, place = run_dir_of(checkpoint), lineage.get("places", {}).get("init_from")
    return names_of_parent(lineage.get("parent_name"), place, run_dir)


def names_of_parent(name: str | None, place: Any, run_dir: Path | None) -> list[str]:
    """The same, of a lineage whose run folder is known."""
    names = [words[0] for words in existing(candidates(place, run_dir))]
    return list(dict.fromkeys([*names, *([name] if name else [])]))


def read_data_again(
    header: Mapping[str, Any],
    checkpoint: Path | None,
    build: Callable[[dict[str, Any]], Found],
    digest_of: Callable[[Found], str],
) -> Found:
    """The data that a checkpoint's own settings name, from where it is now.

    Args:
        header: of the checkpoint.
        checkpoint: its file, if it is one.
        build: reads what some settings of `data` name.
        digest_of: of what was built.

    Returns:
        what has the digest that the run wrote down; if nothing has, the first that could be read.

    Raises:
        ValueError, OSError: as `build` does, if nothing can be read.
    """
    settings, lineage = dict(header.get("config", {}).get("data") or {}), header.get("lineage", {})
    typed = settings.get("path")
    options = [settings]
    if typed is not None:
        place = lineage.get("places", {}).get("data.path")
        places = existing(candidates(place, run_dir_of(checkpoint)))
        options = [settings | {"path": as_setting(typed, words)} for words in places] or options
    found: list[Found] = []
    first_error: Exception | None = None
    for option in options:
        try:
            one = build(option)
            if digest_of(one) == lineage.get("data"):
                return one
        except (ValueError, OSError) as error:
            first_error = first_error or error
            continue
        found.append(one)
    if not found:
        assert first_error is not None
        raise first_error
    return found[0]


def as_setting(typed: Any, words: Sequence[str]) -> str | list[str]:
    """`words` as a setting of the kind of `typed`: one path stays one."""
    return words[0] if len(words) == 1 and isinstance(typed, str) else list(words)


def _relative(words: Iterable[str], run_dir: Path) -> list[str]:
    try:
        return [os.path.relpath(word, run_dir.absolute()) for word in words]
    except ValueError:  # another drive of Windows
        return []


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) and all(isinstance(word, str) for word in value) else []
