"""`python train.py --help`: every group, option and key, with the sentences written beside them in conf/.

Reads the YAML files as text: nothing heavy is imported, so that help is instant.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_KEY_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w.]+):(?P<value>.*?)(?: +# (?P<comment>.*))?$")
_DEFAULT_LINE = re.compile(r"^  - (?:(?:override +)?/?(?P<group>[\w/]+): )?(?P<option>[\w/]+)")
_PACKAGE_LINE = re.compile(r"^# @package (\S+)")


@dataclass(frozen=True)
class Setting:
    """One key of a YAML file: its dotted path, its value as written and its sentence."""

    path: str
    value: str
    sentence: str


def help_text(argv: Sequence[str], config_dir: Path) -> str | None:
    """The help that `argv` asks for; None where it asks for none.

    Raises:
        ValueError: if `--help GROUP` names no group.
    """
    if not {"-h", "--help"} & set(argv):
        return None
    words = [word for word in argv if not word.startswith("-")]
    return "\n".join(_group_help(config_dir, words[0]) if words else _full_help(config_dir)) + "\n"


def read_settings(file: Path, prefix: str) -> list[Setting]:
    """Every key that a YAML file sets, in its order; `prefix` is where Hydra puts the file's content.

    A sentence stands at the end of the key's line, or in the comment lines directly above it.
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
    """What a YAML file is: the first line of its head comment."""
    lines = (line for line in file.read_text("utf-8").splitlines() if not _PACKAGE_LINE.match(line))
    return next(lines, "").lstrip("# ")


def read_defaults(file: Path) -> list[tuple[str | None, str]]:
    """The (group, option) pairs of a file's defaults list; group None: a file of the same group."""
    found = (_DEFAULT_LINE.match(line) for line in file.read_text("utf-8").splitlines())
    return [(match["group"], match["option"]) for match in found if match and match["option"] != "_self_"]


def group_options(config_dir: Path, group: str) -> list[str]:
    """The options of a group, subfolders included: `book/ch05`."""
    return [name for name in group_files(config_dir, group) if not name.startswith("_")]


def group_files(config_dir: Path, group: str) -> list[str]:
    """The files of a group: its options, and those beginning with `_` that options build on."""
    folder = config_dir / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


@functools.cache
def declared_settings(config_dir: Path) -> frozenset[str]:
    """The dotted keys that the files of all groups declare, and train.yaml."""
    found = {setting.path for setting in read_settings(config_dir / "train.yaml", "")}
    for group in (path.name for path in config_dir.iterdir() if path.is_dir()):
        for name in group_files(config_dir, group):
            file = config_dir / group / f"{name}.yaml"
            found |= {setting.path for setting in read_settings(file, package_of(file, group))}
    return frozenset(found)


def declared_by(config_dir: Path, group: str, option: str) -> set[str]:
    """The dotted keys that an option's file declares, and the `_` files that it builds on."""
    file = config_dir / group / f"{option}.yaml"
    own = {setting.path for setting in read_settings(file, package_of(file, group))}
    shared = [base for other_group, base in read_defaults(file) if other_group is None and base.startswith("_")]
    return own.union(*(declared_by(config_dir, group, base) for base in shared))


def package_of(file: Path, group: str) -> str:
    """Where Hydra puts the content of a group's file: the group, unless its first line says another place."""
    package = _PACKAGE_LINE.match(file.read_text("utf-8"))
    return package[1].replace("_global_", "") if package else group


def _full_help(config_dir: Path) -> Iterator[str]:
    main = config_dir / "train.yaml"
    defaults = [(group, option) for group, option in read_defaults(main) if group]
    yield "python train.py [GROUP=OPTION ...] [KEY=VALUE ...]"
    yield "python train.py --help GROUP      the keys of every option of that group"
    yield "python train.py -m KEY=A,B,C      one run for each value"
    yield "\nGroups (* is the default)"
    for group, default in defaults:
        options = group_options(config_dir, group)
        yield f"  {group:<12} " + "  ".join(f"*{name}" if name == default else name for name in options)
    titles = {"task": "Tasks", "experiment": "Experiments", "pipeline": "Pipelines"}
    for group, title in {**titles, "sweep": "Sweeps", "debug": "Debugging"}.items():
        yield f"\n{title}"
        for name in group_options(config_dir, group):
            choice = f"{group}={name}"
            yield f"  {choice:<46} {read_headline(config_dir / group / f'{name}.yaml')}"
    yield "\nSettings of every run"
    yield from _rows(read_settings(main, ""))
    for group, default in defaults:
        if default != "null" and group != "task":
            yield from _option_help(config_dir, group, default)


def _group_help(config_dir: Path, group: str) -> Iterator[str]:
    groups = [name for name, _ in read_defaults(config_dir / "train.yaml") if name]
    if group not in groups:
        nearest = difflib.get_close_matches(group, groups, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"groups are {', '.join(groups)}"
        raise ValueError(f"--help {group}: no such group; {hint}")
    for option in group_options(config_dir, group):
        yield from _option_help(config_dir, group, option)


def _option_help(config_dir: Path, group: str, option: str) -> Iterator[str]:
    yield f"\n{group}={option}: {read_headline(config_dir / group / f'{option}.yaml')}"
    if group != "pipeline":  # its stages are no settings
        yield from _rows(_option_settings(config_dir, group, option))


def _option_settings(config_dir: Path, group: str, option: str) -> list[Setting]:
    """The option's keys, and those of the files of its group that it builds on; its own win."""
    file = config_dir / group / f"{option}.yaml"
    prefix = "" if group == "sweep" else package_of(file, group)  # its keys are those of the command line
    merged: dict[str, Setting] = {}
    for other_group, base in read_defaults(file):
        if other_group is None:
            merged |= {setting.path: setting for setting in _option_settings(config_dir, group, base)}
    return list((merged | {setting.path: setting for setting in read_settings(file, prefix)}).values())


def _rows(settings: list[Setting]) -> Iterator[str]:
    for setting in settings:
        if setting.value and not setting.path.endswith("_target_"):
            assignment = f"{setting.path}={setting.value}"
            yield f"  {assignment:<44} {setting.sentence}"


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
