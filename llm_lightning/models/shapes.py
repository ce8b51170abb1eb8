"""The shapes of a model's parameters by arithmetic from its config, before anything is built."""

from __future__ import annotations

from llm_lightning.models.gpt import GPTConfig


def linear_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of a block."""
    width, inner, of_heads = config.n_embd, config.mlp_width, config.n_head * config.head_width
    gate = {"mlp.gate_proj": (inner, width)} if config.mlp == "swiglu" else {}
    return {
        "attn.qkv_proj": (sum(config.qkv_rows), width),
        "attn.out_proj": (width, of_heads),
        **gate,
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the state dict of a GPT, a tied head included."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (config.vocab_size, config.n_embd)}
    if config.position == "learned":
        shapes["position_embedding.weight"] = (config.context_length, config.n_embd)
    of_block = _block_shapes(config)
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in of_block.items()}
    return shapes | _norm_shapes("final_norm", config) | {"lm_head.weight": (config.vocab_size, config.n_embd)}


def _block_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    biases = {"attn.qkv_proj": config.qkv_bias, "attn.out_proj": config.out_bias}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, shape in linear_shapes(config).items():
        shapes[f"{part}.weight"] = shape
        if biases.get(part, config.mlp_bias):
            shapes[f"{part}.bias"] = shape[:1]
    if config.qk_norm:
        shapes |= _norm_shapes("attn.q_norm", config, config.head_width)
        shapes |= _norm_shapes("attn.k_norm", config, config.head_width)
    return shapes | _norm_shapes("attn_norm", config) | _norm_shapes("mlp_norm", config)


def _norm_shapes(name: str, config: GPTConfig, width: int | None = None) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {f"{name}.{kind}": (width or config.n_embd,) for kind in names}
