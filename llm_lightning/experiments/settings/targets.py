"""Which classes a `_target_` may name: those of a few kinds, defined in a few packages.

Hydra instantiates nearly any callable. These checks look at the object itself, not its name:
`torch.serialization.os.system` is defined in `posix`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from llm_lightning.experiments.settings.nodes import plain

PACKAGES = ("llm_lightning", "torch", "lightning", "torchmetrics")
"""Packages that a `_target_` may name; `allow_targets` adds to them."""
_HYDRA_PACKAGES = ("hydra._internal.core_plugins", "hydra.experimental", "hydra_plugins")


def check_targets(config: Any, allow: Sequence[str] = (), *, path: str = "") -> None:
    """Refuse a `_target_`, at any depth, that is not a class of an allowed package and kind.

    Args:
        config: a resolved config: plain dicts and lists, or a DictConfig.
        allow: packages besides `PACKAGES`, whose classes and functions are all allowed.

    Raises:
        ValueError: naming the key and how to allow one's own package.
    """
    config = plain(config) if OmegaConf.is_config(config) else config
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
    """The class that the `_target_` at `key` names.

    Raises:
        ValueError: if it does not exist or is not allowed.
    """
    named = _locate(key, target, (*PACKAGES, *allow))
    if _inside(named.__module__, allow) and (inspect.isclass(named) or inspect.isfunction(named)):
        return named
    if not inspect.isclass(named):
        raise ValueError(f"{key}={target!r} is not a class; a _target_ names a class, such as lightning.Trainer")
    own_settings = _inside(named.__module__, PACKAGES[:1]) and is_dataclass(named)
    if not own_settings and not issubclass(named, _kinds()):
        names = ", ".join(kind.__name__ for kind in _kinds())
        raise ValueError(f"{key}={target!r} is none of the kinds of class that a config may build: {names}")
    return named


def arguments_of(path: str, target: Any, allow: Sequence[str]) -> list[str] | None:
    """The arguments that the target of the node at `path` accepts; None: any.

    A class of ours passes its `**kwargs` to its base class; Lightning's pass them on to unknown functions.
    """
    named = resolve_target(f"{path}._target_", target, allow)
    ours = inspect.isclass(named) and _inside(named.__module__, PACKAGES[:1])
    owners = inspect.getmro(named)[:-1] if ours else ()
    functions = [vars(owner)["__init__"] for owner in owners if "__init__" in vars(owner)] if ours else [named]
    names: list[str] = []
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        names += [parameter.name for parameter in parameters if parameter.name != "self"]
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return names
    return names if ours else None


def check_hydra_targets(config: Any, path: str = "hydra") -> None:
    """Refuse classes of other packages in Hydra's own part, which Hydra builds itself: launchers, log handlers.

    Raises:
        ValueError: naming the key.
    """
    for key, value in config.items() if isinstance(config, Mapping) else []:
        inner = f"{path}.{key}"
        logging_class = key in ("class", "()") and path.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
        if key == "_target_" and not inspect.isclass(_locate(inner, value, _HYDRA_PACKAGES)):
            raise ValueError(f"{inner}={value!r} is not a class")
        if logging_class and not inspect.isclass(_locate(inner, value, ("logging", "colorlog"))):
            raise ValueError(f"{inner}={value!r} is not a class")
        check_hydra_targets(value, inner)


def _locate(key: str, target: Any, packages: Sequence[str]) -> Any:
    """The object that the dotted name `target` names; only modules of `packages` are imported on the way."""
    refusal = f"{key}={target!r} is not allowed: it must be a class of {', '.join(packages)}"
    if PACKAGES[0] in packages:
        refusal += "; for a package of your own add allow_targets=[PACKAGE]"
    plain_name = isinstance(target, str) and re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)+", target, re.ASCII)
    if not plain_name or "__" in target or not _inside(target, packages):
        raise ValueError(refusal)
    named: Any = None
    names = target.split(".")
    for end, name in enumerate(names, start=1):
        try:
            named = getattr(named, name) if hasattr(named, name) else importlib.import_module(".".join(names[:end]))
        except Exception as error:  # whatever the module raises while it is imported
            cause = None if _inside(target, PACKAGES) else error  # the traceback shows its owner where
            hint = "; install the package, or put its folder on PYTHONPATH" if isinstance(error, ImportError) else ""
            raise ValueError(f"{key}={target!r} cannot be imported: {error}{hint}") from cause
    if isinstance(named, ModuleType) or not _inside(getattr(named, "__module__", None), packages):
        raise ValueError(refusal)
    return named


def _inside(name: Any, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@functools.cache
def _kinds() -> tuple[type, ...]:
    """The classes that a config may build, besides our own dataclasses."""
    import lightning as L
    import torch
    import torchmetrics
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    modules = (L.Trainer, L.LightningModule, L.LightningDataModule, L.Callback, torchmetrics.Metric)
    plugins = (Accelerator, Strategy, Logger, Profiler, Precision, CheckpointIO, ClusterEnvironment, LayerSync)
    return (*modules, *plugins, torch.optim.Optimizer)
