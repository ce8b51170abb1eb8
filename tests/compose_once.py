"""Hydra reads the files of conf/ anew for every command line; while the tests run in a process, each file once.

What is typed is still applied by Hydra, one word after the other. Processes that the tests start are not touched, nor
are the files of `--config-dir`, which may change from one command line to the next.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose_once(patch: pytest.MonkeyPatch) -> None:
    """Remember in this process what Hydra makes of each word, and of the files: each one, those chosen, their union.

    Hydra changes what it gets, so it gets a copy; unpickling copies six times faster than `copy.deepcopy` does.
    """
    from hydra._internal import config_loader_impl as loader
    from hydra._internal import config_repository
    from hydra._internal import defaults_list as lister
    from hydra._internal.defaults_list import DefaultsList, Overrides
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.plugins import Plugins
    from omegaconf import _utils, base, grammar_parser

    from llm_lightning.experiments.settings.compose import prepare_hydra

    interpolation = functools.cache(grammar_parser.parse)  # a tree that is only read
    patch.setattr(base, "parse", interpolation)
    patch.setattr(_utils, "parse", interpolation)
    patch.setattr(OverridesParser, "parse_rule", pickled_once(OverridesParser.parse_rule))
    prepare_hydra()
    Plugins.instance()  # imports the modules of the sources anew; the registry has the classes of these
    for scheme in ("file", "pkg"):
        read_each_once(patch, SourcesRegistry.instance().resolve(scheme))
    patch.setattr(config_repository, "copy", SimpleNamespace(copy=copy.copy, deepcopy=copy.copy))
    lists: dict[Any, DefaultsList] = {}
    unions: dict[str, bytes] = {}
    create_list = loader.create_defaults_list
    create_choices = lister._create_interpolation_map
    unite = loader.ConfigLoaderImpl._compose_config_from_defaults_list

    def defaults_list(repo: Any, config_name: Any, overrides_list: Any, **options: Any) -> DefaultsList:
        if not are_ours(repo):
            return create_list(repo, config_name, overrides_list, **options)
        overrides = Overrides(repo, overrides_list)
        typed = {id(override) for override in overrides.config_overrides}
        groups = tuple(override.input_line for override in overrides_list if id(override) not in typed)
        key = (config_name, groups, *sorted(options.items()))
        if key not in lists:
            lists[key] = create_list(repo, config_name, overrides_list, **options)
        known = lists[key]
        overrides.known_choices = known.overrides.known_choices
        return dataclasses.replace(known, config_overrides=overrides.config_overrides, overrides=overrides)

    def choices_if_needed(overrides: Any, defaults: Any, self_added: bool) -> Any:
        """What `${GROUP}` in a defaults list may refer to: half of Hydra's time goes into it, mostly for nothing."""
        needed = any(not default.is_self() and default.is_interpolation() for default in defaults)
        return create_choices(overrides, defaults, self_added) if needed else None

    def united(self: Any, defaults: Any, repo: Any) -> Any:
        if not are_ours(repo):
            return unite(self, defaults, repo)
        key = repr(defaults)
        if key not in unions:
            unions[key] = pickle.dumps(unite(self, defaults, repo))
        return pickle.loads(unions[key])

    patch.setattr(lister, "_create_interpolation_map", choices_if_needed)
    patch.setattr(loader, "create_defaults_list", defaults_list)
    patch.setattr(loader.ConfigLoaderImpl, "_compose_config_from_defaults_list", united)


def pickled_once(parse_rule: Any) -> Any:
    words: dict[tuple[str, str], bytes] = {}

    def parsed(self: Any, text: str, rule_name: str) -> Any:
        if (text, rule_name) not in words:
            words[text, rule_name] = pickle.dumps(parse_rule(self, text, rule_name))
        return pickle.loads(words[text, rule_name])

    return parsed


def read_each_once(patch: pytest.MonkeyPatch, kind: Any) -> None:
    files: dict[tuple[str, str], bytes] = {}
    load = kind.load_config

    def loaded(self: Any, config_path: str) -> Any:
        if not is_ours(self):
            return load(self, config_path)
        key = (self.path, config_path)
        if key not in files:
            files[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(files[key])

    patch.setattr(kind, "load_config", loaded)


def are_ours(repo: Any) -> bool:
    return all(is_ours(source) for source in repo.get_sources())


def is_ours(source: Any) -> bool:
    """Whether its files are of this project or of Hydra."""
    return source.scheme() != "file" or Path(source.path) == CONF
