"""The tensors of a GPT by our names, with their shapes: what every family must deliver and what every file must fit."""

from __future__ import annotations

from llm_lightning.models.gpt import GPTConfig

HEAD = "lm_head.weight"
EMBEDDING = "token_embedding.weight"


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a GPT without adapters; a tied head included."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.n_embd)}
    if config.position == "learned":
        shapes["position_embedding.weight"] = (config.context_length, config.n_embd)
    block = _block_shapes(config)
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | _norm("final_norm", config) | {HEAD: (config.vocab_size, config.n_embd)}


def _block_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of one block."""
    shapes = _norm("attn_norm", config) | _norm("mlp_norm", config)
    for name, (outputs, inputs) in linear_shapes(config).items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        if _has_bias(name, config):
            shapes[f"{name}.bias"] = (outputs,)
    if config.qk_norm:
        shapes |= {"attn.q_norm.weight": (config.head_width,), "attn.k_norm.weight": (config.head_width,)}
    return shapes


def linear_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of a block."""
    width, queries, ffn = config.n_embd, config.n_head * config.head_width, config.mlp_width
    gate = {"mlp.gate_proj": (ffn, width)} if config.mlp == "swiglu" else {}
    return {
        "attn.qkv_proj": (sum(qkv_rows(config)), width),
        "attn.out_proj": (width, queries),
        **gate,
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }


def qkv_rows(config: GPTConfig) -> tuple[int, int, int]:
    """The rows of queries, keys and values in `attn.qkv_proj`."""
    keys = config.kv_heads * config.head_width
    return config.n_head * config.head_width, keys, keys


def _has_bias(linear: str, config: GPTConfig) -> bool:
    own = {"attn.qkv_proj": config.qkv_bias, "attn.out_proj": config.out_bias}
    return own.get(linear, config.mlp_bias)


def _norm(name: str, config: GPTConfig) -> dict[str, tuple[int, ...]]:
    bias = {f"{name}.bias": (config.n_embd,)} if config.norm == "layer" else {}
    return {f"{name}.weight": (config.n_embd,), **bias}
