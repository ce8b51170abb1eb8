"""The one core in plain PyTorch: config, attention layer, MLP, block, model. Read it top to bottom.

`attention.py` has the attention kernels, the key-value cache and packing; `rope.py` rotary positions.

The fields of `GPTConfig` say which architecture it is. Their defaults are GPT-2's (Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners"): pre-LayerNorm blocks, learned positions, tanh GELU, biases. Llama (Touvron
et al. 2023), SmolLM2 and Qwen have RMS norms, rotary positions, SwiGLU, grouped heads and few biases.

Tensor letters: B batch, T time (new positions), S time (all positions attended to), C width (n_embd), H query heads,
KV key and value heads, D head width, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_lightning.models.attention import CAUSAL, Context, KVCache, attend
from llm_lightning.models.lora import effective_weight
from llm_lightning.models.norm import RMSNorm
from llm_lightning.models.rope import RopeScaling, Rotation, rotate, rotation

FREE_FIELDS = ("context_length", "embedding_dropout", "attention_dropout", "residual_dropout")
"""Fields of `GPTConfig` that a run may choose for given weights; every other one comes with them."""


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Every field is stored in every checkpoint.

    Args:
        norm: `layer` (LayerNorm) or `rms` (RMSNorm, Zhang and Sennrich 2019).
        position: `learned` (a table) or `rope` (rotary).
        mlp: `gelu` (two layers, tanh GELU) or `swiglu` (three layers, Shazeer 2020).
        n_kv_head: key and value heads, each shared by n_head / n_kv_head query heads (Ainslie et al. 2023); None:
            n_head.
        head_dim: width of a head; None: n_embd / n_head.
        ffn_width: inner width of the MLP; None: 4 n_embd.
        qkv_bias, out_bias, mlp_bias: whether `attn.qkv_proj`, `attn.out_proj` and the layers of the MLP have a bias.
        qk_norm: normalise each query and key head before it is rotated (Qwen3).
        rope_theta, rope_scaling: of rotary positions; see `rope.py`.
        layer_norm_eps: of every norm, RMS norms too.

    Raises:
        ValueError: if a value is of another type or out of range, or sizes do not fit each other.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    qkv_bias: bool = True
    tied_head: bool = True
    layer_norm_eps: float = 1e-5
    norm: str = "layer"
    position: str = "learned"
    mlp: str = "gelu"
    n_kv_head: int | None = None
    head_dim: int | None = None
    ffn_width: int | None = None
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            self._require_size(name)
        for name in ("n_kv_head", "head_dim", "ffn_width"):
            if getattr(self, name) is not None:
                self._require_size(name)
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            self._require(name, (int, float), "a number")
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("qkv_bias", "out_bias", "mlp_bias", "tied_head", "qk_norm"):
            self._require(name, bool, "true or false")
        for name in ("layer_norm_eps", "rope_theta"):
            self._require(name, (int, float), "a number")
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}={getattr(self, name)} must be positive and finite")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={reprlib.repr(getattr(self, name))} must be {' or '.join(choices)}")
        self._check_heads()
        self._check_scaling()

    @property
    def kv_heads(self) -> int:
        """KV"""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """D"""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """F"""
        return self.ffn_width or 4 * self.n_embd

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value matrices in the weight of `attn.qkv_proj`: H D, KV D, KV D."""
        kv = self.kv_heads * self.head_width
        return self.n_head * self.head_width, kv, kv

    @property
    def has_dropout(self) -> bool:
        return any((self.embedding_dropout, self.attention_dropout, self.residual_dropout))

    def cache_key_fields(self) -> dict[str, Any]:
        """Fields that change outputs but not the shapes of weights: a part of the key of stored results.

        A field is left out where it has GPT-2's value (but `n_head`), so that a new one leaves existing keys unchanged.
        """
        shown = ("vocab_size", "context_length", "n_layer", "n_embd", "qkv_bias", "tied_head")
        dropouts = ("embedding_dropout", "attention_dropout", "residual_dropout")  # stored results have none
        rest = [field for field in fields(self) if field.name not in (*shown, *dropouts)]
        values = asdict(self)
        return {f.name: values[f.name] for f in rest if f.name == "n_head" or values[f.name] != f.default}

    def _check_heads(self) -> None:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}")
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(f"model.position=rope rotates pairs, and heads are {self.head_width} wide; make it even")

    def _check_scaling(self) -> None:
        """Convert the mapping that a file or a setting holds."""
        if isinstance(self.rope_scaling, Mapping):
            names = {field.name for field in fields(RopeScaling)}
            if wrong := sorted(map(str, set(self.rope_scaling) ^ names)):
                raise ValueError(f"model.rope_scaling: {wrong[0]} is missing or unknown; it has {', '.join(names)}")
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        self._require("rope_scaling", (RopeScaling, type(None)), "null or the four numbers of Llama 3")

    def _require_size(self, name: str) -> None:
        self._require(name, int, "a whole number")
        if getattr(self, name) < 1:
            raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")

    def _require(self, name: str, kinds: type | tuple[type, ...], what: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"model.{name}={reprlib.repr(value)} must be {what}")


CHOICES = {"norm": ("layer", "rms"), "position": ("learned", "rope"), "mlp": ("gelu", "swiglu")}


def build_norm(config: GPTConfig, width: int | None = None) -> nn.Module:
    """The norm of the architecture over `width` components; None: C."""
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(width or config.n_embd, eps=config.layer_norm_eps)


class CausalSelfAttention(nn.Module):
    """Multi-head attention with one fused projection for query, key and value."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # index into the key-value cache
        self.n_head, self.kv_heads, self.head_width = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.attention_dropout
        self.qkv_rows = config.qkv_rows  # of query, key and value in the projection
        self.qkv_proj = nn.Linear(config.n_embd, sum(self.qkv_rows), bias=config.qkv_bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            self.q_norm, self.k_norm = build_norm(config, self.head_width), build_norm(config, self.head_width)
        self.out_proj = nn.Linear(self.n_head * self.head_width, config.n_embd, bias=config.out_bias)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, context: Context = CAUSAL) -> Tensor:
        """(B, T, C) -> (B, T, C), or as many positions as `context.output_positions` names."""
        heads = self._normed(self.qkv_proj(x).unflatten(-1, (-1, self.head_width)))
        if context.packing is not None:
            heads = context.packing.spread(heads.flatten(2)).unflatten(-1, (-1, self.head_width))
        heads = heads.transpose(1, 2)
        if context.rotation is not None:
            heads = rotate(heads, context.rotation, self.n_head + self.kv_heads)
        split = (self.n_head, self.kv_heads, self.kv_heads)
        query, key, value = heads.split(split, dim=1)  # (B, H, T, D), twice (B, KV, T, D)
        dtype = query.dtype
        if context.output_positions is not None and context.packing is None:
            assert context.mask is not None, "output positions need a mask that says what each may attend to"
            query = query[torch.arange(len(x), device=x.device), :, context.output_positions]
            query = query.unsqueeze(2)  # (B, H, 1, D)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
            query = query.to(key.dtype)  # a cache may be kept in a wider type than the weights
        mixed = attend(query, key, value, context.mask, self.dropout if self.training else 0.0).to(dtype)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H D)
        if context.packing is not None:
            mixed = context.packing.gather(mixed, context.output_positions)
        return self.residual_dropout(self.out_proj(mixed))

    def _normed(self, heads: Tensor) -> Tensor:
        """Normalise queries and keys, where the architecture does: (B, T, H + 2 KV, D) -> the same."""
        if self.q_norm is None or self.k_norm is None:
            return heads
        query, key, value = heads.split((self.n_head, self.kv_heads, self.kv_heads), dim=2)
        return torch.cat((self.q_norm(query), self.k_norm(key), value), dim=2)


class MLP(nn.Module):
    """Two linear layers with an activation between them, or three: `swiglu` multiplies by an activated gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = None
        if config.mlp == "swiglu":
            self.gate_proj = nn.Linear(config.n_embd, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.mlp_bias)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_dropout(self.down_proj(self._inner(x)))

    def _inner(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, F)."""
        # GPT-2 was trained with the tanh form; the exact GELU moves its logits by about 1e-2. Editing these lines
        # changes what existing checkpoints compute, unnoticed; stored results of frozen parts are computed again.
        # Another activation would be a value of `GPTConfig.mlp`, which weights/families and conf/model then name.
        if self.gate_proj is not None:
            return F.silu(self.gate_proj(x)) * self.up_proj(x)
        return F.gelu(self.up_proj(x), approximate="tanh")


class Block(nn.Module):
    """Attention, then the MLP, each with a norm before it and a residual connection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context = CAUSAL) -> Tensor:
        """(B, T, C) -> (B, T, C), or the rows at `context.output_positions`; `qkv_proj` runs for all positions."""
        x = context.select(x) + self.attn(self.attn_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


STACKED = {"attn.qkv_proj": 3, "attn.out_proj": 1, "mlp.gate_proj": 1, "mlp.up_proj": 1, "mlp.down_proj": 1}
"""The linear layers of a block, and how many matrices the weight of each has, one above the other."""


def matrices_in(name: str) -> int:
    """The number of matrices in the parameter `name` of a model: 0 unless it is a weight in `STACKED`."""
    of_block = re.search(r"(?:^|\.)blocks\.\d+\.(.+)\.weight$", name)
    return STACKED.get(of_block[1], 0) if of_block else 0


class GPT(nn.Module):
    """Token ids in, logits out. The trunk (`hidden_states`) and the head (`logits`) can be called apart.

    Args:
        config: the architecture.
        init: `gpt2` (normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer), biases 0) or `torch`
            (PyTorch's layer defaults, as the book uses).
        activation_checkpointing: recompute each block in the backward pass: about a third more time, and
            activation memory of one block instead of `n_layer`.
    """

    def __init__(self, config: GPTConfig, *, init: str = "gpt2", activation_checkpointing: bool = False) -> None:
        super().__init__()
        if init not in ("gpt2", "torch"):
            raise ValueError(f"model.init={init!r} must be gpt2 or torch")
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = build_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.token_embedding.weight
        if init == "gpt2":
            self._init_gpt2()

    def forward(self, input_ids: Tensor, context: Context = CAUSAL) -> Tensor:
        """Logits (B, T, V) for `input_ids` (B, T) int64."""
        return self.logits(self.hidden_states(input_ids, context))

    def hidden_states(self, input_ids: Tensor, context: Context = CAUSAL) -> Tensor:
        """The trunk: final-norm output (B, T, C), or of the positions that `context.output_positions` names.

        Raises:
            ValueError: if the sequence does not fit into `context_length`.
        """
        cache = context.cache
        x = self.embed(input_ids, context.positions, start=0 if cache is None else cache.length)
        x = self.run_blocks(x, context)
        if cache is not None:
            cache.length += input_ids.size(1)
        return self.final_norm(x)

    def embed(self, input_ids: Tensor, positions: Tensor | None = None, start: int = 0) -> Tensor:
        """Token embedding, with learned positions plus theirs: (B, T, C); by default `start`..`start` + T - 1.

        Raises:
            ValueError: if the sequence does not fit into `context_length`.
        """
        end = start + input_ids.size(1)
        if positions is None and end > self.config.context_length:
            raise ValueError(
                f"sequence of {end} tokens exceeds context_length={self.config.context_length}; "
                "shorten it or use a model with a longer context"
            )
        x = self.token_embedding(input_ids)
        if self.position_embedding is not None:
            positions = torch.arange(start, end, device=input_ids.device) if positions is None else positions
            x = x + self.position_embedding(positions)
        # A frozen embedding may be kept in a narrower type than what is trained; the residual stream is not.
        return self.embedding_dropout(x.to(self.final_norm.weight.dtype))

    def run_blocks(self, x: Tensor, context: Context = CAUSAL, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks `start`..`stop` - 1 (default: all) in turn: (B, T, C) -> (B, T, C), or the output positions."""
        if self.config.position == "rope":
            context = context._replace(rotation=self._rotation(x, context))
        for layer in range(start, self.config.n_layer if stop is None else stop):
            is_last = layer == self.config.n_layer - 1
            arguments = (x, context if is_last else context._replace(output_positions=None))
            if self.activation_checkpointing and self.training and context.cache is None:
                x = checkpoint(self.blocks[layer], *arguments, use_reentrant=False)
            else:
                x = self.blocks[layer](*arguments)
        return x

    def _rotation(self, x: Tensor, context: Context) -> Rotation:
        """The rotation of the positions of `x` (B, T, C), or of the places into which packed rows are spread."""
        positions, start = context.positions, 0 if context.cache is None else context.cache.length
        if positions is None:
            positions = torch.arange(start, start + x.size(1), device=x.device)
        if context.packing is not None:
            positions = positions[context.packing.rows]
        return rotation(positions, self.config.head_width, self.config.rope_theta, self.config.rope_scaling)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., C) -> (..., V)."""
        return self.lm_head(hidden)

    def head_weight(self) -> Tensor:
        """(V, C): the matrix of the head, its adapter included. Losses multiply by it themselves, in chunks."""
        return effective_weight(self.lm_head)

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `capacity` positions of each row, by default in the type of the weights."""
        shape = (batch_size, self.config.kv_heads, capacity, self.config.head_width)
        return KVCache(self.config.n_layer, shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so the ids must be."""
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding, and of frozen weights."""
        return self.token_embedding.weight.dtype

    @property
    def trunk(self) -> GPT:
        """The model itself: `model.trunk` is a GPT, whether the model is a GPT or a `Classifier`."""
        return self

    def num_parameters(self) -> int:
        """Parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward FLOPs per token: 6 N + 12 L H D T (PaLM, appendix B), N without position embeddings."""
        config = self.config
        matrices = self.num_parameters()
        if self.position_embedding is not None:
            matrices -= self.position_embedding.weight.numel()
        if not config.tied_head:  # an untied input embedding is a lookup, not a product
            matrices -= self.token_embedding.weight.numel()
        return 6 * matrices + 12 * config.n_layer * config.n_head * config.head_width * sequence_length

    def _init_gpt2(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # GPT-2 paper, section 2.3
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)
