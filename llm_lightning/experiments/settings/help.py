"""`python train.py --help`: every group, option and key, with its sentence in conf/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_lightning.experiments.settings.yaml_files import (
    Setting,
    group_options,
    package_of,
    read_defaults,
    read_headline,
    read_settings,
)
from llm_lightning.nearest import nearest


def help_text(argv: Sequence[str], config_dir: Path) -> str | None:
    """The help that `argv` requests; None if it requests none.

    Raises:
        ValueError: if `--help GROUP` names no group.
    """
    if not {"-h", "--help"} & set(argv):
        return None
    words = [word for word in argv if not word.startswith("-")]
    return "\n".join(_group_help(config_dir, words[0]) if words else _full_help(config_dir)) + "\n"


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
        near = nearest(group, groups)
        hint = f"did you mean '{near}'?" if near else f"groups are {', '.join(groups)}"
        raise ValueError(f"--help {group}: no such group; {hint}")
    for option in group_options(config_dir, group):
        yield from _option_help(config_dir, group, option)


def _option_help(config_dir: Path, group: str, option: str) -> Iterator[str]:
    yield f"\n{group}={option}: {read_headline(config_dir / group / f'{option}.yaml')}"
    if group != "pipeline":  # its stages are not settings
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
