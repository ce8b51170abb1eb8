"""The weights of a checkpoint, compared with its header by arithmetic: nothing as large as a header claims is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.models.shapes import linear_shapes, parameter_shapes
from llm_lightning.weights.checks.header import HEADER, config_of, lora_of
from llm_lightning.weights.checks.kinds import is_tensor, refuse_unknown, shape_of, word

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")


def check_weights(header: Mapping[str, Any], tensors: Any, n_bytes: int) -> None:
    """Compare the names, shapes and types of a checkpoint's `state_dict` with its header, without building a model."""
    if not isinstance(tensors, dict):
        raise ValueError("it does not hold what a model needs: state_dict is missing")
    if strange := [name for name, value in tensors.items() if not isinstance(name, str) or not is_tensor(value)]:
        raise ValueError(f"state_dict: {short(strange[0])} is not a named tensor")
    own = of_model(tensors)
    largest = sum(tensor.nbytes for name, tensor in own.items() if not name.endswith("lm_head.weight"))
    if largest > n_bytes:
        raise ValueError(f"state_dict: its tensors would take {largest:,} bytes, the file has {n_bytes:,}")
    for name, tensor in own.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"state_dict.model.{name} is {tensor.dtype}, no floating-point type that models have")
    plain = {name: tensor for name, tensor in own.items() if "lora_" not in name}
    _check_plain(header, plain)
    lora = {name.removesuffix(".default"): tensor for name, tensor in own.items() if "lora_" in name}
    _check_lora(header, lora)


def check_values(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Refuse weights that are not finite, and a tied head that differs from the embedding."""
    own = of_model(tensors)
    for name, tensor in own.items():
        if not _is_finite(tensor):
            raise ValueError(f"state_dict.model.{name} has values that are not finite")
    for prefix in ("", "trunk."):
        head, embedding = own.get(f"{prefix}lm_head.weight"), own.get(f"{prefix}token_embedding.weight")
        if head is None or embedding is None or not header["model"]["tied_head"]:
            continue
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise ValueError(f"{HEADER}.model.tied_head=true, but lm_head differs from the token embedding")


def of_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model by its own names, without those of a reference."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if is_of_model(name)}


def is_of_model(name: str) -> bool:
    """Whether a tensor belongs to the model itself, not to its reference."""
    return name.startswith("model.") and ("lora_" not in name or name.endswith(".default"))


def n_parameters(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """The number of parameters of a checked checkpoint's model, a tied weight counted once."""
    config = config_of(header)
    one, two = (sum(_sizes(config, n_layer)) for n_layer in (1, 2))
    number = one + (config.n_layer - 1) * (two - one)
    if "classifier" in header:
        number += len(header["classifier"]["labels"]) * (config.n_embd + 1)
    return number + sum(tensor.numel() for name, tensor in of_model(tensors).items() if "lora_" in name)


def _check_plain(header: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Compare all but the adapters with the header."""
    config, expected = config_of(header), dict[str, tuple[int, ...]]()
    prefix = "trunk." if "classifier" in header else ""
    if "base" not in header:
        blocks = len({match[1] for name in found if (match := _BLOCK.match(name.removeprefix(prefix)))})
        if blocks != config.n_layer:  # before a wrong number makes that many names
            raise ValueError(f"{HEADER}.model.n_layer={config.n_layer}, but its weights have {blocks} blocks")
        expected = {f"{prefix}{name}": shape for name, shape in parameter_shapes(config).items()}
    if prefix:
        labels = header["classifier"]["labels"]
        expected |= {"head.weight": (len(labels), config.n_embd), "head.bias": (len(labels),), "threshold": ()}
    _check_shapes(found, expected)


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"it does not hold what a model needs: state_dict.model.{missing[0]} is missing")
    refuse_unknown(found, "state_dict.model", expected)
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"weights do not fit the model: state_dict.model.{name} has shape {shape_of(found[name])}, but by "
                f"{HEADER} it is {shape}"
            )


def _check_lora(header: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Compare the adapters with the header. Layers are never listed: in an adapter's file nothing bounds `n_layer`."""
    lora, config = lora_of(header), config_of(header)
    paths = sorted({name.rpartition(".lora_")[0] for name in found})
    if lora is None:
        if paths:
            raise ValueError(f"state_dict.model.{word(paths[0])} has an adapter, but {HEADER}.lora is missing")
        return
    for target in lora.targets:
        if not any(_ends_with(path, target) for path in paths):
            raise ValueError(f"{HEADER}.lora.targets: {short(target)} matches none of the adapters in state_dict")
    expected: dict[str, tuple[int, ...]] = {}
    for path in paths:
        out, inputs = _linear_shape(path, header)
        if not any(_ends_with(path, target) for target in lora.targets):
            raise ValueError(f"state_dict.model.{path} has an adapter, but {HEADER}.lora.targets does not name it")
        parts = 3 if lora.qkv == "split" and path.endswith("qkv_proj") else 1
        expected |= {f"{path}.lora_A": (parts * lora.rank, inputs), f"{path}.lora_B": (out, lora.rank)}
    _check_shapes(found, expected)
    for part in linear_shapes(config):
        number = sum(_ends_with(path, part) for path in paths)
        if number != config.n_layer and any(_ends_with(part, target) for target in lora.targets):
            raise ValueError(f"{HEADER}.model.n_layer={config.n_layer}, but {number} blocks have an adapter on {part}")


def _linear_shape(path: str, header: Mapping[str, Any]) -> tuple[int, int]:
    """(outputs, inputs) of the linear layer at `path` of the model that the header describes."""
    config, is_classifier = config_of(header), "classifier" in header
    if is_classifier and path == "head":
        return len(header["classifier"]["labels"]), config.n_embd
    if not is_classifier and path == "lm_head":
        return config.vocab_size, config.n_embd
    shapes = linear_shapes(config)
    found = re.fullmatch(r"(trunk\.)?blocks\.(0|[1-9]\d{0,8})\.(.+)", path)
    if found and bool(found[1]) == is_classifier and int(found[2]) < config.n_layer and found[3] in shapes:
        return shapes[found[3]]
    raise ValueError(f"state_dict.model.{word(path)} has an adapter, but {HEADER}.model has no such layer")


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _sizes(config: GPTConfig, n_layer: int) -> Iterable[int]:
    """Elements of each parameter of a model with `n_layer` blocks."""
    for name, shape in parameter_shapes(replace(config, n_layer=n_layer)).items():
        if name != "lm_head.weight" or not config.tied_head:
            yield shape[0] * (shape[1] if len(shape) > 1 else 1)


def _is_finite(tensor: Tensor) -> bool:
    """Look at the minimum and the maximum: nan wins either way, and no second tensor as large is made."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
