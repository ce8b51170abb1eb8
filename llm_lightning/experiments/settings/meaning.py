"""Typed values by the kind that conf/ declares: text stays as typed, and one value for a list is a list of one.

Hydra reads `data.path=1984` as a number and `run_name=2026_11_26` as 20261126. The default in conf/ declares
whether a setting is text, a list or anything else; if it is null, the tables below do. The command line is rewritten
once, before Hydra and every record of it (command.json, the jobs of a multirun, the stages of a pipeline).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from llm_lightning.experiments.settings.compose import config_dirs
from llm_lightning.experiments.settings.nodes import leaves
from llm_lightning.experiments.settings.overrides import parse_arguments
from llm_lightning.experiments.settings.spelling import NUMBERS, Kind, rewritten_value, split_values
from llm_lightning.experiments.settings.yaml_files import group_files, load, package_of
from llm_lightning.files.data_paths import data_path_of

UNDECLARED: dict[str, Kind] = {
    "run_name": "text",
    "resume": "text",
    "init_from": "text",
    "monitor": "text",
    "tokenizer.name": "text",
    "data.path": "text",
    "data.val_path": "text",
    "data.test_path": "text",
    "data.val_sets": "named texts",
    "data.mixture": "sources",
    "data.hf_dataset": "text",
    "data.format": "text",
    "data.separator": "text",
    "data.quotes": "anything",
    "data.hf_config": "text",
    "data.hf_val_split": "text",
    "data.hf_test_split": "text",
    "data.hf_revision": "text",
    "data.template": "text",
    "data.template_date": "text",
    "data.labels": "texts",
    "data.global_batch_size": "anything",
    "data.max_length": "anything",
    "data.stride": "anything",
    "model.vocab_size": "anything",
    "model.n_kv_head": "anything",
    "model.head_dim": "anything",
    "model.ffn_width": "anything",
    "model.rope_scaling": "anything",
    "allow_targets": "texts",
    "callbacks.samples.prompts": "texts",
    "callbacks.throughput.peak_tflops": "anything",
    "callbacks.checkpoints.mode": "text",
    "callbacks.early_stopping": "anything",
    "callbacks.early_stopping.mode": "text",
    "callbacks.responses": "anything",
    "trainer.val_check_interval": "anything",
    "trainer.limit_train_batches": "anything",
    "trainer.limit_val_batches": "anything",
    "hydra.run.dir": "text",
    "hydra.sweep.dir": "text",
    "hydra.sweep.subdir": "text",
    "hydra.job.name": "text",
    # Settings that are a word, or else a number or a switch.
    "data.pad_to": "anything",
    "data.packing": "anything",
    "optimizer.fused": "anything",
    "optimizer.lr": "anything",
    "optimizer.adamw_lr": "anything",
    "optimizer.weight_decay": "anything",
    "optimizer._target_": "text",
    "task.trained_blocks": "anything",
    "task.class_weights": "anything",
    "trainer.devices": "anything",
    "trainer.precision": "anything",
    "trainer.strategy": "anything",
}
"""Kinds of the settings whose default in conf/ does not show it: null, missing, or a word besides numbers."""


OPEN = ("data.val_sets.", "data.roles.")
"""Nodes whose keys are names of the user's choice."""
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def as_meant(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Quote text that reads as a number, and wrap a single value of a list setting in a list.

    Args:
        argv: the command line without the program, or overrides alone.
        config_dir: the folder of train.yaml; `--config-dir` in `argv` adds another.
    """
    arguments = parse_arguments(argv)
    folders = config_dirs(arguments.config_dir, config_dir).folders
    return [word_as_meant(word, folders, is_multirun=arguments.multirun) for word in argv]


def word_as_meant(word: str, folders: tuple[Path, ...], *, is_multirun: bool = False) -> str:
    """`as_meant` for one word; several values outside a multirun stay as typed, and are refused later."""
    key, equals, value = word.partition("=")
    if f"{key}.".startswith(OPEN):  # any name may be added
        key = f"++{key}"
        word = f"{key}{equals}{value}"
    kind = _kind_of_word(key.lstrip("+"), folders)
    if (
        not equals
        or kind == "anything"
        or key.startswith(("~", "-"))
        or (len(split_values(value)) > 1 and not is_multirun)
    ):
        return word
    return f"{key}={rewritten_value(value, kind)}"


@functools.cache
def declared_kinds(folders: tuple[Path, ...]) -> dict[str, Kind]:
    """The kind of every setting that a group's file, a task or train.yaml declares."""
    values: dict[str, Any] = {}
    for file, package in _declaring_files(folders):
        for key, value in leaves(load(file), package).items():
            if not key.startswith("hydra") and values.get(key) is None:
                values[key] = value
    return {key: _kind_of(key, values) for key in values} | UNDECLARED


def settle(
    config: DictConfig, values: Mapping[str, Any], folders: tuple[Path, ...], where: Callable[[str], str]
) -> None:
    """Wrap single values of list settings in a list, in place; refuse values that are not of the declared kind.

    The values come from YAML files, interpolations, and `{...}` on the command line.

    Args:
        config: the config of one run.
        values: dotted key -> resolved value in it.
        folders: the folders of YAML files.
        where: key -> " in FILE" where a file sets it, else "".

    Raises:
        ValueError: naming the key, its file and how to write it.
    """
    sets = values.get("data.val_sets")
    for name in sets if isinstance(sets, Mapping) else ():
        _refuse_other_name(name, where)
    for key, value, kind in _known_kinds(values, declared_kinds(folders)):
        if value is None or kind == "anything" or value == "???":
            continue
        if kind in ("named texts", "sources"):
            _refuse_other_form(key, kind, value, where)
            continue
        if kind in ("texts", "numbers") and not isinstance(value, list):
            if isinstance(value, Mapping):
                raise ValueError(f"{key}={value}{where(key)} must be a list, such as [A,B]")
            OmegaConf.update(config, key, [value])
            value = [value]
        _refuse_other_kind(key, kind, value, where)


def _known_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Iterator[tuple[str, Any, Kind]]:
    """(key, value, kind) of every setting, and of every text inside `data.val_sets` and `data.mixture`."""
    yield from ((key, values.get(key), kind) for key, kind in kinds.items())
    yield from ((key, value, "text") for key, value in values.items() if key.startswith(OPEN))
    sources = values.get("data.mixture")
    for index, source in enumerate(sources if isinstance(sources, list) else ()):
        items = source.items() if isinstance(source, Mapping) else ()
        yield from ((f"data.mixture.{index}.{key}", value, "text") for key, value in items if key not in NUMBERS)


def _refuse_other_name(name: Any, where: Callable[[str], str]) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"data.val_sets{where('data.val_sets')}: {name!r} is part of the names of metrics: use letters, digits, "
            "_ and -, and write a number in quotes"
        )


def _refuse_other_form(key: str, kind: Kind, value: Any, where: Callable[[str], str]) -> None:
    if kind == "named texts" and not isinstance(value, Mapping):
        raise ValueError(f"{key}={value}{where(key)} must give each path a name, such as {{hard: hard.txt}}")
    if kind == "sources" and not (isinstance(value, list) and all(isinstance(one, Mapping) for one in value)):
        raise ValueError(
            f"{key}={value}{where(key)} must be a list of sources, such as [{{name: web, path: web.txt, weight: 0.7}}]"
        )


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _refuse_other_kind(key: str, kind: Kind, value: Any, where: Callable[[str], str]) -> None:
    is_list = isinstance(value, list)
    if is_list and kind == "text" and data_path_of(key) is None:
        raise ValueError(f"{key}={value}{where(key)} must be one text, not a list")
    for index, one in enumerate(value) if is_list else [(None, value)]:
        name = key if index is None else f"{key}[{index}]"
        if kind == "numbers" and (isinstance(one, bool) or not isinstance(one, (int, float))):
            raise ValueError(f"{name}={one!r}{where(key)} must be a number")
        if kind != "numbers" and not isinstance(one, str):
            if one is None or isinstance(one, (Mapping, list)):
                raise ValueError(f"{name}={'null' if one is None else one}{where(key)} must be text")
            raise ValueError(
                f"{name}={one}{where(key)} is text that reads as a number or a switch: write it in quotes, "
                f'"{_shown(one)}"'
            )


# --- kinds -----------------------------------------------------------------------------------------------------------


def _declaring_files(folders: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """(file, dotted package of its content) of every file whose keys are settings."""
    presets = ("experiment", "pipeline", "sweep", "debug")
    for folder in reversed(folders):  # the project's own defaults win
        if (folder / "train.yaml").is_file():
            yield folder / "train.yaml", ""
        for group in sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in presets):
            for name in group_files(folder, group):
                file = folder / group / f"{name}.yaml"
                yield file, package_of(file, group)


def _kind_of(key: str, values: Mapping[str, Any]) -> Kind:
    value = values.get(key)
    while isinstance(value, str) and (other := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        key, value = other[1], values.get(other[1])
    if key in UNDECLARED:
        return UNDECLARED[key]
    if isinstance(value, str) and value != "???" and not key.endswith("_target_"):
        return "text"
    if isinstance(value, list):
        return "texts" if all(isinstance(one, str) for one in value) else "numbers"
    return "anything"


def _kind_of_word(key: str, folders: tuple[Path, ...]) -> Kind:
    source = re.fullmatch(r"data\.mixture\.\d+\.(\w+)", key)
    if key.startswith(OPEN) or (source and source[1] not in NUMBERS):
        return "text"
    if any((folder / key).is_dir() for folder in folders):
        return "text"  # the name of a group's file
    return declared_kinds(folders).get(key, "anything")
