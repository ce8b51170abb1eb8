"""A tiny Llama as the files of a hub's repository, with our byte tokenizer."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.models.shapes import parameter_shapes
from llm_lightning.weights.families.llama import config_to_hf, to_hf

CONFIG = GPTConfig(
    257, 64, 2, 4, 32, norm="rms", position="rope", mlp="swiglu", n_kv_head=2, head_dim=8, ffn_width=52,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=True,
)  # fmt: skip
WHOLE = "model.safetensors"


def drawn_state(seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(CONFIG).items()}
    return state | {"lm_head.weight": state["token_embedding.weight"]}


def repository(seed: int = 3) -> dict[str, bytes]:
    """path -> content of what a model needs."""
    return {
        WHOLE: save(to_hf(drawn_state(seed), CONFIG)),
        "config.json": json.dumps(config_to_hf(CONFIG, 256)).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [256, 2], "pad_token_id": 2, "top_p": 0.9}).encode(),
        "llm_lightning.json": json.dumps({"format": 1, "tokenizer": {"name": "byte"}}).encode(),
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
    }
