"""Hydra reads the files of conf/ anew for every command line; while the tests run in a process, each file once.

What is typed is still applied by Hydra, one word after the other. Processes that the tests start are not touched, nor
are command lines with files of their own (`--config-dir`), which may change from one to the next.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose_once(patch: pytest.MonkeyPatch) -> None:
    """Remember in this process what Hydra makes of the files alone: each one, the list of those chosen, their union.

    Hydra changes what it gets, so it gets a copy; unpickling copies six times faster than `copy.deepcopy` does.
    """
    from hydra._internal import config_loader_impl as loader
    from hydra._internal.config_repository import ConfigRepository
    from hydra._internal.defaults_list import DefaultsList, Overrides

    files: dict[str, bytes] = {}
    lists: dict[Any, DefaultsList] = {}
    unions: dict[str, bytes] = {}
    create_list = loader.create_defaults_list
    unite = loader.ConfigLoaderImpl._compose_config_from_defaults_list
    load_file = ConfigRepository.load_config

    def loaded(self: Any, config_path: str) -> Any:
        if not are_ours(self):
            return load_file(self, config_path)
        if config_path not in files:
            files[config_path] = pickle.dumps(load_file(self, config_path))
        return pickle.loads(files[config_path])

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

    def united(self: Any, defaults: Any, repo: Any) -> Any:
        if not are_ours(repo):
            return unite(self, defaults, repo)
        key = repr(defaults)
        if key not in unions:
            unions[key] = pickle.dumps(unite(self, defaults, repo))
        return pickle.loads(unions[key])

    patch.setattr(ConfigRepository, "load_config", loaded)
    patch.setattr(loader, "create_defaults_list", defaults_list)
    patch.setattr(loader.ConfigLoaderImpl, "_compose_config_from_defaults_list", united)


def are_ours(repo: Any) -> bool:
    """Whether all files are of this project or of Hydra."""
    return all(source.scheme() != "file" or Path(source.path) == CONF for source in repo.get_sources())
