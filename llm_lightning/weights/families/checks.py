"""What the families check alike: names, shapes and types of tensors, values of `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.gpt import GPTConfig

EMBEDDING, HEAD = "token_embedding.weight", "lm_head.weight"


def check_names(actual: set[str], expected: set[str], family: str) -> None:
    """Refuse missing and unknown tensors."""
    problems = []
    for what, names in (("missing", expected - actual), ("unknown", actual - expected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what}: {', '.join(sorted(names)[:5])}{more}")
    if problems:
        raise ValueError(f"the weights do not fit this {family}; {'; '.join(problems)}")


def check_layers(config: GPTConfig, n_tensors: int, key: str) -> None:
    """Refuse a number of layers that the tensors cannot have, before that many names are made."""
    if config.n_layer > n_tensors:
        raise ValueError(f"the config says {key}={config.n_layer}, but the weights are only {n_tensors} tensors")


def fitted(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, which must be floating point and have the shape."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, not floating point; quantised weights are not supported")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} by the config")
    return tensor


def check_tie(ours: Mapping[str, Tensor], config: GPTConfig) -> None:
    """Refuse a head that differs from the token embedding if the config ties them."""
    head, embedding = ours[HEAD], ours[EMBEDDING]
    same = head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)  # NaN is not equal to itself
    if config.tied_head and not same:
        raise ValueError(f"{HEAD} differs from the token embedding, but the config says that they are tied")


def check_supported(config_json: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a value that our GPT does not compute; an absent key has the first of the `supported` values."""
    for key, values in supported.items():
        if config_json.get(key, values[0]) not in values:
            wanted = " or ".join(map(shown, values))
            raise ValueError(f"config.json: {key}={shown(config_json[key])} is not supported; it must be {wanted}")


def number(config_json: Mapping[str, Any], key: str, default: Any) -> Any:
    """A number of `config.json`: whole if the default is."""
    value = config_json.get(key, default)
    kinds = int if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"config.json: {key}={shown(value)} must be a number such as {default}")
    return value


def flag(config_json: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config_json.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={shown(value)} must be true or false")
    return value


def shown(value: Any) -> str:
    """A value of a JSON file for an error message, cut to one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
