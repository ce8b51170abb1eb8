"""Configs as plain values: nested dicts, or one dict of dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def plain(config: DictConfig, *, resolve: bool = True) -> Any:
    """Nested dicts and lists.

    Raises:
        ValueError: if an interpolation cannot be resolved.
    """
    try:
        return OmegaConf.to_container(config, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None


def dotted(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every dotted key below `node`, with its value; inner nodes have keys of their own too."""
    return dict(_walk(node, path))


def leaves(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`dotted` without the inner nodes."""
    return {key: value for key, value in _walk(node, path) if not isinstance(value, Mapping)}


def _walk(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        if isinstance(value, Mapping):
            yield from _walk(value, inner)
