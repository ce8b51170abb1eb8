"""Compose the configuration of a command line: Hydra's errors become one line that names the right word."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_lightning.experiments.ranks.naming import drawn_name
from llm_lightning.experiments.settings import yaml_files
from llm_lightning.experiments.settings.nodes import dotted
from llm_lightning.experiments.settings.overrides import key_of, parsed
from llm_lightning.experiments.settings.yaml_files import ConfigFiles, package_of, read_defaults
from llm_lightning.nearest import nearest

PRESETS = ("task", "experiment", "pipeline", "sweep", "debug")
"""Groups whose files choose and set, but declare no keys (a task declares only its own node)."""

LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")
"""Launchers of the extra `sweep`."""

BROUGHT, OF_WEIGHTS = ("model", "tokenizer"), "_of_weights"
"""Groups that come with the weights of `init_from`, and the file that is then read instead of the chosen ones."""

PLUGINS = Path(__file__).parents[1] / "sweep" / "plugins"
"""The folder of `hydra_plugins`, the package that Hydra looks for plugins in."""


@dataclass(frozen=True)
class ConfigDirs(ConfigFiles):
    """`ConfigFiles`, the keys that they declare, and Hydra's composition of them."""

    def groups(self) -> list[str]:
        """The names of their folders: `model`, `optimizer` ..."""
        return sorted({path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()})

    def file_that_sets(self, key: str, choices: Mapping[str, Any]) -> Path | None:
        """The chosen preset file that sets `key`."""
        files = (self.file_of(group, choices.get(group)) for group in PRESETS)
        return next((file for file in files if file and key in dotted(yaml_files.load(file))), None)

    def declared(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted key -> value as written, of train.yaml and the chosen files of all groups but presets.

        Something reads each of these keys.
        """
        keys = dotted(_without_hydra(yaml_files.load(self.folders[-1] / "train.yaml")))
        groups = set(self.groups()) - set(PRESETS)
        for group, option in reversed(list(choices.items())):  # Hydra lists them from the last to the first
            if option is not None and group in groups:
                keys |= self.keys_of(group, option)
        return keys

    def keys_of(self, group: str, option: str) -> dict[str, Any]:
        """Dotted key -> value as written, of one file and those of its group that it builds on."""
        file = self.file_of(group, option)
        if file is None:
            return {}
        keys: dict[str, Any] = {}
        for other, base in read_defaults(file):
            if other is None:
                keys |= self.keys_of(group, base)
            elif group not in PRESETS:
                keys |= self.keys_of(other, base)
        package = package_of(file, group)
        parents = package.split(".") if package else []
        nodes: dict[str, Any] = {".".join(parents[: depth + 1]): {} for depth in range(len(parents))}
        return keys | nodes | dotted(yaml_files.load(file), package)

    def compose(self, overrides: Iterable[str]) -> DictConfig:
        """The config, Hydra's own part included; with `init_from`, of what the weights bring nothing but typed keys.

        Raises:
            ValueError: one line: Hydra's, or ours where a group, option or key has a wrong name.
        """
        words = list(overrides)
        typed = [word.partition("=")[2] for word in words if key_of(word) == "init_from"]
        if not typed or typed[-1] == "null":
            config = self._composed(words)
            if config.get("init_from") is None:  # ??? as well
                return config
        kept = [word for word in words if key_of(word) not in BROUGHT]
        return self._composed([*kept, *(f"{group}={OF_WEIGHTS}" for group in BROUGHT)])

    def _composed(self, overrides: Iterable[str]) -> DictConfig:
        added = [f"hydra.searchpath=['file://{folder}']" for folder in self.folders[:-1]]
        try:
            with _no_other_hydra(), initialize_config_dir(str(self.folders[-1]), version_base="1.3"):
                return compose("train", [*overrides, *added], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            reason = f": {error.__cause__}" if str(error).startswith("Error merging override") else ""
            raise ValueError(self._explain(" ".join(f"{error}{reason}".split()))) from None

    def _explain(self, message: str) -> str:
        """Hydra's message if it is clear; ours, with the nearest right name, if a name is wrong."""
        group = re.search(r"In '(.+?)': Could not override '([\w/]+).*No match in the defaults list", message)
        if group:
            return f"unknown group '{group[2]}' in {group[1]}.yaml; {hint(group[2], self.groups())}"
        own = re.search(r"Could not (?:find|load) '(hydra/\w+)/([^']+)'", message)
        if own and own[1] == "hydra/launcher" and own[2] in LAUNCHERS:
            return f"{own[1]}={own[2]} is not installed: pip install 'llm-lightning[sweep]'"
        if own:
            options = re.search(r"Available options in '[^']+': (.+?) Config search path", message)
            return f"{own[1]}={own[2]}: no such option ({', '.join(options[1].split()) if options else message})"
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
        """The message for `GROUP=OPTION` without a file."""
        options = self.options(group)
        return f"{group}={option}: no such option; {hint(option, options)} ({group}: {', '.join(options)})"


@dataclass(frozen=True)
class SharedCompositions(ConfigDirs):
    """`ConfigDirs` for the jobs of a sweep: what Hydra makes of one choice of files is computed once.

    Reading and merging the files is nine tenths of the work; the other settings are applied to a copy by Hydra's own
    function.
    """

    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict, compare=False)
    """The words that choose files -> the config."""

    def _composed(self, overrides: Iterable[str]) -> DictConfig:
        words = [parsed(word) for word in overrides]
        groups = self.groups()
        choose = [word for word in words if word.key_or_group in groups or "/" in word.key_or_group]
        files = tuple(str(word.input_line) for word in choose if not isinstance(word.value(), dict))
        if files not in self.composed:
            self.composed[files] = super()._composed(files)
        config = copy.deepcopy(self.composed[files])
        try:
            ConfigLoaderImpl._apply_overrides_to_config(
                [word for word in words if word.input_line not in files], config
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(self._explain(" ".join(str(error).split()))) from None
        return config


@contextlib.contextmanager
def _no_other_hydra() -> Iterator[None]:
    """Hide the Hydra that is composing a multirun while each of its jobs is composed."""
    instance = GlobalHydra.instance()
    hydra, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        instance.hydra = hydra


def config_dirs(config_dir: str | None, project: Path) -> ConfigDirs:
    """The folder of `--config-dir`, if any, and the project's `conf`."""
    folders = [Path(config_dir), project] if config_dir else [project]
    return ConfigDirs(tuple(folder.absolute() for folder in folders))


def without_hydra(config: DictConfig) -> DictConfig:
    """`config` without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def prepare_hydra() -> None:
    """Let Hydra find the sweeper of `-m`, and register `${run_folder:NAME}`, which conf/train.yaml uses, for one start.

    A name is drawn here for a folder that has none, once per start, so that Hydra sees the same folder each time.
    """
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    name_folders(drawn_name())


def name_folders(name: str) -> None:
    """Let a folder that nobody named have this name."""
    OmegaConf.register_new_resolver(
        "run_folder", lambda run_name: name if run_name is None else str(run_name), replace=True
    )


def hint(name: str, candidates: Sequence[str] | Iterable[str]) -> str:
    """The nearest right name: one with the same last part before any other."""
    names = sorted(set(candidates))
    namesakes = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = nearest(name, namesakes, cutoff=0.0) or nearest(name, names)
    return f"did you mean '{near}'?" if near else "python train.py --help lists all"


def _without_hydra(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "hydra"}
