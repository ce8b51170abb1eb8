"""Check the command line before the run: every wrong setting gives one line that names the right one.

Hydra accepts an unknown key silently behind a `+` and inside an experiment file, and instantiates nearly any callable
that a `_target_` names. Here a key must be declared by its group's own files, or be an argument of its node's target;
and a target must be a class of a few kinds, defined in a few packages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig

from llm_lightning.experiments.settings import yaml_files
from llm_lightning.experiments.settings.changes import refuse_removed, refuse_renamed, refuse_replaced
from llm_lightning.experiments.settings.compose import (
    ConfigDirs,
    config_dirs,
    hint,
    prepare_hydra,
    without_hydra,
)
from llm_lightning.experiments.settings.groups import OPTIONAL, is_off, option_with, refuse_missing, switched_off
from llm_lightning.experiments.settings.meaning import OPEN, settle, word_as_meant
from llm_lightning.experiments.settings.nodes import dotted, plain
from llm_lightning.experiments.settings.overrides import parse_arguments, parsed
from llm_lightning.experiments.settings.targets import arguments_of, check_hydra_targets, check_targets
from llm_lightning.experiments.settings.values import refuse_wrong_values

OPEN_GROUPS = ("callbacks", "logger")
"""Groups that accept further members under any name, if they have a `_target_`."""

SET_ELSEWHERE = {
    "trainer.callbacks": "callbacks",
    "trainer.logger": "logger",
    "trainer.default_root_dir": "hydra.run.dir",
    "trainer.enable_checkpointing": "callbacks.checkpoints",
    "trainer.plugins": "trainer.strategy or trainer.precision",
    "trainer.gradient_clip_val": "optimizer.max_grad_norm",
    "trainer.gradient_clip_algorithm": "optimizer.max_grad_norm (by norm is the only way)",
    "trainer.overfit_batches": "debug=overfit",
    "data.seed": "seed",
    "data.tokenizer": "tokenizer",
    "data.context_length": "model.context_length",
    "task.labels": "data.labels",
    "task.class_counts": "data.balance",
    "task.pad_to": "data.pad_to",
    "task.pad_id": "tokenizer",
    "task.lora": "lora",
    "task.optimizer": "optimizer",
    "task.scheduler": "scheduler",
    "task.model": "model",
    "task.tokenizer": "tokenizer",
}
"""Arguments that the run itself fills in, and the setting to use instead."""

NOTHING_READS = {
    "optimizer.params": "it gets the model's parameters",
    "trainer.enable_model_summary": "the run logs its size itself",
    "trainer.enable_autolog_hparams": "the run writes config.yaml",
    "trainer.limit_predict_batches": "a run does not predict",
    "trainer.model_registry": "checkpoints stay in the run folder",
    "trainer.reload_dataloaders_every_n_epochs": "the data stay the same for a whole run",
    "trainer.sync_batchnorm": "no model here has a batch norm",
}
"""Arguments of Lightning's Trainer and of optimizers that have no effect here, and why."""

_SPECIAL_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


class Checked(NamedTuple):
    """A configuration that may run."""

    config: DictConfig
    """The configuration of the run, or of a multirun's first job."""
    full: DictConfig
    """The same as Hydra composed it, including Hydra's own part."""

    @property
    def is_multirun(self) -> bool:
        """Whether a file sets a multirun: `hydra.mode: MULTIRUN` of a sweep or an experiment."""
        return bool(self.full.hydra.mode == RunMode.MULTIRUN)


def check_overrides(argv: Sequence[str], config_dir: Path) -> DictConfig:
    """`checked(argv, config_dir).config`."""
    return checked(argv, config_dir).config


def checked(argv: Sequence[str], config_dir: Path) -> Checked:
    """`checked_settings`, and the classes that every `_target_` names, which are imported."""
    configuration = checked_settings(argv, config_dir)
    check_targets(configuration.config, _listed(configuration.config.allow_targets))
    return configuration


def checked_settings(argv: Sequence[str], config_dir: Path) -> Checked:
    """Compose and check the configuration of a command line; of a multirun, the first values.

    Classes are imported only if a `_target_` was typed: this takes a tenth of a second, without torch.

    Args:
        argv: the command line without the program.
        config_dir: the folder of train.yaml.

    Raises:
        ValueError: one line: a wrong group, option, key, value or target, and the nearest right one.
    """
    prepare_hydra()
    arguments = parse_arguments(argv)
    dirs = config_dirs(arguments.config_dir, config_dir)
    overrides = [parsed(text) for text in arguments.overrides]
    values = [values_of(override, dirs) for override in overrides]
    first = check_job([of_one[0] for of_one in values], dirs)
    swept = next((override for override in overrides if override.is_sweep_override()), None)
    if swept and not arguments.multirun and not first.is_multirun:
        raise ValueError(
            f"'{swept.input_line}' has several values: add -m to run them all, write a list ('KEY=[A,B]'), "
            "or quote it twice ('KEY=\"A,B\"')"
        )
    return first


def unknown_keys(
    config: Mapping[str, Any], known: Mapping[str, Any], allow: Sequence[str] = (), path: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """(dotted key, right keys) of every key that neither `known` nor the target of its node has.

    Args:
        config: nested dicts, interpolations as written.
        known: the dotted keys that the chosen files declare, with their values.
        allow: packages that targets may come from, besides `targets.PACKAGES`.
    """
    for key, value in config.items():
        inner = f"{path}.{key}" if path else str(key)
        is_node = isinstance(value, Mapping)
        declared = (
            inner in known
            or inner.startswith(OPEN)
            or key in _SPECIAL_KEYS
            or (path in OPEN_GROUPS and is_node and "_target_" in value)
        )
        if not declared:
            arguments = arguments_of(path, config["_target_"], allow) if "_target_" in config else []
            if arguments is not None and key not in arguments:
                yield inner, [*known, *(f"{path}.{argument}" for argument in arguments)]
        if is_node and (declared or "_target_" in value):
            yield from unknown_keys(value, known, allow, inner)


def values_of(override: Override, dirs: ConfigDirs) -> list[Override]:
    """A swept override as one override for each of its values.

    Raises:
        ValueError: if it has none.
    """
    value = override.value()
    if not override.is_sweep_override():
        return [override]
    if isinstance(value, Glob):
        texts = value.filter(dirs.options(override.key_or_group))
    elif isinstance(value, IntervalSweep):
        texts = [str(value.start), str(value.end)]  # the values between cannot be listed
    else:
        texts = list(override.sweep_string_iterator())
    if not texts:
        raise ValueError(f"'{override.input_line}' has no values")
    words = [word_as_meant(f"{override.get_key_element()}={text}", dirs.folders) for text in texts]  # as in the jobs
    return [parsed(word) for word in words]


def check_job(overrides: list[Override], dirs: ConfigDirs) -> Checked:
    """The checked configuration of one run.

    Args:
        overrides: with one value each.

    Raises:
        ValueError: as `checked_settings`.
    """
    groups = dirs.groups()
    for override in overrides:
        _check_override(override, groups, dirs)
    wrong: ValueError | None = None
    try:
        full = dirs.compose(_text(override) for override in overrides)
    except ValueError as error:  # Hydra suggests no right key: accept unknown keys, and name them below
        full, wrong = dirs.compose(_forced(override, groups) for override in overrides), error
    allow = _allowed(overrides, dirs)
    choices = full.hydra.runtime.choices
    typed = [override.key_or_group for override in overrides]

    def where(key: str) -> str:
        file = None if key in typed else dirs.file_that_sets(key, choices)
        return f" in {file}" if file else ""

    config = without_hydra(full)
    of_task = dirs.keys_of("task", choices.task)
    known = dirs.declared(choices) | {key: value for key, value in of_task.items() if f"{key}.".startswith("task.")}
    if is_off(choices, config):
        config = switched_off(config, choices, typed, of_task)
        known |= {group: {} for group in OPTIONAL if group not in known}
    if _listed(config.allow_targets) != allow:
        raise ValueError("allow_targets lets code run: set it on the command line or in train.yaml, nowhere else")
    for key, right in unknown_keys(plain(config, resolve=False), known, allow):
        option = option_with(key, dirs.folders, choices)
        if option:
            raise ValueError(f"{key}{where(key)} is a setting of {option}; choose that as well")
        raise ValueError(f"unknown key '{key}'{where(key)}; {hint(key, right)}")
    if wrong is not None:  # a plus is missing, or one too many
        raise wrong
    refuse_missing(config, {group: dirs.options(group) for group in groups}, _preset_of(choices))
    refuse_replaced(plain(config, resolve=False), where)
    settle(config, dotted(plain(config)), dirs.folders, where)
    resolved = plain(config)
    _check_values(resolved, known, where)
    if any("_target_" in _text(override) for override in overrides):
        check_targets(resolved, allow)
    check_hydra_targets(plain(full.hydra, resolve=False))
    return Checked(config, full)


def _preset_of(choices: Mapping[str, Any]) -> str:
    chosen = [f"{group}={choices[group]}" for group in ("experiment", "debug") if choices.get(group)]
    return f" in {' or '.join(chosen)}" if chosen else ""


def _check_override(override: Override, groups: Sequence[str], dirs: ConfigDirs) -> None:
    name = override.key_or_group
    refuse_renamed(name)
    if override.is_delete() and not name.startswith(tuple(f"{group}." for group in (*OPEN_GROUPS, "hydra.callbacks"))):
        raise ValueError(f"'{override.input_line}': a setting cannot be removed; give it a value, or null")
    chosen = override.value()
    for option in (chosen if isinstance(chosen, list) else [chosen]) if name in groups else []:
        if option is not None and str(option) not in dirs.options(name):
            raise ValueError(dirs.wrong_option(name, str(option)))


def _forced(override: Override, groups: Sequence[str]) -> str:
    """`KEY=VALUE` and `+KEY=VALUE` as `++KEY=VALUE`, which Hydra accepts whether or not the key exists."""
    if override.key_or_group in groups or override.is_delete() or override.is_hydra_override():
        return _text(override)
    return "++" + _text(override).lstrip("+")


def _text(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _allowed(overrides: list[Override], dirs: ConfigDirs) -> Sequence[str]:
    """`allow_targets` of the command line or the project's own train.yaml: files of `--config-dir` are ignored."""
    typed = [override.value() for override in overrides if override.key_or_group == "allow_targets"]
    allow = typed[-1] if typed else yaml_files.load(dirs.folders[-1] / "train.yaml").get("allow_targets")
    return _listed(allow)


def _listed(packages: Any) -> list[str]:
    if packages is None or isinstance(packages, str):
        return [packages] if packages else []
    return [str(package) for package in packages]


def _check_values(config: Mapping[str, Any], known: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """Refuse settings without effect, missing values, values of the wrong kind, and run names unfit for a folder."""
    values = dotted(config)
    for key, value in values.items():
        if key in SET_ELSEWHERE:
            raise ValueError(f"{key} would have no effect; set {SET_ELSEWHERE[key]} instead")
        if key in NOTHING_READS:
            raise ValueError(f"{key} would have no effect: {NOTHING_READS[key]}; leave it out")
        if key == "trainer.use_distributed_sampler" and value:
            raise ValueError(f"{key} must stay false: the data module itself shares batches among processes")
        if isinstance(value, str) and value == "???":
            raise ValueError(f"{key} has no default: add {key}=VALUE")
    refuse_removed(values)
    refuse_wrong_values(values, {key: _followed(default, known) for key, default in known.items()}, where)
    strategy = str(values.get("trainer.strategy"))
    if strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise ValueError(f"trainer.strategy={strategy} trains in processes that return nothing; use ddp")
    run_name = values["run_name"]
    if run_name is not None and not re.fullmatch(r"\w[\w.-]*", str(run_name)):
        raise ValueError(f"run_name={run_name!r} names a folder: use letters, digits, dot, dash and underscore")


def _followed(default: Any, known: Mapping[str, Any]) -> Any:
    """A default, or that of the setting it refers to."""
    while isinstance(default, str) and (other := re.fullmatch(r"\$\{([\w.]+)\}", default)):
        default = known.get(other[1])
    return default
