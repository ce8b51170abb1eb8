"""`python train.py --help`: every group, option and key, with its sentence in conf/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_lightning.experiments.settings.yaml_files import (
    ConfigFiles,
    Setting,
    package_of,
    read_defaults,
    read_headline,
    read_settings,
)
from llm_lightning.nearest import nearest


def help_text(argv: Sequence[str], config_dir: Path) -> str | None:
    """The help that `argv` requests, with the files of its `--config-dir`; None if it requests none.

    Raises:
        ValueError: if `--help GROUP` names no group, or `--config-dir` no folder.
    """
    if not {"-h", "--help"} & set(argv):
        return None
    words, given = [], []
    rest = iter(argv)
    for word in rest:
        if word == "--config-dir":
            given.append(next(rest, ""))
        elif word.startswith("--config-dir="):
            given.append(word.partition("=")[2])
        elif not word.startswith("-"):
            words.append(word)
    for folder in given:
        if not Path(folder).is_dir():
            raise ValueError(f"--config-dir {folder}: no such folder")
    files = ConfigFiles((*map(Path, given), config_dir))
    return "\n".join(_group_help(files, words[0]) if words else _full_help(files)) + "\n"


def _full_help(files: ConfigFiles) -> Iterator[str]:
    defaults = [(group, option) for group, option in read_defaults(files.folders[-1] / "train.yaml") if group]
    yield "python train.py [GROUP=OPTION ...] [KEY=VALUE ...]"
    yield "python train.py --help GROUP      the keys of every option of that group"
    yield "python train.py -m KEY=A,B,C      one run for each value"
    yield "\nGroups (* is the default)"
    for group, default in defaults:
        shown = (f"*{name}" if name == default else name for name in files.options(group))
        yield f"  {group:<12} " + "  ".join(shown)
    titles = {"task": "Tasks", "experiment": "Experiments", "pipeline": "Pipelines"}
    for group, title in {**titles, "sweep": "Sweeps", "debug": "Debugging"}.items():
        yield f"\n{title}"
        for name in files.options(group):
            choice = f"{group}={name}"
            yield f"  {choice:<46} {_headline(files, group, name)}"
    yield "\nSettings of every run"
    yield from _rows(read_settings(files.folders[-1] / "train.yaml", ""))
    for group, default in defaults:
        if default != "null" and group != "task":
            yield from _option_help(files, group, default)


def _group_help(files: ConfigFiles, group: str) -> Iterator[str]:
    groups = [name for name, _ in read_defaults(files.folders[-1] / "train.yaml") if name]
    if group not in groups:
        near = nearest(group, groups)
        hint = f"did you mean '{near}'?" if near else f"groups are {', '.join(groups)}"
        raise ValueError(f"--help {group}: no such group; {hint}")
    for option in files.options(group):
        yield from _option_help(files, group, option)


def _option_help(files: ConfigFiles, group: str, option: str) -> Iterator[str]:
    yield f"\n{group}={option}: {_headline(files, group, option)}"
    if group != "pipeline":  # its stages are not settings
        yield from _rows(_option_settings(files, group, option))


def _headline(files: ConfigFiles, group: str, option: str) -> str:
    file = files.file_of(group, option)
    return read_headline(file) if file is not None else ""


def _option_settings(files: ConfigFiles, group: str, option: str) -> list[Setting]:
    """The option's keys, and those of the files of its group that it builds on; its own win."""
    file = files.file_of(group, option)
    if file is None:
        return []
    prefix = "" if group == "sweep" else package_of(file, group)  # its keys are those of the command line
    merged: dict[str, Setting] = {}
    for other_group, base in read_defaults(file):
        if other_group is None:
            merged |= {setting.path: setting for setting in _option_settings(files, group, base)}
    return list((merged | {setting.path: setting for setting in read_settings(file, prefix)}).values())


def _rows(settings: list[Setting]) -> Iterator[str]:
    for setting in settings:
        if setting.value and not setting.path.endswith("_target_"):
            assignment = f"{setting.path}={setting.value}"
            yield f"  {assignment:<44} {setting.sentence}"
