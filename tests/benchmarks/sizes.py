"""The models that benchmarks compare: GPT-2 small, and SmolLM2-135M's sizes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

GPT2_VOCABULARY, SMOLLM2_VOCABULARY = 50257, 49152
REHEARSAL = os.environ.get("LLM_LIGHTNING_REHEARSAL") == "1"
"""Whether `gpu.py --rehearse` wants tiny sizes."""


def config_of(model: str, vocabulary: int = GPT2_VOCABULARY) -> Any:
    """The config of `gpt2` or `smollm2`; the latter takes GPT-2's vocabulary too, for data in GPT-2's tokens."""
    from llm_lightning.models.gpt import GPTConfig

    small = GPTConfig(vocab_size=vocabulary)
    if REHEARSAL:
        return replace(small, n_layer=2, n_head=2, n_embd=32)
    if model == "gpt2":
        return small
    return replace(
        small, context_length=8192, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, ffn_width=1536, norm="rms",
        position="rope", rope_theta=100000.0, mlp="swiglu", qkv_bias=False, out_bias=False, mlp_bias=False,
    )  # fmt: skip


def theirs(model: str, vocabulary: int = GPT2_VOCABULARY) -> Any:
    """transformers' model of the same sizes, with random weights, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm_lightning.weights.families.choose import family_of

    config = config_of(model, vocabulary)
    values = family_of(config).config_to_hf(config, None)
    kind = values.pop("model_type")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), attn_implementation="sdpa")


def theirs_from(folder: Path, dtype: Any) -> Any:
    """transformers' model from a folder that ours wrote, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa")
