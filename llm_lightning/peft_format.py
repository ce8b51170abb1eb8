"""Adapters in PEFT's format, in and out: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT has one adapter for GPT-2's joint projection. Our `split` form goes out as one of three times the rank, A the three
As below each other and B block-diagonal: the product is the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_lightning.atomic import write_atomically
from llm_lightning.hf_export import write_weights
from llm_lightning.models.gpt2_weights import module_from_hf, module_to_hf
from llm_lightning.models.lora import LoRAConfig, LoRALinear, adapter_state

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # key of adapter_config.json -> values that mean what our adapters compute
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
    """Whether PEFT wrote an adapter there."""
    return (Path(path) / CONFIG).is_file()


def base_name_of(folder: str | Path) -> str:
    """The model that an adapter of PEFT's was made for, in the words that `checkpoint.load_model` takes.

    Raises:
        ValueError: if the folder does not say it.
    """
    name = str(_read_config(Path(folder)).get("base_model_name_or_path") or "")
    if not name:
        raise ValueError(f"{Path(folder) / CONFIG} does not name the model that the adapter is for; say it with base=")
    size = name.removeprefix("openai-community/")
    return {"gpt2": "gpt2-small", "gpt2-medium": size, "gpt2-large": size, "gpt2-xl": size}.get(size, name)


def export_peft(
    model: nn.Module, config: LoRAConfig, folder: str | Path, *, name: str = "default", base_name: str = ""
) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained` puts it on transformers' GPT-2.

    Args:
        model: with the adapter; the trunk of a classifier counts, its head does not.
        name: of the adapter.
        base_name: what PEFT looks for as the base model.

    Raises:
        ValueError: if the folder is not empty, or the adapter stands on a classification head, which transformers
            keeps without a bias.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")
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
        if layer.parts > 1:
            b = torch.block_diag(*b.chunk(layer.parts, 0))
        ranks[module_to_hf(path)] = len(a)
        tensors |= {
            f"{_PREFIX}{module_to_hf(path)}.lora_{kind}.weight": m.contiguous() for kind, m in (("A", a), ("B", b))
        }
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, tensors)
    _write_config(folder, config, ranks, base_name)


def import_peft(folder: str | Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Read an adapter that PEFT wrote for transformers' GPT-2.

    Returns:
        its settings, and its matrices by the names that `load_adapter_state` takes.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is of another kind than ours, or made for another model.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            hint = "; pickled adapters (.bin) can run code and are not read" if file == WEIGHTS else ""
            raise FileNotFoundError(f"{folder} has no {file}{hint}; save the adapter with PEFT's save_pretrained")
    facts = _read_config(folder)
    for key, allowed in _NEUTRAL.items():
        if facts.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {key}={facts[key]!r} is not supported; it must be {allowed[0]!r}")
    state = {}
    for key, tensor in _tensors(folder / WEIGHTS).items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(_PREFIX))
        if not found:
            raise ValueError(f"{folder / WEIGHTS}: {key} is no matrix of a LoRA adapter")
        state[f"{module_from_hf(found[1])}.lora_{found[2]}"] = tensor
    targets = tuple(dict.fromkeys(key.rpartition(".lora_")[0] for key in state))
    if missing := [key for key in ("r", "lora_alpha") if key not in facts]:
        raise ValueError(f"{folder / CONFIG} has no {missing[0]}; save the adapter with PEFT's save_pretrained")
    config = LoRAConfig(
        rank=facts["r"],
        alpha=facts["lora_alpha"],
        dropout=facts.get("lora_dropout", 0.0),
        targets=targets,
        scaling="rslora" if facts.get("use_rslora") else "standard",
    )
    return config, state


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON ({error}); get it again") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / CONFIG} must hold a JSON object; get it again")
    return facts


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error


def _paths(model: nn.Module, name: str) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".lora_")[0] for key in adapter_state(model, name)))


def _write_config(folder: Path, config: LoRAConfig, ranks: dict[str, int], base_name: str) -> None:
    """PEFT's settings; a layer of another rank than `config.rank` gets a pattern, its alpha so that the scale stays."""
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
        "fan_in_fan_out": True,  # transformers' GPT-2 has Conv1D, stored (in, out)
        "bias": "none",
        "use_rslora": config.scaling == "rslora",
        "rank_pattern": {f"^{re.escape(path)}$": rank for path, rank in wider.items()},
        "alpha_pattern": {
            f"^{re.escape(path)}$": config.alpha * (rank / config.rank) ** power for path, rank in wider.items()
        },
        "inference_mode": True,
    }
    write_atomically(folder / CONFIG, json.dumps(facts, indent=2) + "\n")
