"""Convert GPT-2 weights between Hugging Face's names and layout and ours. Reads no files.

Differences: their linear layers are `Conv1D`, stored (in, out); the head is usually left out because it is tied to
the token embedding; the `transformer.` prefix may be missing; older files have causal-mask buffers. Both sides have
query, key and value in one matrix, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.models.shapes import parameter_shapes
from llm_lightning.weights.families.architecture import architecture_of
from llm_lightning.weights.families.checks import (
    EMBEDDING,
    HEAD,
    check_layers,
    check_names,
    check_supported,
    check_tie,
    fitted,
    flag,
    number,
    shown,
)

_OUTER = {  # ours -> theirs, without the `transformer.` prefix
    "token_embedding.weight": "wte.weight",
    "position_embedding.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight",
    "final_norm.bias": "ln_f.bias",
    HEAD: HEAD,
}
_BLOCK = {
    "attn_norm": "ln_1",
    "attn.qkv_proj": "attn.c_attn",
    "attn.out_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_VOCABULARY_ROWS = (EMBEDDING, HEAD)
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
MOST_PADDING = 127  # rows: a vocabulary rounded up to a multiple of 64 or 128 for speed, 50,257 to 50,304

_SUPPORTED: dict[str, tuple[Any, ...]] = {  # config.json key -> values that match what our model computes
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
}
_ALSO = {  # what transformers reads as well -> the key
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def config_from_hf(config_json: Mapping[str, Any]) -> GPTConfig:
    """Read a Hugging Face GPT-2 `config.json`; absent keys have transformers' defaults.

    Raises:
        ValueError: if it needs something that our GPT does not compute, or a value has the wrong type.
    """
    check_supported(config_json, _SUPPORTED)
    config_json = _by_own_names(config_json)
    width = number(config_json, "n_embd", 768)
    inner = None if config_json.get("n_inner") is None else number(config_json, "n_inner", 4 * width)
    return GPTConfig(
        vocab_size=number(config_json, "vocab_size", 50257),
        context_length=number(config_json, "n_positions" if "n_positions" in config_json else "n_ctx", 1024),
        n_layer=number(config_json, "n_layer", 12),
        n_head=number(config_json, "n_head", 12),
        n_embd=width,
        ffn_width=None if inner in (None, 4 * width) else inner,
        embedding_dropout=number(config_json, "embd_pdrop", 0.1),
        attention_dropout=number(config_json, "attn_pdrop", 0.1),
        residual_dropout=number(config_json, "resid_pdrop", 0.1),
        qkv_bias=flag(config_json, "qkv_bias", True),  # our own key: transformers always has the bias
        tied_head=flag(config_json, "tie_word_embeddings", True),
        layer_norm_eps=number(config_json, "layer_norm_epsilon", 1e-5),
    )


def _by_own_names(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """The config with GPT-2's names for sizes that other families call otherwise."""
    known = dict(config_json)
    for other, key in _ALSO.items():
        if other in known and known.setdefault(key, known[other]) != known[other]:
            raise ValueError(
                f"config.json states {key}={shown(known[key])} and {other}={shown(known[other])}, which mean the same; "
                "keep one"
            )
    return known


def config_to_hf(config: GPTConfig, eot_id: int | None) -> dict[str, Any]:
    """The `config.json` of a `GPT2LMHeadModel`; `eot_id` becomes its begin and end of text.

    Raises:
        ValueError: if transformers' GPT-2 does not compute what the config says.
    """
    architecture = architecture_of(config)
    assert architecture == "GPT2LMHeadModel", f"this is a {architecture}"
    result = {
        "architectures": [architecture],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None if config.mlp_width == 4 * config.n_embd else config.mlp_width,
        "activation_function": "gelu_new",
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
    }
    return result if config.qkv_bias else result | {"qkv_bias": False}


def from_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert a Hugging Face GPT-2 state dict to ours. The results are views of the given tensors, not copies.

    Accepts files without the `transformer.` prefix, with mask buffers, without `lm_head.weight` if the head
    is tied, and with a padded vocabulary, whose extra rows are cut. Reads each tensor of `state` once.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes, tensors that are not floating point, a second
            head that contradicts `tied_head=True`, or a bias that contradicts `qkv_bias=False`.
    """
    check_layers(config, len(state), "n_layer")
    theirs = {name.removeprefix("transformer."): name for name in state}
    shapes = parameter_shapes(replace(config, qkv_bias=True))  # as theirs always are
    names = {ours: _theirs(ours) for ours in shapes}
    if config.tied_head and HEAD not in theirs:
        names.pop(HEAD)
    check_names({name for name in theirs if not _MASK_BUFFER.fullmatch(name)}, set(names.values()), "GPT-2")
    result = {}
    for ours, name in names.items():
        stored = shapes[ours][::-1] if _is_conv1d(ours) else shapes[ours]
        tensor = fitted(name, _unpadded(ours, state[theirs[name]], stored), stored)
        result[ours] = tensor.t() if _is_conv1d(ours) else tensor
    result.setdefault(HEAD, result[EMBEDDING])
    check_tie(result, config)
    return _without_qkv_bias(result) if not config.qkv_bias else result


def to_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert our state dict to that of transformers' `GPT2LMHeadModel`, as views of its tensors.

    A tied head is left out, as in transformers. A missing query-key-value bias is written as zeros, because GPT-2
    always has one. Rows of the vocabulary beyond `config.vocab_size` (padding) are cut.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes, tensors that are not floating point, or a head
            that contradicts `tied_head=True`.
    """
    shapes = parameter_shapes(config)
    check_names(set(state), set(shapes), "GPT-2")
    ours = {name: fitted(name, _unpadded(name, state[name], shape), shape) for name, shape in shapes.items()}
    check_tie(ours, config)
    if config.tied_head:
        ours.pop(HEAD)
    result = {}
    for name, tensor in ours.items():
        prefix = "" if name == HEAD else "transformer."
        result[f"{prefix}{_theirs(name)}"] = tensor.t() if _is_conv1d(name) else tensor
        if not config.qkv_bias and name.endswith("qkv_proj.weight"):
            result[f"{prefix}{_theirs(name).removesuffix('weight')}bias"] = tensor.new_zeros(tensor.size(0))
    return result


def module_to_hf(ours: str) -> tuple[str, ...]:
    """`blocks.0.attn.qkv_proj` -> `transformer.h.0.attn.c_attn`: the path of a linear layer in transformers' GPT-2.

    Other families have several for one of ours; GPT-2 always has one.
    """
    if ours == "lm_head":
        return (ours,)
    _, layer, part = ours.split(".", 2)
    return (f"transformer.h.{layer}.{_BLOCK[part]}",)


def module_from_hf(theirs: str) -> tuple[str, int]:
    """The inverse of `module_to_hf`: our path, and the position of `theirs` in the tuple, here always 0.

    Raises:
        ValueError: if our GPT has no such linear layer.
    """
    if theirs == "lm_head":
        return theirs, 0
    match = re.fullmatch(r"(?:transformer\.)?h\.(\d+)\.(.+)", theirs)
    part = next((ours for ours, name in _BLOCK.items() if match and name == match[2] and "norm" not in ours), None)
    if match is None or part is None:
        raise ValueError(f"{theirs} is not a linear layer of GPT-2")
    return f"blocks.{match[1]}.{part}", 0


def infer_config(state: Mapping[str, Tensor]) -> GPTConfig:
    """Infer the config of a Hugging Face GPT-2 from its shapes, with heads of width 64, as in every GPT-2.

    Raises:
        ValueError: if this is not a GPT-2, or its width is not a multiple of 64.
    """
    theirs = {name.removeprefix("transformer."): name for name in state}
    tokens, positions = (state[theirs[name]] if name in theirs else None for name in ("wte.weight", "wpe.weight"))
    layers = {int(match[1]) for name in theirs if (match := re.match(r"h\.(\d{1,6})\.", name))}
    if tokens is None or positions is None or tokens.dim() != 2 or positions.dim() != 2 or not layers:
        raise ValueError("these are not GPT-2 weights: wte.weight, wpe.weight and h.0.* are needed")
    width = tokens.size(1)
    if width % 64:
        raise ValueError(f"n_embd={width} is not a multiple of 64, so n_head cannot be inferred; add a config.json")
    return GPTConfig(
        vocab_size=tokens.size(0),
        context_length=positions.size(0),
        n_layer=max(layers) + 1,
        n_head=width // 64,
        n_embd=width,
        tied_head=HEAD not in theirs or torch.equal(state[theirs[HEAD]], tokens),
    )


def _theirs(ours: str) -> str:
    """Their name of a tensor, without the prefix."""
    if not ours.startswith("blocks."):
        return _OUTER[ours]
    _, layer, part = ours.split(".", 2)
    module, _, kind = part.rpartition(".")
    return f"h.{layer}.{_BLOCK[module]}.{kind}"


def _is_conv1d(ours: str) -> bool:
    return ours.endswith("_proj.weight")


def _unpadded(ours: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor without the padding of its vocabulary rows."""
    if ours in _VOCABULARY_ROWS and tensor.dim() == 2 and 0 < tensor.size(0) - shape[0] <= MOST_PADDING:
        return tensor[: shape[0]]
    return tensor


def _without_qkv_bias(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in [name for name in ours if name.endswith("qkv_proj.bias")]:
        if ours.pop(name).any():
            raise ValueError(f"config.json says qkv_bias=false, but {name} is not zero; remove that line")
    return ours
