"""Groups that are switched off, groups that every run needs, and the group that declares a setting.

`null` and `none` both switch off an optional group (logger, callbacks, lora) or an earlier preset. Every run needs all
other groups, and a refusal names what to choose instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from llm_lightning.experiments.settings.yaml_files import declared_by, group_options, read_defaults

OPTIONAL = ("logger", "callbacks", "lora")
"""Groups with a none.yaml."""

PRESETS_LEFT_OUT = ("experiment", "pipeline", "sweep", "debug")
"""Groups that are null by default."""

INSTEAD = {
    "scheduler": "scheduler=constant keeps one learning rate",
    "optimizer": "optimizer=adamw is the default",
    "trainer": "trainer=default is the default",
    "accelerator": "accelerator=auto takes the fastest available device",
    "model": "model=nano is the smallest",
    "tokenizer": "tokenizer=byte is one token per byte",
    "data": "the task brings its own",
    "task": "task=pretraining is the default",
}
"""Groups that every run needs, and what to type instead of null."""

_NONE = ("null", "none")


def without_null_groups(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `GROUP=null` by `GROUP=none`; for a preset, drop the word and every earlier choice of it.

    Raises:
        ValueError: for a group that every run needs.
    """
    words: list[str] = []
    for word in argv:
        key, _, value = word.partition("=")
        group = key.lstrip("+")
        options = [option.strip() for option in value.split(",")]
        if group in PRESETS_LEFT_OUT and value.lower() in _NONE and value not in group_options(config_dir, group):
            words = [other for other in words if other.lstrip("+").partition("=")[0] != group]
        elif group in OPTIONAL and any(option.lower() in _NONE for option in options):
            words.append(f"{group}={','.join('none' if option.lower() in _NONE else option for option in options)}")
        elif group in INSTEAD and any(option.lower() in _NONE for option in options):
            raise ValueError(_needed(word, group, group_options(config_dir, group)))
        else:
            words.append(word)
    return words


def refuse_missing(config: Mapping[str, Any], options: Mapping[str, Sequence[str]], where: str) -> None:
    """Refuse a config in which a file sets a required group to null.

    Args:
        options: group -> its files.
        where: the preset that may have done it.
    """
    for group in INSTEAD:
        if group != "accelerator" and config.get(group) is None:  # accelerator's keys are in `trainer`
            raise ValueError(_needed(f"{group}: null{where}", group, options[group]))


def _needed(what: str, group: str, options: Sequence[str]) -> str:
    return f"{what}: every run needs one; {INSTEAD[group]} ({group}: {', '.join(options)})"


def switched_off(
    config: DictConfig, choices: Mapping[str, Any], typed: Collection[str], of_task: Mapping[str, Any]
) -> DictConfig:
    """Remove what presets add to a group that is none, which they would switch on again.

    Members added on the command line stay: `callbacks=none +callbacks.lr._target_=...`.

    Args:
        choices: group -> chosen file.
        typed: the keys of the command line, groups included.
        of_task: dotted key -> value of the task's preset alone.

    Raises:
        ValueError: if the command line both switches a group off and sets something in it.
    """
    for group in OPTIONAL:
        node = config.get(group)
        if node is not None and choices.get(group) not in (None, "none", "[]"):
            continue
        kept = {} if node is None else OmegaConf.to_container(node, resolve=False)
        assert isinstance(kept, dict)
        mine = {key.split(".")[1]: key for key in typed if key.startswith(f"{group}.")}
        for member, key in mine.items() if group in typed else ():
            value = kept.get(member)
            if value is not None and not (isinstance(value, Mapping) and "_target_" in value):
                raise ValueError(
                    f"{key} would have no effect: {group}=none switches {group} off; leave one of them out"
                )
        for member, value in list(kept.items()):
            if member not in mine and (group in typed or value == of_task.get(f"{group}.{member}")):
                del kept[member]
        with open_dict(config):
            config[group] = kept
    return config


def is_off(choices: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether any optional group, which a preset may have filled, is none."""
    return any(choices.get(group) in (None, "none", "[]") or config.get(group) is None for group in OPTIONAL)


def option_with(key: str, folders: Iterable[Path], choices: Mapping[str, Any]) -> str | None:
    """`GROUP=OPTION` of a file that declares `key` and is not chosen; None if there is none.

    The group's own file comes first (`callbacks=early_stopping`), then a task that includes it.
    """
    options: list[tuple[int, str]] = []
    for folder in folders:
        groups = [path.name for path in folder.iterdir() if path.is_dir()]
        for group in sorted(set(groups) - set(PRESETS_LEFT_OUT)):
            for option in group_options(folder, group):
                declares = key in declared_by(folder, group, option)
                if declares and choices.get(group) != option:
                    options.append(_named(folder, group, option))
    return min(options, default=(0, None))[1]


def _named(folder: Path, group: str, option: str) -> tuple[int, str]:
    """The option's rank (0 is best) and the word to type; data come with their task."""
    if group == "data":
        tasks = [task for task in group_options(folder, "task") if _brings(folder, task, option)]
        return (0, f"task={tasks[0]}") if tasks else (2, f"data={option}")
    rank, file = {"task": 1}.get(group, 0), folder / "train.yaml"
    is_default = option == "default" or (file.is_file() and (group, option) in read_defaults(file))
    return (rank if is_default else rank + 1, f"{group}={option}")


def _brings(folder: Path, task: str, data: str) -> bool:
    return ("data", data) in read_defaults(folder / "task" / f"{task}.yaml")
