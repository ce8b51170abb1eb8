"""The family of weights: by `model_type` in transformers' `config.json`, and by the architecture on the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.weights.families import gpt2, llama
from llm_lightning.weights.families.checks import shown


class Family(Protocol):
    """What the module of a family offers."""

    def config_from_hf(self, config_json: Mapping[str, Any]) -> GPTConfig: ...

    def config_to_hf(self, config: GPTConfig, eot_id: int | None) -> dict[str, Any]: ...

    def from_hf(self, state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]: ...

    def to_hf(self, state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]: ...

    def module_to_hf(self, ours: str) -> tuple[str, ...]: ...

    def module_from_hf(self, theirs: str) -> tuple[str, int]: ...


FAMILIES: dict[str, Family] = {"gpt2": gpt2, "llama": llama, "qwen2": llama, "qwen3": llama}
"""`model_type` -> the module that converts its weights."""


def family_of_json(config_json: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
        ValueError: if it names another, naming those that are known; or if its weights are quantised.
    """
    kind = config_json.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"config.json: model_type={shown(kind)} is not a family known here: {', '.join(FAMILIES)}")
    if config_json.get("quantization_config"):
        raise ValueError(
            "config.json: quantization_config is not supported: quantised weights are read from GGUF files alone; take "
            "the weights in bfloat16 or float32"
        )
    return FAMILIES[kind]


def family_of(config: GPTConfig) -> Family:
    """The family whose form in transformers a model of ours has, if it has one: `config_to_hf` says so."""
    return gpt2 if config.position == "learned" else llama
