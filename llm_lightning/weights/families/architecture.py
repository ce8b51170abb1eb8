"""Which class of transformers computes what a `GPTConfig` says: at most one does."""

from __future__ import annotations

from typing import Any

from llm_lightning.models.gpt import GPTConfig

_LLAMA_KIND: dict[str, Any] = {"norm": "rms", "position": "rope", "mlp": "swiglu"}
_FIXED: dict[str, dict[str, Any]] = {  # class -> the values that fields have in each of its models
    "GPT2LMHeadModel": {"norm": "layer", "position": "learned", "mlp": "gelu", "out_bias": True, "mlp_bias": True,
                        "qk_norm": False, "rope_scaling": None},
    "LlamaForCausalLM": {**_LLAMA_KIND, "qk_norm": False},
    "Qwen2ForCausalLM": {**_LLAMA_KIND, "qkv_bias": True, "out_bias": False, "mlp_bias": False, "qk_norm": False},
    "Qwen3ForCausalLM": {**_LLAMA_KIND, "mlp_bias": False, "qk_norm": True},
}  # fmt: skip


def architecture_of(config: GPTConfig) -> str:
    """The class for language models, such as `LlamaForCausalLM`.

    Raises:
        ValueError: if none computes what the config says; names the fields that keep the nearest one from it.
    """
    wrong = {name: _misfits(name, config) for name in _FIXED}
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[nearest]:
        raise ValueError(
            f"transformers has no class that computes this model; the nearest, {nearest}, has no "
            f"{', no '.join(wrong[nearest])}"
        )
    return nearest


def _misfits(name: str, config: GPTConfig) -> list[str]:
    """The settings of a config that no model of a class has."""
    different = [key for key, value in _FIXED[name].items() if getattr(config, key) != value]
    if name in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.qkv_bias != config.out_bias:
        different += ["qkv_bias", "out_bias"]  # one setting there
    if name == "GPT2LMHeadModel":
        different += ["n_kv_head"] if config.kv_heads != config.n_head else []
        different += ["head_dim"] if config.head_width * config.n_head != config.n_embd else []
    return [f"model.{key}={getattr(config, key)}" for key in different]
