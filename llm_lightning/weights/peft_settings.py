"""The settings of a PEFT adapter, `adapter_config.json`: what each of its layers has, and what ours have for it.

PEFT gives every layer its own rank and alpha by patterns. Ours have one rank and one scale for all: a smaller rank is
filled up with zeros, which change nothing and stay zero in training; a second scale has no form here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

from llm_lightning.models.lora import LoRAConfig
from llm_lightning.weights.export_folder import ADAPTER, Stated, read_json, write_json
from llm_lightning.weights.releases import HUB, RELEASES, Pinned, Repository

_NEUTRAL: dict[str, tuple[Any, ...]] = {  # key -> values with which PEFT computes what our adapters do
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    # The others, such as `pissa`, change the weights under the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_NAME = re.compile(r"[\w.]+")
_AGAIN = "save the adapter with PEFT's save_pretrained"


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        ValueError: if it is damaged.
    """
    Stated(folder).digest_of(folder / ADAPTER)
    return read_json(folder / ADAPTER)


def refuse_other_kinds(facts: Mapping[str, Any], path: Path) -> None:
    """Refuse what our adapters do not compute: DoRA, trained biases, whole modules, and so on."""
    for key, allowed in _NEUTRAL.items():
        if facts.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {key}={short(facts[key])} is not supported; it must be {allowed[0]!r}")


def config_from_peft(facts: Mapping[str, Any], ranks: Mapping[str, int], path: Path) -> LoRAConfig:
    """Our settings for the adapters of PEFT's layers, without targets of ours.

    Args:
        facts: the content of `adapter_config.json`.
        ranks: their path -> rank of its matrices.
        path: of the file.

    Raises:
        ValueError: if a value has the wrong type or range, a rank differs from what the file states, or the layers
            have several scales.
    """
    if missing := [key for key in ("r", "lora_alpha") if key not in facts]:
        raise ValueError(f"{path} has no {missing[0]}; {_AGAIN}")
    if not isinstance(facts.get("use_rslora"), (bool, type(None))):
        raise ValueError(f"{path}: use_rslora={short(facts['use_rslora'])} must be true or false")
    patterns = {key: _patterns(facts, key, path) for key in ("rank_pattern", "alpha_pattern")}
    configs = []
    for theirs, rank in ranks.items():
        stated = _matching(patterns["rank_pattern"], theirs, facts["r"])
        configs.append(_config(facts, stated, _matching(patterns["alpha_pattern"], theirs, facts["lora_alpha"]), path))
        if rank != stated:
            raise ValueError(
                f"{path}: the matrices of {theirs} have rank {rank}, but {ADAPTER} says r={stated}; get them again"
            )
    return _joined(configs, path)


def write_settings(
    folder: Path,
    config: LoRAConfig,
    ranks: Mapping[str, int],
    *,
    base_name: str,
    task_type: str | None,
    is_conv1d: bool,
) -> None:
    """Write `adapter_config.json`; a layer with a rank other than `config.rank` gets patterns that keep its scale.

    Args:
        ranks: their path -> rank.
        base_name: of the base model; of our names, the hub's is written.
        task_type: PEFT's, by which `AutoPeftModelForCausalLM` knows the class of the base.
        is_conv1d: whether transformers stores the weights under the adapters as (in, out).
    """
    wider = {path: rank for path, rank in ranks.items() if rank != config.rank}
    power = 0.5 if config.scaling == "rslora" else 1.0
    name, revision = _name_for_peft(base_name)
    facts = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": name,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": is_conv1d,
        "bias": "none",
        "use_rslora": config.scaling == "rslora",
        "rank_pattern": {_exactly(path): rank for path, rank in wider.items()},
        "alpha_pattern": {_exactly(path): config.alpha * (rank / config.rank) ** power for path, rank in wider.items()},
        "inference_mode": True,
    }
    write_json(folder / ADAPTER, facts)


def name_from_peft(facts: Mapping[str, Any], path: Path) -> str:
    """The base model that `adapter_config.json` names, as a name or path for `load_model`.

    Raises:
        ValueError: if it names none.
    """
    name, revision = facts.get("base_model_name_or_path"), facts.get("revision")
    if not isinstance(name, (str, type(None))) or "\0" in (name or ""):
        raise ValueError(f"{path}: base_model_name_or_path={short(name)} must be a name or a path")
    if not name:
        raise ValueError(f"{path} does not name the base of the adapter; give it with base=")
    pinned = {release.repository: word for word, release in RELEASES.items() if isinstance(release, Pinned)}
    pinned |= {repository.rpartition("/")[2]: word for repository, word in pinned.items()}  # `gpt2`, on the hub as well
    if Path(name).exists() or not HUB.fullmatch(f"hf:{name}"):
        return pinned.get(name, name)
    return pinned.get(name, f"hf:{name}@{revision}" if isinstance(revision, str) and revision else f"hf:{name}")


def _name_for_peft(name: str) -> tuple[str, str | None]:
    """Name and revision under which PEFT finds what we call `name`."""
    release, place = RELEASES.get(name), HUB.fullmatch(name)
    if place:
        return place["repository"], place["revision"]
    if isinstance(release, (Pinned, Repository)):
        return release.repository, release.revision if isinstance(release, Pinned) else None
    return name, None


def _config(facts: Mapping[str, Any], rank: Any, alpha: Any, path: Path) -> LoRAConfig:
    """Settings with types and ranges checked; `targets` is a placeholder."""
    try:
        return LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=facts.get("lora_dropout", 0.0),
            targets=("qkv_proj",),
            scaling="rslora" if facts.get("use_rslora") else "standard",
        )
    except ValueError as error:
        names = {"lora.rank": "r", "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout"}
        theirs = functools.reduce(lambda text, name: text.replace(name, names[name]), names, str(error))
        raise ValueError(f"{path}: {theirs}; {_AGAIN}") from None


def _joined(configs: Sequence[LoRAConfig], path: Path) -> LoRAConfig:
    """The one of the largest rank, which must have the scale of every other."""
    largest = max(configs, key=lambda config: config.rank)
    for config in configs:
        if not math.isclose(config.scale, largest.scale, rel_tol=1e-9):
            raise ValueError(
                f"{path}: by rank_pattern and alpha_pattern some layers scale their correction by {config.scale:.6g}, "
                f"others by {largest.scale:.6g}; ours have one scale: merge the adapter with PEFT's merge_and_unload"
            )
    return largest


def _patterns(facts: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """Path or end of a path -> value. PEFT allows any regular expression, whose cost nobody bounds: names are read."""
    content = facts.get(key) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {key}={short(content)} must be names of layers with a number each; {_AGAIN}")
    plain = {pattern.removesuffix("$").replace("\\.", "."): value for pattern, value in content.items()}
    for name, value in plain.items():
        if not _NAME.fullmatch(name.removeprefix("^")):
            raise ValueError(f"{path}: {key} has {short(name)}; only names of layers are read, no expressions")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {key}: {short(name)} is {short(value)}, no number; {_AGAIN}")
    return plain


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that fits a path, as in PEFT's `get_pattern_key`."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if path == name or (name == pattern and path.endswith(f".{name}")):
            return value
    return default


def _exactly(path: str) -> str:
    """The pattern that matches one path."""
    return f"^{re.escape(path)}$"
