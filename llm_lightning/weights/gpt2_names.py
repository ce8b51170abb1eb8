"""Convert GPT-2 weights between Hugging Face's names and layout and ours. Reads no files.

Differences: their linear layers are `Conv1D`, stored (in, out); the head is usually left out because it is tied to
the token embedding; the `transformer.` prefix may be missing; older files have causal-mask buffers. Both sides have
query, key and value in one matrix, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.gpt import GPTConfig

_OUTER = {  # ours -> theirs, without the `transformer.` prefix
    "token_embedding.weight": "wte.weight",
    "position_embedding.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight",
    "final_norm.bias": "ln_f.bias",
}
_BLOCK = {
    "attn_norm": "ln_1",
    "attn.qkv_proj": "attn.c_attn",
    "attn.out_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_HEAD = "lm_head.weight"  # the same name on both sides
_VOCABULARY_ROWS = ("token_embedding.weight", _HEAD)
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
MOST_PADDING = 127  # rows: a vocabulary rounded up to a multiple of 64 or 128 for speed, 50,257 to 50,304

_SUPPORTED: dict[str, tuple[Any, ...]] = {  # config.json key -> values that match what our model computes
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


def config_from_hf(config_json: Mapping[str, Any]) -> GPTConfig:
    """Read a Hugging Face GPT-2 `config.json`; absent keys have transformers' defaults.

    Raises:
        ValueError: if it needs something that our GPT does not compute, or a value has the wrong type.
    """
    for key, supported in _SUPPORTED.items():
        if config_json.get(key, supported[0]) not in supported:
            wanted = " or ".join(repr(value) for value in supported)
            raise ValueError(f"config.json: {key}={config_json[key]!r} is not supported; it must be {wanted}")
    width = _number(config_json, "n_embd", 768)
    inner = config_json.get("n_inner")
    if inner not in (None, 4 * width):
        raise ValueError(f"config.json: n_inner={inner!r} must be null or 4 * n_embd = {4 * width}")
    return GPTConfig(
        vocab_size=_number(config_json, "vocab_size", 50257),
        context_length=_number(config_json, "n_positions" if "n_positions" in config_json else "n_ctx", 1024),
        n_layer=_number(config_json, "n_layer", 12),
        n_head=_number(config_json, "n_head", 12),
        n_embd=width,
        embedding_dropout=_number(config_json, "embd_pdrop", 0.1),
        attention_dropout=_number(config_json, "attn_pdrop", 0.1),
        residual_dropout=_number(config_json, "resid_pdrop", 0.1),
        qkv_bias=_flag(config_json, "qkv_bias"),  # our own key: transformers always has the bias
        tied_head=_flag(config_json, "tie_word_embeddings"),
        layer_norm_eps=_number(config_json, "layer_norm_epsilon", 1e-5),
    )


def config_to_hf(config: GPTConfig, eot_id: int | None) -> dict[str, Any]:
    """The `config.json` of a `GPT2LMHeadModel`; `eot_id` becomes its begin and end of text."""
    result = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
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
    is tied, and with a padded vocabulary, whose extra rows are cut.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes, tensors that are not floating point, a second
            head that contradicts `tied_head=True`, or a bias that contradicts `qkv_bias=False`.
    """
    layers = config.n_layer
    if layers > len(state):  # checked before a wrong config creates that many names
        raise ValueError(f"the config says n_layer={layers}, but the weights are only {len(state)} tensors")
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    if config.tied_head:
        theirs.setdefault(_HEAD, theirs.get("wte.weight", torch.empty(0)))
    names = _names(config, theirs_has_qkv_bias=True)
    _check_names({name for name in theirs if not _MASK_BUFFER.fullmatch(name)}, set(names.values()))
    shapes = shapes_of(config)
    result = {}
    for ours, name in names.items():
        stored = shapes[ours][::-1] if _is_conv1d(ours) else shapes[ours]
        tensor = _fitted(name, theirs[name], stored, ours in _VOCABULARY_ROWS)
        result[ours] = tensor.t() if _is_conv1d(ours) else tensor
    _check_tie(result, config)
    return _without_qkv_bias(result) if not config.qkv_bias else result


def to_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert our state dict to that of transformers' `GPT2LMHeadModel`, with contiguous tensors.

    A tied head is left out, as in transformers. A missing query-key-value bias is written as zeros, because GPT-2
    always has one. Rows of the vocabulary beyond `config.vocab_size` (padding) are cut.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes, tensors that are not floating point, or a head
            that contradicts `tied_head=True`.
    """
    names = _names(config, theirs_has_qkv_bias=config.qkv_bias)
    _check_names(set(state), set(names))
    shapes = shapes_of(config)
    fitted = {name: _fitted(name, state[name], shapes[name], name in _VOCABULARY_ROWS) for name in names}
    _check_tie(fitted, config)
    result = {}
    for ours, name in names.items():
        if ours == _HEAD and config.tied_head:
            continue
        tensor = fitted[ours].t() if _is_conv1d(ours) else fitted[ours]
        result[name if ours == _HEAD else f"transformer.{name}"] = tensor.contiguous()
        if not config.qkv_bias and ours.endswith("qkv_proj.weight"):
            result[f"transformer.{name.removesuffix('weight')}bias"] = tensor.new_zeros(3 * config.n_embd)
    return result


def module_to_hf(ours: str) -> str:
    """`blocks.0.attn.qkv_proj` -> `transformer.h.0.attn.c_attn`: the path of a linear layer in transformers' GPT-2."""
    if ours == "lm_head":
        return ours
    _, layer, part = ours.split(".", 2)
    return f"transformer.h.{layer}.{_BLOCK[part]}"


def module_from_hf(theirs: str) -> str:
    """The inverse of `module_to_hf`.

    Raises:
        ValueError: if our GPT has no such linear layer.
    """
    if theirs == "lm_head":
        return theirs
    match = re.fullmatch(r"(?:transformer\.)?h\.(\d+)\.(.+)", theirs)
    part = next((ours for ours, name in _BLOCK.items() if match and name == match[2] and "norm" not in ours), None)
    if match is None or part is None:
        raise ValueError(f"{theirs} is not a linear layer of GPT-2")
    return f"blocks.{match[1]}.{part}"


def infer_config(state: Mapping[str, Tensor]) -> GPTConfig:
    """Infer the config of a Hugging Face GPT-2 from its shapes, with heads of width 64, as in every GPT-2.

    Raises:
        ValueError: if this is not a GPT-2, or its width is not a multiple of 64.
    """
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    tokens, positions = theirs.get("wte.weight"), theirs.get("wpe.weight")
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
        tied_head=_HEAD not in theirs or torch.equal(theirs[_HEAD], tokens),
    )


def _names(config: GPTConfig, *, theirs_has_qkv_bias: bool) -> dict[str, str]:
    """Our names -> theirs without prefix, in the order of our state dict."""
    names = dict(_OUTER)
    for layer in range(config.n_layer):
        for ours, theirs in _BLOCK.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"h.{layer}.{theirs}.weight"
            if ours != "attn.qkv_proj" or theirs_has_qkv_bias:
                names[f"blocks.{layer}.{ours}.bias"] = f"h.{layer}.{theirs}.bias"
    return names | {_HEAD: _HEAD}


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of our tensors, always with a query-key-value bias."""
    width = config.n_embd
    outputs = {"attn.qkv_proj": 3 * width, "mlp.up_proj": 4 * width}
    inputs = {"mlp.down_proj": 4 * width}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab_size, width),
        "position_embedding.weight": (config.context_length, width),
        "final_norm.weight": (width,),
        "final_norm.bias": (width,),
        _HEAD: (config.vocab_size, width),
    }
    for layer in range(config.n_layer):
        for part in _BLOCK:
            rows, columns = outputs.get(part, width), inputs.get(part, width)
            shapes[f"blocks.{layer}.{part}.weight"] = (rows,) if "norm" in part else (rows, columns)
            shapes[f"blocks.{layer}.{part}.bias"] = (rows,)
    return shapes


def _is_conv1d(ours: str) -> bool:
    return ours.endswith("_proj.weight")


def _check_names(actual: set[str], expected: set[str]) -> None:
    problems = []
    for what, names in (("missing", expected - actual), ("unknown", actual - expected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what}: {', '.join(sorted(names)[:5])}{more}")
    if problems:
        raise ValueError(f"the weights do not fit this GPT-2; {'; '.join(problems)}")


def _fitted(name: str, tensor: Tensor, shape: tuple[int, ...], may_be_padded: bool) -> Tensor:
    """Check a tensor; return it without the padding of its vocabulary rows."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, not floating point; quantised weights are not supported")
    if may_be_padded and tensor.dim() == 2 and 0 < tensor.size(0) - shape[0] <= MOST_PADDING:
        tensor = tensor[: shape[0]]
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} by the config")
    return tensor


def _check_tie(ours: Mapping[str, Tensor], config: GPTConfig) -> None:
    head, embedding = ours[_HEAD], ours["token_embedding.weight"]
    same = head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)  # NaN is not equal to itself
    if config.tied_head and not same:
        raise ValueError(f"{_HEAD} differs from the token embedding, but the config says that they are tied")


def _without_qkv_bias(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in [name for name in ours if name.endswith("qkv_proj.bias")]:
        if ours.pop(name).any():
            raise ValueError(f"config.json says qkv_bias=false, but {name} is not zero; remove that line")
    return ours


def _number(config_json: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config_json.get(key, default)
    kinds = int if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"config.json: {key}={value!r} must be a number such as {default}")
    return value


def _flag(config_json: Mapping[str, Any], key: str) -> bool:
    value = config_json.get(key, True)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={value!r} must be true or false")
    return value
