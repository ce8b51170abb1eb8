"""Small models of every kind, for checks that must hold for each of them."""

from __future__ import annotations

from dataclasses import replace

from llm_lightning.models.gpt import GPTConfig

OTHERS = {
    "llama": {
        **{"norm": "rms", "position": "rope", "mlp": "swiglu", "qkv_bias": False, "out_bias": False, "mlp_bias": False},
        **{"n_kv_head": 1, "ffn_width": 24, "rope_theta": 500.0},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_context_length": 8,
        },
    },
    "qwen3": {
        **{"norm": "rms", "position": "rope", "mlp": "swiglu", "qkv_bias": True, "out_bias": False, "mlp_bias": False},
        **{"n_kv_head": 2, "head_dim": 6, "ffn_width": 40, "qk_norm": True, "tied_head": False},
    },
}
KINDS = ("gpt2", *OTHERS)


def of_kind(config: GPTConfig, kind: str) -> GPTConfig:
    """`config`, which is a GPT-2, with the parts of another kind of model."""
    return config if kind == "gpt2" else replace(config, **OTHERS[kind])
