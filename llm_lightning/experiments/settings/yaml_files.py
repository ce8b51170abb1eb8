"""The YAML files of conf/: their keys, sentences, defaults lists and contents.

Files are read as text where possible: nothing heavy is imported at the top, so that help is instant.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEY_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w.]+):(?P<value>.*?)(?: +# (?P<comment>.*))?$")
_DEFAULT_LINE = re.compile(r"^  - (?:(?:override +)?/?(?P<group>[\w/]+): )?(?P<option>[\w/]+)")
_PACKAGE_LINE = re.compile(r"^# @package (\S+)")


@dataclass(frozen=True)
class Setting:
    """One key of a YAML file: its dotted path, its value as written and its sentence."""

    path: str
    value: str
    sentence: str


def read_settings(file: Path, prefix: str) -> list[Setting]:
    """Every key that a YAML file sets, in its order; `prefix` is where Hydra puts the file's content.

    A sentence is at the end of the key's line, or in the comment lines directly above it.
    """
    settings: list[Setting] = []
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    for line in _body(file):
        if line.lstrip().startswith("#"):
            above.append(line.strip("# "))
            continue
        match = _KEY_LINE.match(line)
        if match:
            indent = len(match["indent"])
            parents = [(depth, key) for depth, key in parents if depth < indent] + [(indent, match["key"])]
            path = ".".join([prefix] * bool(prefix) + [key for _, key in parents])
            settings.append(Setting(path, match["value"].strip(), match["comment"] or " ".join(above)))
        above = []
    return settings


def read_headline(file: Path) -> str:
    """The headline of a YAML file: the first line of its head comment; "" if it has none."""
    lines = (line for line in file.read_text("utf-8").splitlines() if not _PACKAGE_LINE.match(line))
    first = next(lines, "")
    return first.lstrip("# ") if first.startswith("#") else ""


def read_defaults(file: Path) -> list[tuple[str | None, str]]:
    """The (group, option) pairs of a file's defaults list; group None: a file of the same group."""
    matches = (_DEFAULT_LINE.match(line) for line in file.read_text("utf-8").splitlines())
    return [(match["group"], match["option"]) for match in matches if match and match["option"] != "_self_"]


def group_options(config_dir: Path, group: str) -> list[str]:
    """The options of a group, subfolders included: `book/ch05`."""
    return [name for name in group_files(config_dir, group) if not name.startswith("_")]


def group_files(config_dir: Path, group: str) -> list[str]:
    """The files of a group: its options, and those beginning with `_` that options build on."""
    folder = config_dir / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


@dataclass(frozen=True)
class ConfigFiles:
    """The YAML files of several folders: that of `--config-dir`, if any, then the project's own."""

    folders: tuple[Path, ...]

    def options(self, group: str) -> list[str]:
        """The files of a group, subfolders included: `book/ch05`."""
        return sorted({option for folder in self.folders for option in group_options(folder, group)})

    def file_of(self, group: str, option: Any) -> Path | None:
        """The file of an option; the project's own wins, as in Hydra's search path."""
        files = (folder / group / f"{option}.yaml" for folder in reversed(self.folders))
        return next((file for file in files if file.is_file()), None)


@functools.cache
def declared_settings(config_dir: Path) -> frozenset[str]:
    """The dotted keys that the files of all groups declare, and train.yaml."""
    keys = {setting.path for setting in read_settings(config_dir / "train.yaml", "")}
    for group in (path.name for path in config_dir.iterdir() if path.is_dir()):
        for name in group_files(config_dir, group):
            file = config_dir / group / f"{name}.yaml"
            keys |= {setting.path for setting in read_settings(file, package_of(file, group))}
    return frozenset(keys)


def declared_by(config_dir: Path, group: str, option: str) -> set[str]:
    """The dotted keys that an option's file declares, and the `_` files that it builds on."""
    file = config_dir / group / f"{option}.yaml"
    own = {setting.path for setting in read_settings(file, package_of(file, group))}
    shared = [base for other_group, base in read_defaults(file) if other_group is None and base.startswith("_")]
    return own.union(*(declared_by(config_dir, group, base) for base in shared))


def package_of(file: Path, group: str) -> str:
    """Where Hydra puts the content of a group's file: the group, unless its first line names another package."""
    package = _PACKAGE_LINE.match(file.read_text("utf-8"))
    return package[1].replace("_global_", "") if package else group


def load(file: Path) -> dict[str, Any]:
    """The content of a file, interpolations as written, without its defaults list; empty if YAML cannot parse it.

    Hydra reports such a file where it is used. The parser is libyaml, ten times as fast as the one in Python.
    """
    try:
        return _parsed(file, file.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.cache
def _parsed(file: Path, _: int) -> dict[str, Any]:
    import yaml
    from omegaconf._utils import get_yaml_loader

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers  # numbers as OmegaConf reads them: 1e-8

    try:
        content = yaml.load(file.read_text("utf-8"), Loader)
    except (ValueError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in content.items() if key != "defaults"} if isinstance(content, dict) else {}


def _body(file: Path) -> Iterator[str]:
    """The lines below the head comment and the defaults list."""
    lines = iter(file.read_text("utf-8").splitlines())
    line = next(lines, "")
    while line.startswith("#"):
        line = next(lines, "")
    if line.startswith("defaults:"):
        line = next(lines, "")
        while line.startswith(("  -", "#")):
            line = next(lines, "")
    yield line
    yield from lines
