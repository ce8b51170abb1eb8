"""Import and export adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

An adapter is a pair of matrices: A (R, I) and B (O, R). Which layers differ:

- transformers' Llama and Qwen have query, key and value apart. Our `fused` adapter of the joint projection becomes
  three that share A, each with its rows of B; our `split` one becomes three of their own. On the way in, three with
  equal A become a fused one; any others a split one, in which a layer without an adapter has A = B = 0 and stays so.
- PEFT has one adapter for GPT-2's joint projection. Our `split` form is exported as one of three times the rank: A
  stacks the three As, B is block-diagonal, and the product is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lightning.files.atomic import naming
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig, LoRALinear, adapter_state
from llm_lightning.models.shapes import linear_shapes
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights import chat_templates
from llm_lightning.weights.chat import Chat
from llm_lightning.weights.export_folder import (
    ADAPTER,
    NOTE,
    REPORT,
    Stated,
    check_target,
    digests_of,
    publishing,
    write_json,
)
from llm_lightning.weights.families.choose import family_of
from llm_lightning.weights.folder import template_of
from llm_lightning.weights.peft_settings import (
    config_from_peft,
    name_from_peft,
    read_settings,
    refuse_other_kinds,
    write_settings,
)
from llm_lightning.weights.safetensors_files import read_safetensors
from llm_lightning.weights.safetensors_writing import write_weights
from llm_lightning.weights.tokenizer_files import write_tokenizer

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
_PREFIX = "base_model.model."


class Pair(NamedTuple):
    """An adapter of one layer: B A is added to its weight, times the scale."""

    a: Tensor
    """(R, I)"""
    b: Tensor
    """(O, R)"""


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def base_name_of(folder: str | Path) -> str:
    """The base model of a PEFT adapter, as a name or path for `load_model`.

    Raises:
        ValueError: if the folder does not name it.
    """
    return name_from_peft(read_settings(Path(folder)), Path(folder) / CONFIG)


def template_beside(folder: str | Path) -> dict[str, Any] | None:
    """The description of the template that an adapter was trained with, if its folder has one."""
    folder = Path(folder)
    stated = Stated(folder)
    for name in (NOTE, *chat_templates.FILES):
        if (folder / name).is_file():
            stated.digest_of(folder / name)
    return template_of(folder)


def export_peft(
    model: GPT | Classifier,
    config: LoRAConfig,
    folder: str | Path,
    *,
    name: str = "default",
    base_name: str = "",
    tokenizer: Tokenizer | None = None,
    chat: Chat | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` can add to transformers' form of the base.

    The folder appears only once it is complete.

    Args:
        model: the model with the adapter; of a classifier, its trunk is exported.
        name: of the adapter.
        base_name: name or path under which PEFT looks for the base model; of our names, the hub's is written.
        tokenizer: written beside the adapter, as PEFT's users do; default: none.
        chat: the template of the adapter's training, written with the tokenizer.
        overwrite: replace an earlier export.

    Raises:
        ValueError: if the folder is not empty, a value is not finite, or the classification head has an adapter:
            transformers' head has no bias.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder).resolve()
    check_target(folder, overwrite)
    layers = {path.removeprefix("trunk."): model.get_submodule(path) for path in _paths(model, name)}
    if "head" in layers:
        raise ValueError(
            "the adapter on the classification head cannot go to PEFT: transformers' head has no bias; "
            "export the merged model (--format hf), or train with lora.targets without head"
        )
    pairs: dict[str, Pair] = {}
    for path, layer in layers.items():
        assert isinstance(layer, LoRALinear)
        pairs |= _to_peft(path, layer, name, model.trunk.config)
    tensors = {
        f"{_PREFIX}{path}.lora_{kind}.weight": m
        for path, pair in pairs.items()
        for kind, m in zip("AB", pair, strict=True)
    }
    _refuse_non_finite(tensors, "the adapter")
    ranks = {path: len(pair.a) for path, pair in pairs.items()}
    is_conv1d = model.trunk.config.position == "learned"
    with publishing(folder, overwrite=overwrite) as temporary, naming(folder):
        write_weights(temporary / WEIGHTS, tensors)
        task_type = "CAUSAL_LM" if isinstance(model, GPT) else None
        write_settings(temporary, config, ranks, base_name=base_name, task_type=task_type, is_conv1d=is_conv1d)
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer, chat, model.trunk.config.context_length)
        write_json(temporary / REPORT, {"sha256": digests_of(temporary)})


def import_peft(folder: str | Path, model: GPTConfig) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Read an adapter that PEFT wrote for transformers' form of a model like `model`.

    Returns:
        its settings, and its matrices under the names that `load_adapter_state` expects.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if our adapters cannot represent it, or it was made for another model.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            hint = "; pickled adapters (.bin) can run code and are not read" if file == WEIGHTS else ""
            raise FileNotFoundError(f"{folder} has no {file}{hint}; save the adapter with PEFT's save_pretrained")
    facts = read_settings(folder)
    refuse_other_kinds(facts, folder / CONFIG)
    Stated(folder).digest_of(folder / WEIGHTS)
    pairs = _read_pairs(folder / WEIGHTS)
    config = config_from_peft(facts, {path: len(pair.a) for path, pair in pairs.items()}, folder / CONFIG)
    with _prefixing(folder / WEIGHTS):
        return _from_peft({path: _filled(pair, config.rank) for path, pair in pairs.items()}, config, model)


# --- out -----------------------------------------------------------------------------------------------------------


def _to_peft(path: str, layer: LoRALinear, name: str, model: GPTConfig) -> dict[str, Pair]:
    """Their path -> what PEFT needs for one of our adapters, each matrix in its own memory."""
    a, b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    theirs, parts = family_of(model).module_to_hf(path), len(layer.rows)
    if len(theirs) == 1:
        return {theirs[0]: Pair(a, b if parts == 1 else torch.block_diag(*b.split(layer.rows)))}
    shared = a.chunk(parts) if parts > 1 else [a] * len(theirs)
    return {
        one: Pair(low.clone(), high.clone())
        for one, low, high in zip(theirs, shared, b.split(model.qkv_rows), strict=True)
    }


def _paths(model: nn.Module, name: str) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".lora_")[0] for key in adapter_state(model, name)))


# --- in ------------------------------------------------------------------------------------------------------------


def _read_pairs(path: Path) -> dict[str, Pair]:
    """Their path -> matrices: only pairs of finite floating-point matrices of one rank."""
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_safetensors(path).items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(_PREFIX))
        if not match:
            raise ValueError(f"{path}: {short(key)} is not a matrix of a LoRA adapter")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise ValueError(f"{path}: {key} is not a matrix of floating-point numbers; get it again")
        _refuse_non_finite({key: tensor}, str(path))
        matrices.setdefault(match[1], {})[match[2]] = tensor
    for name, both in matrices.items():
        if len(both) < 2:
            raise ValueError(f"{path}: {name}.lora_{next(iter(both))} has no counterpart; get it again")
        if len(both["A"]) != both["B"].size(1):
            raise ValueError(f"{path}: {name} has a matrix of rank {len(both['A'])} and one of {both['B'].size(1)}")
    if not matrices:
        raise ValueError(f"{path} holds no adapter; save it again with PEFT's save_pretrained")
    return {name: Pair(both["A"], both["B"]) for name, both in matrices.items()}


def _filled(pair: Pair, rank: int) -> Pair:
    """The pair with zeros up to a rank: they change nothing, and each keeps the other's gradient at zero."""
    more = rank - len(pair.a)
    return Pair(F.pad(pair.a, (0, 0, 0, more)), F.pad(pair.b, (0, more))) if more else pair


def _from_peft(pairs: Mapping[str, Pair], config: LoRAConfig, model: GPTConfig) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Our settings and matrices from PEFT's."""
    layers: dict[str, dict[int, Pair]] = {}
    for theirs, pair in pairs.items():
        path, part = family_of(model).module_from_hf(theirs)
        _check_fits(theirs, pair, _shape(path, part, model))
        if part in layers.setdefault(path, {}):
            raise ValueError(f"{theirs} is named twice, with and without a prefix; get it again")
        layers[path][part] = pair
    joint = [path for path in layers if len(family_of(model).module_to_hf(path)) > 1]
    is_fused = all(_share_a(layers[path]) for path in joint)
    config = replace(config, targets=tuple(layers), qkv="fused" if is_fused else "split")
    state: dict[str, Tensor] = {}
    for path, parts in layers.items():
        a, b = _joint(parts, model, is_fused) if path in joint else parts[0]
        state |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
    return config, state


def _share_a(parts: Mapping[int, Pair]) -> bool:
    return len(parts) == 3 and all(torch.equal(pair.a, parts[0].a) for pair in parts.values())


def _joint(parts: Mapping[int, Pair], model: GPTConfig, is_fused: bool) -> Pair:
    """One adapter of the joint projection from those of query, key and value."""
    some = next(iter(parts.values()))
    absent = [Pair(torch.zeros_like(some.a), some.b.new_zeros(rows, len(some.a))) for rows in model.qkv_rows]
    three = [parts.get(part, absent[part]) for part in range(3)]
    return Pair(some.a if is_fused else torch.cat([pair.a for pair in three]), torch.cat([pair.b for pair in three]))


def _shape(path: str, part: int, model: GPTConfig) -> tuple[int, int]:
    """(outputs, inputs) of the layer of transformers' that is a part of ours."""
    if path == "lm_head":
        return model.vocab_size, model.n_embd
    leaf = path.split(".", 2)[2]
    shapes = linear_shapes(model)
    if leaf not in shapes:
        raise ValueError(f"the adapter does not fit the model, which has no {leaf}")
    outputs, inputs = shapes[leaf]
    is_part = len(family_of(model).module_to_hf(path)) > 1
    return (model.qkv_rows[part] if is_part else outputs), inputs


def _check_fits(theirs: str, pair: Pair, expected: tuple[int, int]) -> None:
    found = len(pair.b), pair.a.size(1)
    if found != expected:
        raise ValueError(
            f"the adapter does not fit the model: that of {theirs} is for a layer of {found[1]} inputs and {found[0]} "
            f"outputs, but it has {expected[1]} and {expected[0]}"
        )


class _prefixing:  # noqa: N801 (a context manager)
    """Prefix an error message with the path of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self._path}: {error}") from None


def _refuse_non_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {key} has values that are not finite; use an earlier checkpoint")
