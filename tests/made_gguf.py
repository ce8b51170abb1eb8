"""Small models of each architecture that GGUF shares with us, every tensor drawn at random, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.rope import RopeScaling
from llm_lightning.tokenizers.gguf_vocabulary import vocabulary_to_gguf
from llm_lightning.tokenizers.tiktoken_encodings import TiktokenTokenizer
from llm_lightning.weights.gguf.writing import write_gguf

SMALL: dict[str, Any] = {"vocab_size": 288, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
RMS: dict[str, Any] = {
    **{"norm": "rms", "position": "rope", "mlp": "swiglu", "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    **{"n_kv_head": 2, "head_dim": 16, "ffn_width": 96},
}
CONFIGS = {
    "gpt2": GPTConfig(**SMALL),
    "gpt2 without biases": GPTConfig(**SMALL, qkv_bias=False, tied_head=False),
    "llama": GPTConfig(**SMALL, **RMS),
    "llama 3": GPTConfig(
        **SMALL, **RMS, tied_head=False, rope_theta=5000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
    ),
    "qwen2": GPTConfig(**SMALL, **{**RMS, "qkv_bias": True}, rope_theta=1000.0),
    "qwen3": GPTConfig(**SMALL, **{**RMS, "head_dim": 32}, qk_norm=True, layer_norm_eps=1e-6),
}
MERGES = ["t h", "th e", "i n", "Ġ the", "e r", "Ġ a", "o n", "in g", "1 0"]


def tokenizer() -> TiktokenTokenizer:
    """266 tokens, fewer than the rows of the models."""
    return TiktokenTokenizer.from_merges(MERGES)


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config, init="torch").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm.weight" in name else 0.1 * drawn)
    return model


def write(path: Path, model: GPT, dtype: str = "f32", **metadata: Any) -> Path:
    metadata = {**vocabulary_to_gguf(tokenizer(), model.config.vocab_size), **metadata}
    write_gguf(path, model.state_dict(), model.config, metadata, dtype=dtype)
    return path
