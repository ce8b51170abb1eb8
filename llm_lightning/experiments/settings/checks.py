"""Checks between the command line and the run: every wrong setting ends in one line that names the right one.

Hydra accepts an unknown key silently behind a `+` and inside an experiment file, and instantiates nearly any callable
that a `_target_` names. Here the keys that a group's own files declare, and the arguments of a node's target, are all
there is; and a target must be a class of a few kinds, defined in a few packages.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_lightning.experiments.settings.groups import OPTIONAL, is_off, option_with, refuse_missing, switched_off
from llm_lightning.experiments.settings.help import group_options
from llm_lightning.experiments.settings.ignored import dotted
from llm_lightning.experiments.settings.meaning import settle, word_as_meant
from llm_lightning.experiments.settings.overrides import parsed
from llm_lightning.experiments.settings.values import refuse_wrong_values

PRESETS = ("task", "experiment", "pipeline", "sweep", "debug")
"""Groups whose files pick and set, but declare no key (a task declares its own node)."""

OPEN_GROUPS = ("callbacks", "logger")
"""Groups that take further members, under any name, as long as they have a `_target_`."""

PACKAGES = ("llm_lightning", "torch", "lightning", "torchmetrics")
"""Packages that a `_target_` may name; `allow_targets` adds to them."""

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
"""Arguments that the run itself fills in, and the setting it takes them from."""

NOTHING_READS = {
    "trainer.enable_model_summary": "the run says its size in a line of its own",
    "trainer.enable_autolog_hparams": "the run writes config.yaml",
    "trainer.limit_predict_batches": "a run does not predict",
    "trainer.model_registry": "checkpoints stay in the run folder",
    "trainer.reload_dataloaders_every_n_epochs": "the data stay the same for a whole run",
    "trainer.sync_batchnorm": "no model here has a batch norm",
}
"""Arguments of Lightning's Trainer without an effect here, and why."""

MAY_CHANGE = (
    "trainer.max_epochs",  # training on is what resuming is for; a schedule is stretched to the new length
    "trainer.max_steps",
    "trainer.max_time",
    "callbacks.early_stopping*",
    "trainer.enable_progress_bar",  # what is shown and logged, and who prepares the batches, changes no weight
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "data.num_workers",
    "logger.*",
    "callbacks.checkpoints.every_n_*",
    "callbacks.checkpoints.keep",
    "callbacks.samples*",
    "callbacks.plots*",
    "callbacks.throughput*",
    "data.path",  # where things are: what is there is compared by its digest
    "init_from",
    "allow_targets",  # how this start of the run is done, not what it computes
    "resume",
    "run_name",
)
"""Settings that may differ when a run is resumed, as patterns."""

_SPECIAL_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
_HYDRA_PACKAGES = ("hydra._internal.core_plugins", "hydra.experimental", "hydra_plugins")


@dataclass(frozen=True)
class ConfigDirs:
    """Where YAML files are looked for: the folder of `--config-dir`, if any, then the project's own."""

    folders: tuple[Path, ...]

    def groups(self) -> list[str]:
        """The folders: `model`, `optimizer` ..."""
        return sorted({path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()})

    def options(self, group: str) -> list[str]:
        """The files of a group, subfolders included: `book/ch05`."""
        return sorted({option for folder in self.folders for option in group_options(folder, group)})

    def file_that_sets(self, key: str, choices: Mapping[str, Any]) -> Path | None:
        """The chosen preset file in which `key` stands."""
        files = (folder / group / f"{choices.get(group)}.yaml" for group in PRESETS for folder in self.folders)
        return next((file for file in files if file.is_file() and key in _nodes(OmegaConf.load(file))), None)

    def compose(self, overrides: Iterable[str]) -> DictConfig:
        """The config, Hydra's own part included; Hydra's errors become one line."""
        added = [f"hydra.searchpath=['file://{folder}']" for folder in self.folders[:-1]]
        try:
            with initialize_config_dir(str(self.folders[-1]), version_base="1.3"):
                return compose("train", [*overrides, *added], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(self._explain(" ".join(str(error).split()))) from None

    def _explain(self, message: str) -> str:
        """Hydra's words where they are clear; ours, with the nearest right name, where a name was wrong."""
        group = re.search(r"In '(.+?)': Could not override '([\w/]+).*No match in the defaults list", message)
        if group:
            return f"unknown group '{group[2]}' in {group[1]}.yaml; {_hint(group[2], self.groups())}"
        option = re.search(r"Could not (?:find|load) '([\w-]+)/([^']+)'", message)
        if option:
            return self.wrong_option(option[1], option[2])
        plus = re.search(r"To append to your config use (\S+)", message)
        if plus and plus[1].startswith("+hydra."):
            return f"unknown key '{plus[1][1:].partition('=')[0]}'; python train.py --cfg hydra lists Hydra's own"
        if plus:
            return f"{plus[1][1:]}: not in our files, but an argument of its target: write {plus[1]}"
        return message

    def wrong_option(self, group: str, option: str) -> str:
        options = self.options(group)
        return f"{group}={option}: no such option; {_hint(option, options)} ({group}: {', '.join(options)})"


def check_overrides(argv: Sequence[str], config_dir: Path) -> DictConfig:
    """Compose what the command line asks for and check it, before Hydra does; of a multirun, every value.

    Args:
        argv: the command line without the program.
        config_dir: the folder of train.yaml.

    Returns:
        the config of the run, of a multirun the first.

    Raises:
        ValueError: one line: a wrong group, option, key, value or target, and the nearest right one.
    """
    arguments, dirs = _arguments_and_dirs(argv, config_dir)
    overrides = [parsed(text) for text in arguments.overrides]
    (first, hydra), *_ = [_check_job(job, dirs) for job in _jobs(overrides, dirs, multirun=arguments.multirun)]
    if arguments.multirun or hydra.mode == RunMode.MULTIRUN:
        in_files = [parsed(f"{key}={values}") for key, values in (hydra.sweeper.get("params") or {}).items()]
        for job in _jobs([*in_files, *overrides], dirs, multirun=True) if in_files else []:
            _check_job(job, dirs)
    return first


def asks_for_many(argv: Sequence[str], config_dir: Path) -> bool:
    """Whether a file that `argv` chooses makes a multirun of it: `hydra.mode: MULTIRUN` in an experiment's."""
    arguments, dirs = _arguments_and_dirs(argv, config_dir)
    return dirs.compose(arguments.overrides).hydra.mode == RunMode.MULTIRUN


def _arguments_and_dirs(argv: Sequence[str], config_dir: Path) -> tuple[Any, ConfigDirs]:
    register_resolvers()
    arguments = _parse_arguments(argv)
    folders = [Path(arguments.config_dir), config_dir] if arguments.config_dir else [config_dir]
    return arguments, ConfigDirs(tuple(folder.absolute() for folder in folders))


def unknown_keys(
    config: Mapping[str, Any], known: Mapping[str, Any], allow: Sequence[str] = (), path: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """(dotted key, right keys) of every key that neither `known` nor the target of its node has.

    Args:
        config: plain dicts, as `OmegaConf.to_container` returns them.
        known: the dotted keys that the chosen files declare, with their values.
        allow: packages that targets may come from beside `PACKAGES`.
    """
    for key, value in config.items():
        inner = f"{path}.{key}" if path else str(key)
        is_node = isinstance(value, Mapping)
        declared = inner in known or key in _SPECIAL_KEYS or (path in OPEN_GROUPS and is_node and "_target_" in value)
        if not declared:
            arguments = _arguments(path, config["_target_"], allow) if "_target_" in config else []
            if arguments is not None and key not in arguments:
                yield inner, [*known, *(f"{path}.{argument}" for argument in arguments)]
        if is_node and (declared or "_target_" in value):
            yield from unknown_keys(value, known, allow, inner)


def check_targets(config: Any, allow: Sequence[str] = (), *, path: str = "") -> None:
    """Refuse a `_target_` that is not a class of an allowed package and kind, wherever it stands.

    Args:
        config: a resolved config: plain dicts and lists, or a DictConfig.
        allow: packages beside `PACKAGES`, whose classes and functions are all allowed.

    Raises:
        ValueError: naming the key and how to allow one's own package.
    """
    config = _plain(config) if OmegaConf.is_config(config) else config
    if isinstance(config, Mapping):
        for key, value in config.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                resolve_target(inner, value, allow)
            check_targets(value, allow, path=inner)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            check_targets(value, allow, path=f"{path}[{index}]")


def resolve_target(key: str, target: Any, allow: Sequence[str] = ()) -> Any:
    """The class that a `_target_` names; `key` is where it stands.

    What counts is the object itself, not its name: `torch.serialization.os.system` is defined in `posix`.

    Raises:
        ValueError: if it does not exist or is not allowed.
    """
    found = _locate(key, target, (*PACKAGES, *allow))
    if _inside(found.__module__, allow) and (inspect.isclass(found) or inspect.isfunction(found)):
        return found
    if not inspect.isclass(found):
        raise ValueError(f"{key}={target!r} is not a class; a _target_ names a class, such as lightning.Trainer")
    own_settings = _inside(found.__module__, PACKAGES[:1]) and is_dataclass(found)
    if not own_settings and not issubclass(found, _kinds()):
        names = ", ".join(kind.__name__ for kind in _kinds())
        raise ValueError(f"{key}={target!r} is none of the kinds of class that a config may build: {names}")
    return found


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every difference; a key that is not there counts as None."""
    before, after = _leaves(old), _leaves(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to resume a run with settings that change its results; `MAY_CHANGE` lists those that do not.

    Raises:
        ValueError: naming every changed key, its old and its new value.
    """
    changed = [
        f"{key} was {before!r} and is {after!r}"
        for key, before, after in diff_configs(old, new)
        if not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    ]
    if changed:
        raise ValueError(
            f"cannot resume with other settings: {'; '.join(changed)}; "
            "give the old values again, or start a new run under another run_name"
        )


def register_resolvers() -> None:
    """Teach OmegaConf `${run_folder:NAME}`, which conf/train.yaml uses."""
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


@functools.cache  # one name per process: Hydra and every launched process must see the same folder
def _run_folder(run_name: Any) -> str:
    """The name of the run, or date, time and eight random digits: runs started in the same second stay apart."""
    if run_name is not None:
        return str(run_name)
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(4)}"


def _parse_arguments(argv: Sequence[str]) -> Any:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; settings are written KEY=VALUE, and --help lists them")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args(list(argv))
    if arguments.experimental_rerun:
        raise ValueError("--experimental-rerun reads a pickle, which can run any code; type the command again instead")
    if arguments.config_path or arguments.config_name:
        raise ValueError(
            "--config-path and --config-name would go round the checks; use --config-dir FOLDER to add files"
        )
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise ValueError(f"--config-dir {arguments.config_dir}: no such folder")
    return arguments


def _jobs(overrides: list[Override], dirs: ConfigDirs, *, multirun: bool) -> list[list[Override]]:
    """Lists of single-valued overrides: the first values of all, then each further value of each swept key."""
    swept = next((override for override in overrides if override.is_sweep_override()), None)
    if swept and not multirun:
        raise ValueError(
            f"'{swept.input_line}' has several values: add -m to run them all, write a list ('KEY=[A,B]'), "
            "or quote it twice ('KEY=\"A,B\"')"
        )
    values = [_values(override, dirs) for override in overrides]
    first = [found[0] for found in values]
    return [first] + [
        [*first[:index], value, *first[index + 1 :]] for index, found in enumerate(values) for value in found[1:]
    ]


def _values(override: Override, dirs: ConfigDirs) -> list[Override]:
    """A swept override as one override for each of its values."""
    value = override.value()
    if not override.is_sweep_override():
        return [override]
    if isinstance(value, Glob):
        texts = value.filter(dirs.options(override.key_or_group))
    elif isinstance(value, IntervalSweep):
        texts = [str(value.start), str(value.end)]  # what lies between cannot be listed
    else:
        texts = list(override.sweep_string_iterator())
    if not texts:
        raise ValueError(f"'{override.input_line}' has no values")
    words = [word_as_meant(f"{override.get_key_element()}={text}", dirs.folders) for text in texts]  # as the jobs will
    return [parsed(word) for word in words]


def _check_job(overrides: list[Override], dirs: ConfigDirs) -> tuple[DictConfig, DictConfig]:
    """The checked config of one run, and Hydra's own part beside it."""
    groups = dirs.groups()
    for override in overrides:
        _check_override(override, groups, dirs)
    # Hydra names no near miss, so that unknown keys are let in here, and found and named below.
    full = dirs.compose(_forced(override, groups) for override in overrides)
    allow = _allowed(overrides, dirs)
    choices = full.hydra.runtime.choices
    typed = [override.key_or_group for override in overrides]

    def where(key: str) -> str:
        file = None if key in typed else dirs.file_that_sets(key, choices)
        return f" in {file}" if file else ""

    config = _ours(full)
    reference = _reference(choices, overrides, dirs)
    declared = _compose_once(dirs, (f"task={choices.task}", *_of_allow_targets(overrides))).task
    known = _nodes(reference) | _nodes({"task": _plain(declared, resolve=False)})
    if is_off(choices, config):
        of_task = _compose_once(dirs, (f"task={choices.task}", "callbacks=none", "logger=none", "lora=none"))
        config = switched_off(config, choices, typed, _plain(of_task, resolve=False))
        known |= {group: {} for group in OPTIONAL if group not in known}
    for key, right in unknown_keys(_plain(config, resolve=False), known, allow):
        option = option_with(key, dirs.folders, choices)
        if option:
            raise ValueError(f"{key}{where(key)} is a setting of {option}; choose that as well")
        raise ValueError(f"unknown key '{key}'{where(key)}; {_hint(key, right)}")
    forced = [override for override in overrides if _forced(override, groups) != _text(override)]
    if any(override.is_add() or override.key_or_group not in known for override in forced):
        dirs.compose(_text(override) for override in overrides)  # is a plus missing, or one too many?
    if config.allow_targets != allow:
        raise ValueError("allow_targets lets code run: set it on the command line or in train.yaml, nowhere else")
    refuse_missing(config, {group: dirs.options(group) for group in groups}, _preset_of(choices))
    settle(config, _nodes(_plain(config)), dirs.folders, where)
    _check_values(config, known, where)
    check_targets(config, allow)
    _check_hydra_targets(_plain(full.hydra, resolve=False))
    return config, full.hydra


def _preset_of(choices: Mapping[str, Any]) -> str:
    chosen = [f"{group}={choices[group]}" for group in ("experiment", "debug") if choices.get(group)]
    return f" in {' or '.join(chosen)}" if chosen else ""


def _check_override(override: Override, groups: Sequence[str], dirs: ConfigDirs) -> None:
    name = override.key_or_group
    if override.is_delete() and not name.startswith(tuple(f"{group}." for group in (*OPEN_GROUPS, "hydra.callbacks"))):
        raise ValueError(f"'{override.input_line}': a setting cannot be removed; give it a value, or null")
    chosen = override.value()
    for option in (chosen if isinstance(chosen, list) else [chosen]) if name in groups else []:
        if option is not None and str(option) not in dirs.options(name):
            raise ValueError(dirs.wrong_option(name, str(option)))


def _forced(override: Override, groups: Sequence[str]) -> str:
    """`KEY=VALUE` and `+KEY=VALUE` as `++KEY=VALUE`, which Hydra takes whether or not there is such a key."""
    if override.key_or_group in groups or override.is_delete() or override.is_hydra_override():
        return _text(override)
    return "++" + _text(override).lstrip("+")


def _text(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _reference(choices: Mapping[str, Any], overrides: list[Override], dirs: ConfigDirs) -> DictConfig:
    """The config of the chosen groups without any preset: every key in it is one that something reads."""
    groups = [
        f"~{group}" if choice is None else f"{group}={choice}"
        for group, choice in choices.items()
        if group in set(dirs.groups()) - set(PRESETS)
    ]
    return _ours(_compose_once(dirs, (*groups, *_of_allow_targets(overrides), "~task")))


def _allowed(overrides: list[Override], dirs: ConfigDirs) -> Sequence[str]:
    """`allow_targets` of the command line or the project's own train.yaml: no file of `--config-dir` has a say."""
    return _compose_once(ConfigDirs(dirs.folders[-1:]), (*_of_allow_targets(overrides), "~task")).allow_targets


def _of_allow_targets(overrides: list[Override]) -> list[str]:
    return [_text(override) for override in overrides if override.key_or_group == "allow_targets"]


@functools.cache  # the jobs of a multirun mostly choose the same groups
def _compose_once(dirs: ConfigDirs, overrides: tuple[str, ...]) -> DictConfig:
    return dirs.compose(overrides)


def _ours(config: DictConfig) -> DictConfig:
    """`config` without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _check_values(config: DictConfig, known: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """Refuse what has no effect, a missing value, a value of the wrong kind, and a run name that is no folder name."""
    values = _nodes(_plain(config))
    for key, value in values.items():
        if key in SET_ELSEWHERE:
            raise ValueError(f"{key} would have no effect; set {SET_ELSEWHERE[key]} instead")
        if key in NOTHING_READS:
            raise ValueError(f"{key} would have no effect: {NOTHING_READS[key]}; leave it out")
        if key == "trainer.use_distributed_sampler" and value:
            raise ValueError(f"{key} must stay false: the data module itself shares batches among processes")
        if isinstance(value, str) and value == "???":
            raise ValueError(f"{key} has no default: add {key}=VALUE")
    refuse_wrong_values(values, {key: _followed(default, known) for key, default in known.items()}, where)
    strategy = str(config.trainer.get("strategy"))
    if strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise ValueError(f"trainer.strategy={strategy} trains in processes that hand nothing back; use ddp")
    if config.run_name is not None and not re.fullmatch(r"\w[\w.-]*", str(config.run_name)):
        raise ValueError(f"run_name={config.run_name!r} names a folder: use letters, digits, dot, dash and underscore")


def _followed(default: Any, known: Mapping[str, Any]) -> Any:
    """A default, or what it takes over from another setting."""
    while isinstance(default, str) and (other := re.fullmatch(r"\$\{([\w.]+)\}", default)):
        default = known.get(other[1])
    return default


def _plain(config: DictConfig, *, resolve: bool = True) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None


def _nodes(config: Any) -> dict[str, Any]:
    """Every dotted key below `config`, nodes included, with its unresolved value."""
    plain: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    return dotted(plain)


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _nodes(config).items() if not isinstance(value, Mapping)}


def _hint(name: str, candidates: Iterable[str]) -> str:
    """The nearest right name: one with the same last part before any other."""
    names = sorted(set(candidates))
    namesakes = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(name, namesakes, 1, cutoff=0.0) or difflib.get_close_matches(name, names, 1)
    return f"did you mean '{nearest[0]}'?" if nearest else "python train.py --help lists all"


def _arguments(path: str, target: Any, allow: Sequence[str]) -> list[str] | None:
    """The arguments that the target of the node at `path` takes; None: any.

    A class of ours hands its `**kwargs` to its base class; Lightning's hand them to who knows whom.
    """
    found = resolve_target(f"{path}._target_", target, allow)
    ours = inspect.isclass(found) and _inside(found.__module__, PACKAGES[:1])
    owners = inspect.getmro(found)[:-1] if ours else ()
    functions = [vars(owner)["__init__"] for owner in owners if "__init__" in vars(owner)] if ours else [found]
    names: list[str] = []
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        names += [parameter.name for parameter in parameters if parameter.name != "self"]
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return names
    return names if ours else None


def _locate(key: str, target: Any, packages: Sequence[str]) -> Any:
    """The object that the dotted name `target` names; only modules of `packages` are imported on the way."""
    refusal = f"{key}={target!r} is not allowed: only a class of {', '.join(packages)} may stand here"
    if PACKAGES[0] in packages:
        refusal += "; for a package of your own add allow_targets=[PACKAGE]"
    plain_name = isinstance(target, str) and re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)+", target, re.ASCII)
    if not plain_name or "__" in target or not _inside(target, packages):
        raise ValueError(refusal)
    found: Any = None
    names = target.split(".")
    for end, name in enumerate(names, start=1):
        try:
            found = getattr(found, name) if hasattr(found, name) else importlib.import_module(".".join(names[:end]))
        except Exception as error:  # whatever the module raises while it is imported
            cause = None if _inside(target, PACKAGES) else error  # its owner wants to see where
            raise ValueError(f"{key}={target!r} cannot be imported: {error}") from cause
    if isinstance(found, ModuleType) or not _inside(getattr(found, "__module__", None), packages):
        raise ValueError(refusal)
    return found


def _inside(name: Any, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@functools.cache
def _kinds() -> tuple[type, ...]:
    """What a config may build, beside our own dataclasses."""
    import lightning as L
    import torchmetrics
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    modules = (L.Trainer, L.LightningModule, L.LightningDataModule, L.Callback, torchmetrics.Metric)
    return (*modules, Accelerator, Strategy, Logger, Profiler, Precision, CheckpointIO, ClusterEnvironment, LayerSync)


def _check_hydra_targets(config: Any, path: str = "hydra") -> None:
    """Refuse classes of other packages in Hydra's own part, which Hydra builds itself: launchers, log handlers."""
    for key, value in config.items() if isinstance(config, Mapping) else []:
        inner = f"{path}.{key}"
        logging_class = key in ("class", "()") and path.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
        if key == "_target_" and not inspect.isclass(_locate(inner, value, _HYDRA_PACKAGES)):
            raise ValueError(f"{inner}={value!r} is not a class")
        if logging_class and not inspect.isclass(_locate(inner, value, ("logging", "colorlog"))):
            raise ValueError(f"{inner}={value!r} is not a class")
        _check_hydra_targets(value, inner)
