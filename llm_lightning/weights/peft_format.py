"""Import and export adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT has one adapter for GPT-2's joint projection. Our `split` form is exported as one adapter of three times the rank:
A stacks the three As, B is block-diagonal, and the product is the same.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from llm_lightning.files.atomic import naming
from llm_lightning.models.lora import LoRAConfig, LoRALinear, adapter_state
from llm_lightning.weights.export_folder import (
    ADAPTER,
    REPORT,
    Stated,
    check_target,
    digests_of,
    publishing,
    read_json,
    write_json,
    write_weights,
)
from llm_lightning.weights.gpt2_names import module_from_hf, module_to_hf
from llm_lightning.weights.pretrained import read_safetensors

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # adapter_config.json key -> values that match what our adapters compute
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
}


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def base_name_of(folder: str | Path) -> str:
    """The base model of a PEFT adapter, as a name or path for `load_model`.

    Raises:
        ValueError: if the folder does not name it.
    """
    name = _read_config(Path(folder)).get("base_model_name_or_path")
    if not isinstance(name, (str, type(None))) or "\0" in (name or ""):
        raise ValueError(f"{Path(folder) / CONFIG}: base_model_name_or_path={short(name)} must be a name or a path")
    if not name:
        raise ValueError(f"{Path(folder) / CONFIG} does not name the base of the adapter; give it with base=")
    size = name.removeprefix("openai-community/")
    return {"gpt2": "gpt2-small", "gpt2-medium": size, "gpt2-large": size, "gpt2-xl": size}.get(size, name)


def export_peft(
    model: nn.Module,
    config: LoRAConfig,
    folder: str | Path,
    *,
    name: str = "default",
    base_name: str = "",
    overwrite: bool = False,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` can add to transformers' GPT-2.

    The folder appears only once it is complete.

    Args:
        model: the model with the adapter; of a classifier, its trunk is exported.
        name: of the adapter.
        base_name: name or path under which PEFT looks for the base model.
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
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        assert isinstance(layer, LoRALinear)
        a, b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
        if len(layer.rows) > 1:
            b = torch.block_diag(*b.split(layer.rows))
        ranks[module_to_hf(path)] = len(a)
        tensors |= {
            f"{_PREFIX}{module_to_hf(path)}.lora_{kind}.weight": m.contiguous() for kind, m in (("A", a), ("B", b))
        }
    _refuse_non_finite(tensors, "the adapter")
    with publishing(folder, overwrite=overwrite) as temporary, naming(folder):
        write_weights(temporary / WEIGHTS, tensors)
        _write_config(temporary, config, ranks, base_name)
        write_json(temporary / REPORT, {"sha256": digests_of(temporary)})


def import_peft(folder: str | Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Read an adapter that PEFT wrote for transformers' GPT-2.

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
    facts = _read_config(folder)
    for key, allowed in _NEUTRAL.items():
        if facts.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{folder / CONFIG}: {key}={short(facts[key])} is not supported; it must be {allowed[0]!r}"
            )
    Stated(folder).digest_of(folder / WEIGHTS)
    state = {}
    for key, tensor in read_safetensors(folder / WEIGHTS).items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(_PREFIX))
        if not match:
            raise ValueError(f"{folder / WEIGHTS}: {short(key)} is not a matrix of a LoRA adapter")
        try:
            state[f"{module_from_hf(match[1])}.lora_{match[2]}"] = tensor
        except ValueError as error:
            raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    _refuse_non_finite(state, str(folder / WEIGHTS))
    config = _config_of(facts, state, folder / CONFIG)
    _check_matrices(state, config, folder / WEIGHTS)
    return config, state


def _config_of(facts: dict[str, Any], state: dict[str, Tensor], path: Path) -> LoRAConfig:
    """Our settings from PEFT's, with types and ranges checked."""
    targets = tuple(dict.fromkeys(key.rpartition(".lora_")[0] for key in state))
    if not targets:
        raise ValueError(f"{path.with_name(WEIGHTS)} holds no adapter; save it again with PEFT's save_pretrained")
    if missing := [key for key in ("r", "lora_alpha") if key not in facts]:
        raise ValueError(f"{path} has no {missing[0]}; save the adapter with PEFT's save_pretrained")
    if not isinstance(facts.get("use_rslora"), (bool, type(None))):
        raise ValueError(f"{path}: use_rslora={short(facts['use_rslora'])} must be true or false")
    try:
        return LoRAConfig(
            rank=facts["r"],
            alpha=facts["lora_alpha"],
            dropout=facts.get("lora_dropout", 0.0),
            targets=targets,
            scaling="rslora" if facts.get("use_rslora") else "standard",
        )
    except ValueError as error:
        names = {"lora.rank": "r", "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout"}
        theirs = functools.reduce(lambda text, name: text.replace(name, names[name]), names, str(error))
        raise ValueError(f"{path}: {theirs}; save the adapter with PEFT's save_pretrained") from None


def _check_matrices(state: dict[str, Tensor], config: LoRAConfig, path: Path) -> None:
    """Accept only pairs of floating-point matrices of the stated rank, before any layer is built."""
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".lora_")
        other = state.get(f"{layer}.lora_{'B' if kind == 'A' else 'A'}")
        if other is None:
            raise ValueError(f"{path}: {key} has no counterpart, and an adapter has two matrices; get it again")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise ValueError(f"{path}: {key} is not a matrix of floating-point numbers; get it again")
        rank = tensor.size(0 if kind == "A" else 1)
        if rank != config.rank:
            raise ValueError(f"{path}: {key} has rank {rank}, but {CONFIG} says r={config.rank}; get them again")


def _refuse_non_finite(tensors: dict[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {key} has values that are not finite; use an earlier checkpoint")


def _read_config(folder: Path) -> dict[str, Any]:
    Stated(folder).digest_of(folder / CONFIG)
    return read_json(folder / CONFIG)


def _paths(model: nn.Module, name: str) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".lora_")[0] for key in adapter_state(model, name)))


def _write_config(folder: Path, config: LoRAConfig, ranks: dict[str, int], base_name: str) -> None:
    """Write PEFT's settings; a layer with a rank other than `config.rank` gets patterns that keep its scale."""
    wider = {path: rank for path, rank in ranks.items() if rank != config.rank}
    power = 0.5 if config.scaling == "rslora" else 1.0
    facts = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": True,  # transformers' GPT-2 stores Conv1D as (in, out)
        "bias": "none",
        "use_rslora": config.scaling == "rslora",
        "rank_pattern": {f"^{re.escape(path)}$": rank for path, rank in wider.items()},
        "alpha_pattern": {
            f"^{re.escape(path)}$": config.alpha * (rank / config.rank) ** power for path, rank in wider.items()
        },
        "inference_mode": True,
    }
    write_json(folder / CONFIG, facts)
