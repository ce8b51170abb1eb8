"""Paths of a run's inputs: its data, its initial weights, its reference.

A run records each path as it was typed, as an absolute path, and relative to the run folder. A project that was moved
or copied takes its files along, so the relative path is tried first. The digest of the content decides.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_lightning.files.data_paths import data_paths, with_data_paths

Built = TypeVar("Built")


def place_of(typed: str | Sequence[str], found: Iterable[str], run_dir: str | Path, digest: str) -> dict[str, Any]:
    """The record of one input of a run, as plain values.

    Args:
        typed: the setting.
        found: its absolute paths.
        run_dir: the run folder.
        digest: of the content.
    """
    paths = list(found)
    return {
        "typed": typed if isinstance(typed, str) else list(typed),
        "found": paths,
        "from_run": _relative(paths, Path(run_dir)),
        "digest": digest,
    }


def candidates(place: Any, run_dir: Path | None) -> list[list[str]]:
    """Possible paths of a recorded input, the likeliest first; empty if `place` is not such a record."""
    place = place if isinstance(place, Mapping) else {}
    moved = _texts(place.get("from_run")) if run_dir is not None else []
    # `..` is resolved as text, because folders on the way may be links: it means the folder written before it.
    near = [os.path.normpath(Path(run_dir).absolute() / path) for path in moved]  # type: ignore[arg-type]
    return [paths for paths in (near, _texts(place.get("found"))) if paths]


def existing(options: Iterable[Sequence[str]]) -> list[list[str]]:
    """The `options` whose paths all exist or are globs, without duplicates."""
    unique: dict[tuple[str, ...], list[str]] = {}
    for paths in options:
        if paths and all(Path(path).expanduser().exists() or glob.has_magic(path) for path in paths):
            unique.setdefault(_resolved(paths), list(paths))
    return list(unique.values())


def joint(options: Mapping[str, Sequence[Sequence[str]]]) -> list[dict[str, list[str]]]:
    """Existing places of several inputs that were recorded together, the likeliest combination first.

    All inputs at the same kind of place (near the run folder, where they were, ...); each at its first place; one at
    another of its places, the others at their first. Not every combination: each is read whole to compare its digest.

    Args:
        options: setting -> its possible paths, in one order of kinds for all; empty where a kind has none.

    Returns:
        setting -> paths of each combination; none if a setting has no place that exists.
    """
    present = {key: existing(places) for key, places in options.items()}
    if not present or not all(present.values()):
        return []
    kinds = range(max(map(len, options.values())))
    same_kind = [{key: places[kind : kind + 1] for key, places in options.items()} for kind in kinds]
    whole = [one for one in same_kind if all(map(existing, one.values()))]
    together = [{key: places[0] for key, places in one.items()} for one in whole]
    first: dict[str, Sequence[str]] = {key: places[0] for key, places in present.items()}
    others = [first | {key: paths} for key, places in present.items() for paths in places[1:]]
    unique: dict[tuple[tuple[str, ...], ...], dict[str, list[str]]] = {}
    for one in (*together, first, *others):
        unique.setdefault(tuple(map(_resolved, one.values())), {key: list(paths) for key, paths in one.items()})
    return list(unique.values())


def run_dir_of(checkpoint: Path | None) -> Path | None:
    """The run folder that contains a checkpoint; None if it is elsewhere."""
    if checkpoint is None or checkpoint.absolute().parent.name != "checkpoints":
        return None
    return checkpoint.absolute().parents[1]


def parent_names(header: Mapping[str, Any], checkpoint: Path | None) -> list[str]:
    """Possible paths of a run's initial weights, the likeliest first; a model name is kept as it is."""
    lineage = header.get("lineage", {})
    run_dir, place = run_dir_of(checkpoint), lineage.get("places", {}).get("init_from")
    return names_of_parent(lineage.get("parent_name"), place, run_dir)


def names_of_parent(name: str | None, place: Any, run_dir: Path | None) -> list[str]:
    """As `parent_names`, for a lineage whose run folder is known."""
    names = [paths[0] for paths in existing(candidates(place, run_dir))]
    return list(dict.fromkeys([*names, *([name] if name else [])]))


def read_data_again(
    header: Mapping[str, Any],
    checkpoint: Path | None,
    build: Callable[[dict[str, Any]], Built],
    digest_of: Callable[[Built], str],
) -> Built:
    """Read the data that a checkpoint's settings name, from its present path.

    Args:
        header: of the checkpoint.
        checkpoint: its file, if there is one.
        build: reads data by settings of `data`.
        digest_of: computes the digest of built data.

    Returns:
        the data with the digest that the run recorded; if there is none, the first that could be read.

    Raises:
        ValueError, OSError: the first error of `build`, if no data can be read.
    """
    settings, lineage = dict(header.get("config", {}).get("data") or {}), header.get("lineage", {})
    others: list[Built] = []
    first_error: Exception | None = None
    for option in _at_their_places(settings, lineage.get("places", {}), run_dir_of(checkpoint)):
        try:
            data = build(option)
            if digest_of(data) == lineage.get("data"):
                return data
        except (ValueError, OSError) as error:
            first_error = first_error or error
            continue
        others.append(data)
    if not others:
        assert first_error is not None
        raise first_error
    return others[0]


def _at_their_places(settings: dict[str, Any], places: Any, run_dir: Path | None) -> list[dict[str, Any]]:
    """The settings with each combination of present paths; a path that is gone or was not recorded stays as typed."""
    typed = data_paths(settings)
    recorded = {key: candidates(places.get(key), run_dir) for key in typed}
    found = joint({key: options for key, options in recorded.items() if existing(options)})
    return [with_data_paths(settings, settings_at(typed, paths)) for paths in found] or [settings]


def settings_at(typed: Mapping[str, Any], paths: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """`paths` as settings of the same types as `typed`."""
    return {key: as_setting(typed[key], found) for key, found in paths.items()}


def as_setting(typed: Any, paths: Sequence[str]) -> str | list[str]:
    """`paths` as a setting of the same type as `typed`: a single path stays a string."""
    return paths[0] if len(paths) == 1 and isinstance(typed, str) else list(paths)


def _resolved(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(Path(path).expanduser().resolve()) for path in paths)


def _relative(paths: Iterable[str], run_dir: Path) -> list[str]:
    try:
        return [os.path.relpath(path, run_dir.absolute()) for path in paths]
    except ValueError:  # on another drive of Windows
        return []


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) and all(isinstance(path, str) for path in value) else []
