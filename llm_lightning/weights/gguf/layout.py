"""What GGUF calls our parameters and the fields of our config, for the architectures that it shares with us.

`parts` lists the tensors of a file, for reading and writing alike. GGUF splits `attn.qkv_proj` into three (`gpt2` does
not), and stores the rows of queries and keys of `llama` pair by pair, because llama.cpp rotates neighbours there: files
with the two orders mixed up load without a word, and predict much worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.nearest import did_you_mean
from llm_lightning.weights.gguf.header import shown

_LLAMA = {
    "norm": "rms", "position": "rope", "mlp": "swiglu", "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "qk_norm": False,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "position": "learned", "mlp": "gelu", "qk_norm": False},
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"qkv_bias": True},
    "qwen3": _LLAMA | {"qk_norm": True},
}
"""The fields that make a config one of an architecture. Each is of one at most."""

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_NAMES = {
    "token_embedding": "token_embd", "position_embedding": "position_embd", "final_norm": "output_norm",
    "lm_head": "output", "attn_norm": "attn_norm", "attn.qkv_proj": "attn_qkv", "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm", "attn.out_proj": "attn_output", "mlp_norm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


# --- tensors -------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A tensor of a file, and the rows of one of our parameters that it holds."""

    name: str
    parameter: str
    rows: slice
    shape: tuple[int, ...]
    heads_in_pairs: int = 0
    """The number of heads whose rows the file stores pair by pair; 0: in our order."""


def parts(config: GPTConfig, architecture: str) -> Iterator[Part]:
    """The tensors of a file, block by block; a tied head is left out. Lazy: a file may lie about its blocks."""
    if architecture == "gpt2":  # whose files have every bias
        config = replace(config, qkv_bias=True, out_bias=True, mlp_bias=True)
    for parameter, shape in _parameters(config):
        layer, short, kind = _split(parameter)
        name = f"{layer}{_NAMES[short]}.{kind}"
        if short == "lm_head" and config.tied_head:
            continue
        if short != "attn.qkv_proj" or architecture == "gpt2":
            yield Part(name, parameter, slice(None), shape)
            continue
        start = 0
        for letter, n_heads in zip("qkv", (config.n_head, config.kv_heads, config.kv_heads), strict=True):
            rows = slice(start, start := start + n_heads * config.head_width)
            in_pairs = n_heads if architecture == "llama" and letter != "v" else 0
            yield Part(f"{layer}attn_{letter}.{kind}", parameter, rows, (rows.stop - rows.start, *shape[1:]), in_pairs)


def _parameters(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's parameters. All blocks have those of the first, so that only one is built."""
    try:
        with torch.device("meta"):
            state = GPT(replace(config, n_layer=1), init="torch").state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # products of sizes that no integer holds
        raise ValueError(f"its keys state sizes that no tensor has ({str(error).splitlines()[0]})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    yield from ((name, shape) for name, shape in shapes.items() if not name.startswith("blocks."))
    block = {name.removeprefix("blocks.0."): shape for name, shape in shapes.items() if name.startswith("blocks.")}
    for layer in range(config.n_layer):
        yield from ((f"blocks.{layer}.{name}", shape) for name, shape in block.items())


def _split(parameter: str) -> tuple[str, str, str]:
    """`blocks.3.mlp.up_proj.bias` -> `blk.3.`, `mlp.up_proj`, `bias`."""
    short, _, kind = parameter.rpartition(".")
    if not short.startswith("blocks."):
        return "", short, kind
    _, layer, short = short.split(".", maxsplit=2)
    return f"blk.{layer}.", short, kind


def halves_from_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """Rows (H D, ...) of heads whose component 2i rotates with 2i + 1 -> i rotates with i + D / 2."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# --- from the keys of a file ---------------------------------------------------------------------------------------

_NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "attention.sliding_window": 0, "attention.causal": True, "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0, "rope.scale_linear": 1.0, "logit_scale": 1.0,
    "embedding_scale": 1.0, "residual_scale": 1.0,
}  # fmt: skip
"""Keys of what is not implemented -> the value with which the model does without it."""


def architecture_in(metadata: Mapping[str, Any]) -> str:
    """The architecture that a file states.

    Raises:
        ValueError: if it is not one of ours.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = did_you_mean(name, list(ARCHITECTURES)) if isinstance(name, str) else ""
        raise ValueError(f"general.architecture={shown(name)} is not implemented; {hint}there are {known}")
    return name


def config_from(metadata: Mapping[str, Any], embedding: tuple[int, ...], *, tied_head: bool) -> GPTConfig:
    """The config of a file, without the scaling of rotary positions, which is a tensor.

    Args:
        embedding: the shape of the token embedding, (V, C).

    Raises:
        ValueError: if a key is missing or of another kind, or states what is not implemented; names the key.
    """
    architecture = architecture_in(metadata)
    keys = _Keys(metadata, architecture)
    keys.refuse_unless_neutral()
    n_embd, n_head = keys.whole("embedding_length"), keys.whole("attention.head_count")
    vocab_size = keys.whole("vocab_size", embedding[0])
    if embedding != (vocab_size, n_embd):
        raise ValueError(f"{EMBEDDING!r} has the shape {embedding}, by its keys it is {(vocab_size, n_embd)}")
    options: dict[str, Any] = {}
    norm = "attention.layer_norm_epsilon"
    if architecture != "gpt2":
        norm = "attention.layer_norm_rms_epsilon"
        options = _rotary_options(keys, n_embd, n_head)
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=keys.whole("context_length"),
        n_layer=keys.whole("block_count"),
        n_head=n_head,
        n_embd=n_embd,
        ffn_width=keys.whole("feed_forward_length"),
        layer_norm_eps=keys.number(norm),
        tied_head=tied_head,
        **ARCHITECTURES[architecture],
        **options,
    )


def _rotary_options(keys: _Keys, n_embd: int, n_head: int) -> dict[str, Any]:
    head_dim = keys.whole("attention.key_length", n_embd // n_head or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.whole(key, head_dim)) != head_dim:
            raise ValueError(f"{keys.full(key)}={width} must be the width of a head, {head_dim}; others are not read")
    return {
        "n_kv_head": keys.whole("attention.head_count_kv", n_head),
        "head_dim": head_dim,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }


class _Keys:
    """The keys of an architecture, `llama.block_count` and its like."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata, self.architecture = metadata, architecture

    def full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.full(key)}={shown(value)} must be a whole number, at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{self.full(key)}={shown(value)} must be a number")
        return float(str(np.float32(value)))  # 1e-05 where a float32 is 9.999999747378752e-06

    def refuse_unless_neutral(self) -> None:
        for key, neutral in _NEUTRAL.items():
            value = self.metadata.get(self.full(key), neutral)
            is_neutral = value == neutral or (value == 0 and value is not False)
            if not is_neutral or isinstance(value, bool) != isinstance(neutral, bool):
                raise ValueError(f"{self.full(key)}={shown(value)} is not implemented, only {neutral}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self.full(key), default)
        if value is None:
            raise ValueError(f"{self.full(key)} is missing")
        return value


# --- from a config to keys -----------------------------------------------------------------------------------------


def architecture_of(config: GPTConfig) -> str:
    """The one architecture that computes what a model of this config computes.

    Raises:
        ValueError: if there is none; names the field that none has.
    """
    differing = {
        name: {field for field, value in fields.items() if getattr(config, field) != value}
        for name, fields in ARCHITECTURES.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    if wrong := sorted(differing[nearest]) or _without_a_key(config, nearest):
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"GGUF has no architecture for this model: model.{wrong[0]}={getattr(config, wrong[0])} does not fit "
            f"{nearest}, the nearest of {known}; export it with --format hf"
        )
    return nearest


def _without_a_key(config: GPTConfig, architecture: str) -> list[str]:
    """Fields that llama.cpp cannot read back: it derives the width of heads, or has no tensor for the scaling."""
    wrong = []
    if architecture in ("gpt2", "qwen2") and config.n_head * config.head_width != config.n_embd:
        wrong.append("head_dim")
    if architecture == "gpt2" and config.kv_heads != config.n_head:
        wrong.append("n_kv_head")
    if architecture != "llama" and config.rope_scaling is not None:
        wrong.append("rope_scaling")
    return wrong


def keys_of(config: GPTConfig, architecture: str) -> dict[str, int | float]:
    """The keys of a file; whole numbers are uint32 there, the others float32."""
    keys: dict[str, int | float] = {
        "block_count": config.n_layer,
        "context_length": config.context_length,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.n_head,
    }
    if architecture == "gpt2":
        keys["attention.layer_norm_epsilon"] = float(config.layer_norm_eps)
    else:
        keys |= {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_width,
            "attention.value_length": config.head_width,
            "attention.layer_norm_rms_epsilon": float(config.layer_norm_eps),
            "rope.dimension_count": config.head_width,
            "rope.freq_base": float(config.rope_theta),
            "vocab_size": config.vocab_size,
        }
    return {f"{architecture}.{key}": value for key, value in keys.items()}
