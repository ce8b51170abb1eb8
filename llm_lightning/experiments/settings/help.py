"""`python train.py --help`: every group, option and key, with its sentence in conf/."""

from __future__ import annotations

import ast
import itertools
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

SWEEPER = Path(__file__).parents[1] / "sweep" / "plugins" / "hydra_plugins" / "llm_lightning_sweeper.py"
"""The file that declares `hydra.sweeper`: it is read, since help imports nothing of Hydra."""


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
    defaults = _defaults(files)
    yield "python train.py [GROUP=OPTION ...] [KEY=VALUE ...]"
    yield "python train.py --help GROUP      the keys of every option of that group"
    yield "python train.py -m KEY=A,B,C      one run for each value (--help sweep)"
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
        if group == "sweep":
            yield from _sweeper_help()
    yield "\nSettings of every run"
    yield from _rows(read_settings(files.folders[-1] / "train.yaml", ""))
    for group, default in defaults:
        if default != "null" and group != "task":
            yield from _option_help(files, group, default)


def _defaults(files: ConfigFiles) -> list[tuple[str, str]]:
    """The (group, option) pairs of train.yaml, without those of Hydra's own groups."""
    pairs = read_defaults(files.folders[-1] / "train.yaml")
    return [(group, option) for group, option in pairs if group and not group.startswith("hydra/")]


def _group_help(files: ConfigFiles, group: str) -> Iterator[str]:
    groups = [name for name, _ in _defaults(files)]
    if group not in groups:
        near = nearest(group, groups)
        hint = f"did you mean '{near}'?" if near else f"groups are {', '.join(groups)}"
        raise ValueError(f"--help {group}: no such group; {hint}")
    for option in files.options(group):
        yield from _option_help(files, group, option)
    if group == "sweep":
        yield from _sweeper_help()


def _option_help(files: ConfigFiles, group: str, option: str) -> Iterator[str]:
    yield f"\n{group}={option}: {_headline(files, group, option)}"
    if group == "sweep":
        yield from _sweep_rows(_option_settings(files, group, option))
    elif group != "pipeline":  # its stages are not settings
        yield from _rows(_option_settings(files, group, option))


def _headline(files: ConfigFiles, group: str, option: str) -> str:
    file = files.file_of(group, option)
    return read_headline(file) if file is not None else ""


def _option_settings(files: ConfigFiles, group: str, option: str) -> list[Setting]:
    """The option's keys, and those of the files of its group that it builds on; its own win."""
    file = files.file_of(group, option)
    if file is None:
        return []
    prefix = package_of(file, group)
    merged: dict[str, Setting] = {}
    for other_group, base in read_defaults(file):
        if other_group is None:
            merged |= {setting.path: setting for setting in _option_settings(files, group, base)}
    return list((merged | {setting.path: setting for setting in read_settings(file, prefix)}).values())


def _sweep_rows(settings: list[Setting]) -> Iterator[str]:
    """What every job of a sweep has in common or varies, then the jobs that are listed by name."""
    params, jobs = "hydra.sweeper.params.", "hydra.sweeper.jobs."
    for setting in settings:
        if setting.path.startswith(params) and setting.value:
            yield _row(f"{setting.path.removeprefix(params)}={setting.value}", setting.sentence)
        elif setting.path.startswith(jobs):
            name, _, key = setting.path.removeprefix(jobs).partition(".")
            words = setting.value.strip("{}").replace(": ", "=").replace(", ", " ")  # {KEY: VALUE, KEY: VALUE}
            yield _row(f"    {key}={setting.value}" if key else f"job {name} {words}".rstrip(), setting.sentence)


def _sweeper_help() -> Iterator[str]:
    yield "\nSettings of every sweep (sweep=NAME, -m KEY=A,B,C)"
    yield from _rows(_sweeper_settings())


def _sweeper_settings() -> list[Setting]:
    """The fields of `SweeperConf`, with their docstrings."""
    [fields] = (
        node.body
        for node in ast.parse(SWEEPER.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "SweeperConf"
    )
    settings = []
    for node, docstring in itertools.pairwise(fields):
        if isinstance(node, ast.AnnAssign) and isinstance(docstring, ast.Expr):
            name, default = ast.unparse(node.target), "{}"
            if isinstance(node.value, ast.Constant):
                default = "null" if node.value.value is None else str(node.value.value).lower()
            if not name.startswith("_"):
                settings.append(Setting(f"hydra.sweeper.{name}", default, str(ast.literal_eval(docstring.value))))
    return settings


def _rows(settings: list[Setting]) -> Iterator[str]:
    for setting in settings:
        if setting.value and not setting.path.endswith("_target_"):
            yield _row(f"{setting.path}={setting.value}", setting.sentence)


def _row(assignment: str, sentence: str) -> str:
    return f"  {assignment:<44} {sentence}".rstrip()
