"""The settings of `data` that name files, by dotted keys.

`data.path`, `data.val_path`, `data.test_path`, `data.val_sets.NAME` and `data.mixture.INDEX.path`: one function lists
them and one puts other paths in their place, so that a path is recorded, found again and compared wherever it was set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PLAIN = ("path", "val_path", "test_path")
_SETS = "data.val_sets."
_ITEM = r"(?:\.\d+|\[\d+\])"
_KEY = re.compile(rf"(data\.(?:{'|'.join(PLAIN)}|val_sets\.[^.\[\]]+|mixture{_ITEM}\.path)){_ITEM}?")


def data_paths(data: Any) -> dict[str, Any]:
    """Dotted key -> value of every path setting that has one.

    Args:
        data: the settings of `data`, nested; anything else has none, since headers may be damaged.
    """
    if not isinstance(data, Mapping):
        return {}
    paths = {f"data.{name}": data.get(name) for name in PLAIN}
    paths |= {f"{_SETS}{name}": path for name, path in _named(data.get("val_sets")).items()}
    sources = enumerate(_listed(data.get("mixture")))
    paths |= {f"data.mixture.{index}.path": source.get("path") for index, source in sources}
    return {key: path for key, path in paths.items() if path is not None}


def with_data_paths(data: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` in which the settings of `paths`, by dotted keys, have these values."""
    changed = dict(data)
    changed |= {name: paths[f"data.{name}"] for name in PLAIN if f"data.{name}" in paths}
    if sets := _named(data.get("val_sets")):
        changed["val_sets"] = {name: paths.get(f"{_SETS}{name}", path) for name, path in sets.items()}
    if sources := _listed(data.get("mixture")):
        keys = [f"data.mixture.{index}.path" for index in range(len(sources))]
        changed["mixture"] = [
            {**source, "path": paths[key]} if key in paths else source
            for key, source in zip(keys, sources, strict=True)
        ]
    return changed


def flat_data_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`data_paths` of settings by dotted keys, of which lists are leaves."""
    sets = {key.removeprefix(_SETS): path for key, path in settings.items() if key.startswith(_SETS)}
    names = (*PLAIN, "mixture")
    return data_paths({name: settings.get(f"data.{name}") for name in names} | {"val_sets": sets})


def without_paths(value: Any) -> Any:
    """A mixture without the paths of its sources, whose content counts instead; any other value unchanged."""
    return [{key: one for key, one in source.items() if key != "path"} for source in _listed(value)] or value


def data_path_of(key: str) -> str | None:
    """The path setting of a dotted key, which may name one entry of a list; None if it is no path of the data.

    >>> data_path_of("data.path[1]"), data_path_of("data.mixture[0].path"), data_path_of("data.name")
    ('data.path', 'data.mixture.0.path', None)
    """
    match = _KEY.fullmatch(key)
    return re.sub(r"\[(\d+)\]", r".\1", match[1]) if match else None


def _named(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[Mapping[str, Any]]:
    is_mixture = isinstance(value, list) and all(isinstance(source, Mapping) for source in value)
    return value if is_mixture else []
