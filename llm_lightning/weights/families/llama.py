"""Convert weights of the Llama kind between transformers' names and ours. Reads no files.

Llama, SmolLM2, Qwen2 and Qwen3 are one architecture: RMS norms, rotary positions, a gated MLP. They differ in biases,
in norms on queries and keys, and in the width of heads, which are fields of `GPTConfig`.

Differences from our layout: query, key and value are three matrices, ours has their rows one above the other. Both
sides rotate the halves of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.models.rope import RopeScaling
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

_OUTER = {EMBEDDING: "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight", HEAD: HEAD}
_BLOCK = {  # ours -> theirs; several: ours has their rows one above the other
    "attn_norm": ("input_layernorm",),
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.out_proj": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "mlp.up_proj": ("mlp.up_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
_BUFFER = re.compile(r".+\.rotary_emb\.inv_freq")  # in files of older versions

_DEFAULTS: dict[str, dict[str, Any]] = {  # transformers', for keys that a config.json leaves out
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
}
_KINDS = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # config.json key -> values that match what our model computes
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "per_layer_config": (None, {}),
    "is_causal": (True,),
}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor")
_ROPE_KINDS = ("default", "llama3")
_THETA = 10_000.0  # transformers' own, where config.json states none
_OURS: dict[str, Any] = {"norm": "rms", "position": "rope", "mlp": "swiglu"}


def config_from_hf(config_json: Mapping[str, Any]) -> GPTConfig:
    """Read the `config.json` of a Llama, Qwen2 or Qwen3; absent keys have transformers' defaults.

    Raises:
        ValueError: if it needs something that our GPT does not compute, or a value has the wrong type.
    """
    kind = config_json["model_type"]
    check_supported(config_json, _SUPPORTED)
    _refuse_sliding_windows(config_json)
    defaults = _DEFAULTS[kind]
    heads, width = number(config_json, "num_attention_heads", 32), number(config_json, "hidden_size", 4096)
    theta, scaling = _rope_of(config_json)
    own = width // max(heads, 1)
    biases = flag(config_json, "attention_bias", False) if kind != "qwen2" else False
    return GPTConfig(
        vocab_size=number(config_json, "vocab_size", defaults["vocab_size"]),
        context_length=number(config_json, "max_position_embeddings", defaults["max_position_embeddings"]),
        n_layer=number(config_json, "num_hidden_layers", 32),
        n_head=heads,
        n_embd=width,
        attention_dropout=0.0 if config_json.get("attention_dropout") is None else config_json["attention_dropout"],
        tied_head=flag(config_json, "tie_word_embeddings", False),
        layer_norm_eps=number(config_json, "rms_norm_eps", 1e-6),
        **_OURS,
        n_kv_head=_number_or(config_json, "num_key_value_heads", heads, absent=heads if kind == "llama" else 32),
        head_dim=_number_or(config_json, "head_dim", own, absent=128 if kind == "qwen3" else own),
        ffn_width=number(config_json, "intermediate_size", defaults["intermediate_size"]),
        qkv_bias=biases or kind == "qwen2",
        out_bias=biases,
        mlp_bias=kind == "llama" and flag(config_json, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        rope_theta=theta,
        rope_scaling=scaling,
    )


def config_to_hf(config: GPTConfig, eot_id: int | None) -> dict[str, Any]:
    """The `config.json` of a model for transformers, of version 4 and 5; `eot_id` becomes its end of text.

    Raises:
        ValueError: if no model of the families computes what the config says.
    """
    architecture = architecture_of(config)
    kind, scaling = _KINDS[architecture], config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": "llama3", **{key: getattr(scaling, key) for key in _SCALING}}
        rope["original_max_position_embeddings"] = scaling.original_context_length
    result = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_width,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_dropout": config.attention_dropout,
        "rms_norm_eps": config.layer_norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},  # version 5
        "rope_theta": config.rope_theta,  # version 4, which ignores rope_parameters
        "rope_scaling": None if scaling is None else rope,
        "bos_token_id": None,
        "eos_token_id": eot_id,
    }
    if kind == "qwen2":
        return result | {"use_sliding_window": False}
    return result | {"attention_bias": config.qkv_bias} | ({"mlp_bias": config.mlp_bias} if kind == "llama" else {})


def from_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert a state dict of transformers to ours. Reads each tensor of `state` once; only fused ones are copied.

    Accepts files without the `model.` prefix, and without `lm_head.weight` if the head is tied.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes, tensors that are not floating point, or a second
            head that contradicts `tied_head=True`.
    """
    check_layers(config, len(state), "num_hidden_layers")
    theirs = {name if name == HEAD or name.startswith("model.") else f"model.{name}": name for name in state}
    shapes = parameter_shapes(config)
    names = {ours: _theirs(ours) for ours in shapes}
    if config.tied_head and HEAD not in theirs:
        names.pop(HEAD)
    expected = {name for several in names.values() for name in several}
    check_names({name for name in theirs if not _BUFFER.fullmatch(name)}, expected, _name_of(config))
    result = {}
    for ours, several in names.items():
        rows = config.qkv_rows if len(several) > 1 else shapes[ours][:1]
        parts = [
            fitted(name, state[theirs[name]], (count, *shapes[ours][1:]))
            for name, count in zip(several, rows, strict=True)
        ]
        result[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    result.setdefault(HEAD, result[EMBEDDING])
    check_tie(result, config)
    return result


def to_hf(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert our state dict to transformers', as views of its tensors; a tied head is left out.

    Raises:
        ValueError: for missing or unknown keys, wrong shapes, tensors that are not floating point, or a head
            that contradicts `tied_head=True`.
    """
    shapes = parameter_shapes(config)
    check_names(set(state), set(shapes), _name_of(config))
    ours = {name: fitted(name, state[name], shape) for name, shape in shapes.items()}
    check_tie(ours, config)
    if config.tied_head:
        ours.pop(HEAD)
    result: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        several = _theirs(name)
        parts = tensor.split(config.qkv_rows) if len(several) > 1 else (tensor,)
        result |= dict(zip(several, parts, strict=True))
    return result


def module_to_hf(ours: str) -> tuple[str, ...]:
    """The paths of a linear layer in transformers: of `qkv_proj` those of q, k and v, in the order of its rows."""
    if ours == "lm_head":
        return (ours,)
    _, layer, part = ours.split(".", 2)
    return tuple(f"model.layers.{layer}.{name}" for name in _BLOCK[part])


def module_from_hf(theirs: str) -> tuple[str, int]:
    """The inverse of `module_to_hf`: our path, and the position of `theirs` in the tuple.

    Raises:
        ValueError: if our GPT has no such linear layer.
    """
    if theirs == "lm_head":
        return theirs, 0
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", theirs)
    if match is not None:
        for ours, names in _BLOCK.items():
            if match[2] in names and ours.endswith("_proj"):
                return f"blocks.{match[1]}.{ours}", names.index(match[2])
    raise ValueError(f"{theirs} is not a linear layer of Llama, Qwen2 or Qwen3")


def _name_of(config: GPTConfig) -> str:
    """The family's name in an error message."""
    return {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[_kind_of(config)]


def _kind_of(config: GPTConfig) -> str:
    """`model_type` in transformers of what a config of this kind describes.

    Raises:
        ValueError: if transformers has no class that computes it.
    """
    return _KINDS[architecture_of(config)]


def _theirs(ours: str) -> tuple[str, ...]:
    """Their names of a tensor: one, or those of query, key and value."""
    if ours in _OUTER:
        return (_OUTER[ours],)
    _, layer, part = ours.split(".", 2)
    module, _, kind = part.rpartition(".")
    return tuple(f"model.layers.{layer}.{name}.{kind}" for name in _BLOCK[module])


def _rope_of(config_json: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and their scaling.

    transformers 5 writes `rope_parameters` with `rope_theta` inside, 4 `rope_theta` and `rope_scaling` beside it. Both
    are read, as 5 reads them: `rope_scaling` wins, and 10,000 is used where no place states a base.
    """
    nodes = [config_json.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    for node in nodes:
        if not isinstance(node, dict) or any(isinstance(value, dict) for value in node.values()):
            raise ValueError(
                f"config.json: rope_parameters={shown(node)} must be an object, with one set of values for all layers"
            )
        check_supported(node, {"partial_rotary_factor": (1.0, None)})
    rope = nodes[0] or nodes[1]
    theta = _stated_once("rope_theta", (*nodes, config_json), _THETA)
    if rope.get("rope_theta") is None and config_json.get("rope_theta") is None and theta != _THETA:
        raise ValueError(
            f"config.json: rope_scaling stands in place of rope_parameters, which alone states rope_theta={theta}; "
            "state it beside them"
        )
    return theta, _scaling_of(rope, config_json)


def _stated_once(key: str, places: Iterable[Mapping[str, Any]], default: float) -> float:
    """The number that one or more places state alike.

    Raises:
        ValueError: if they contradict each other: versions of transformers differ in which one wins.
    """
    stated = {float(number(place, key, default)) for place in places if place.get(key) is not None}
    if len(stated) > 1:
        raise ValueError(f"config.json states {key} twice, {' and '.join(map(str, sorted(stated)))}; keep one")
    return stated.pop() if stated else default


def _scaling_of(rope: Mapping[str, Any], config_json: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise ValueError(
            f"config.json: rope_scaling of kind {shown(kind)} is not supported; it must be {' or '.join(_ROPE_KINDS)}"
        )
    if kind == "default":
        return None
    own = config_json.get("max_position_embeddings", _DEFAULTS[config_json["model_type"]]["max_position_embeddings"])
    if missing := [key for key in _SCALING if key not in rope]:
        raise ValueError(f"config.json: rope_scaling has no {missing[0]}, which llama3 needs")
    factors = {key: float(number(rope, key, 1.0)) for key in _SCALING}
    original = _stated_once("original_max_position_embeddings", (rope, config_json), own)
    return RopeScaling(**factors, original_context_length=int(original))


def _refuse_sliding_windows(config_json: Mapping[str, Any]) -> None:
    """Refuse layers that attend to a window, as transformers derives them."""
    layers = config_json.get("layer_types")
    if layers is None and config_json.get("use_sliding_window") and config_json.get("sliding_window", 4096) is not None:
        first = number(config_json, "max_window_layers", 28)
        if first < number(config_json, "num_hidden_layers", 32):
            raise ValueError(
                "config.json: use_sliding_window=True is not supported: our GPT attends to the whole context"
            )
    if not isinstance(layers, (list, type(None))):
        raise ValueError(f"config.json: layer_types={shown(layers)} must be a list of names")
    strange = sorted(set(map(str, layers or [])) - {"full_attention"})
    if strange:
        raise ValueError(f"config.json: layer_types with {strange[0]!r} are not supported, only 'full_attention'")


def _number_or(config_json: Mapping[str, Any], key: str, null: int, *, absent: int) -> int:
    """A number that may be null or absent, which mean `null` and `absent`."""
    value: int = number(config_json, key, absent) if config_json.get(key, absent) is not None else null
    return value
