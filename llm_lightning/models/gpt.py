"""The GPT-2 architecture in plain PyTorch: config, attention, MLP, block, model. Read it top to bottom.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-LayerNorm blocks, learned positions,
tanh GELU, optionally a head tied to the token embedding.

Tensor letters: B batch, T time (new positions), S time (all positions attended to), C width (n_embd), H heads,
D head width (C / H), V vocabulary.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """What the weights look like. Every field is stored in every checkpoint.

    Raises:
        ValueError: if a value is of another type, a size is not positive, `n_embd` is not a multiple of `n_head`, a
            dropout is outside [0, 1), or `layer_norm_eps` is not positive and finite.
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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            self._require(name, int, "a whole number")
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            self._require(name, (int, float), "a number")
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("qkv_bias", "tied_head"):
            self._require(name, bool, "true or false")
        self._require("layer_norm_eps", (int, float), "a number")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"model.layer_norm_eps={self.layer_norm_eps} must be positive and finite")
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}")

    def _require(self, name: str, kinds: type | tuple[type, ...], what: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"model.{name}={reprlib.repr(value)} must be {what}")


class KVCache:
    """Keys and values of the positions seen so far, allocated once.

    `keys[layer]` and `values[layer]` are (B, H, capacity, D); the first `length` positions are filled.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        # Zeros: a kernel may read beyond the last position that it was given, and nan times zero is nan.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, H, T, D) keys and values; return all of them, (B, H, S, D)."""
        end = self.length + key.size(2)
        assert end <= self.capacity, f"cache of {self.capacity} positions asked to hold {end}"
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop every row of the batch that is not in `rows`, (new B,) int64."""
        self.keys = [self._kept(key, rows) for key in self.keys]
        self.values = [self._kept(value, rows) for value in self.values]

    def _kept(self, old: Tensor, rows: Tensor) -> Tensor:
        new = old.new_zeros((len(rows), *old.shape[1:]))
        new[:, :, : self.length] = old[rows, :, : self.length]  # what lies behind is zero in both
        return new


class Packing(NamedTuple):
    """Sequences laid end to end in one row of N tokens, without padding between them.

    Linear layers and norms see the N tokens; attention puts every sequence into a row of its own, S rows of T places.
    So no sequence sees another one, the result is that of padded rows, and no mask is needed. What sequences have in
    common at their beginning can stand among the N tokens once, and in several rows.
    """

    rows: Tensor
    """(S, T) int64: which of the N tokens stands at each place of each sequence. Behind its end: any token."""
    places: Tensor
    """(N,) int64: at which of the S x T places, row by row, each token's result is read."""
    positions: Tensor
    """(N,) int64: the position of each token in its sequence, from 0."""
    wanted: Tensor
    """(M,) int64: the tokens whose hidden states are wanted; of the last block only they are computed."""


class _SpreadRows(torch.autograd.Function):
    """index_select of rows, whose gradient is summed in float32 where a row is taken more than once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        summed = torch.zeros(ctx.n_rows, gradient.size(1), dtype=dtype, device=gradient.device)
        return summed.index_add_(0, index, gradient.to(dtype)).to(gradient.dtype), None


class CausalSelfAttention(nn.Module):
    """Multi-head attention with one fused projection for query, key and value."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.attention_dropout
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        at: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or (B, 1, C) for the one position `at` (B,) of each row, with its own mask.

        `attention_mask`: bool, broadcast to (B, H, T, S), True = may attend; None = causal.
        """
        query, key, value = self._heads(x, packing)
        dtype = query.dtype
        if at is not None:
            assert attention_mask is not None, "what a single position may see does not follow from its place"
            query = query[torch.arange(len(at), device=at.device), :, at].unsqueeze(2)  # (B, H, 1, D)
        if cache is not None:
            key, value = cache.append(layer, key, value)
            query = query.to(key.dtype)  # a cache may be kept in a wider type than the weights
        # A single new position may see everything before it: no mask. Several new positions behind a filled cache
        # need an explicit one, because SDPA's is_causal aligns the triangle to the top left corner.
        is_causal = attention_mask is None and query.size(2) > 1
        dropout = self.dropout if self.training else 0.0
        by_hand = is_faster_by_hand(query)
        if is_causal and (by_hand or key.size(2) > query.size(2)):
            attention_mask, is_causal = causal_mask(query.size(2), key.size(2), x.device), False
        if by_hand:
            mixed, _ = attend(query, key, value, attention_mask, dropout)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal)
        return self._merge(mixed.to(dtype), packing)

    def explicit(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same attention written out, for teaching and plots; it ignores attention dropout.

        Returns:
            the output (B, T, C) and the attention weights (B, H, T, T), rows summing to 1.
        """
        mask = causal_mask(x.size(1), x.size(1), x.device) if attention_mask is None else attention_mask
        mixed, weights = attend(*self._heads(x), mask)
        return self._merge(mixed), weights

    def _heads(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x)
        if packing is not None:
            spread: Tensor = _SpreadRows.apply(qkv[0], packing.rows.flatten())
            qkv = spread.unflatten(0, packing.rows.shape)  # (1, N, 3C) -> (S, T, 3C)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        return query, key, value

    def _merge(self, mixed: Tensor, packing: Packing | None = None) -> Tensor:
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        if packing is not None:
            mixed = mixed.flatten(0, 1).index_select(0, packing.places).unsqueeze(0)  # (1, N, C)
        return self.residual_dropout(self.out_proj(mixed))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v, written out.

    Args:
        query: (B, H, T, D); key, value: (B, H, S, D).
        mask: bool, broadcast to (B, H, T, S), True = may attend; None = everything.

    Returns:
        (B, H, T, D) and the attention weights (B, H, T, S) before dropout.
    """
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)  # (B, H, T, S)
    if mask is not None:
        # Added rather than filled in: one small tensor for all heads, and nothing kept for the backward pass.
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout) @ value if dropout else weights @ value, weights


def is_faster_by_hand(query: Tensor) -> bool:
    """Whether `attend` beats SDPA: with bf16 on a CPU it takes half of the time at T=256 and a quarter at T=128.

    Beyond 512 positions the gain is small, and the weights that are kept for the backward pass grow with T squared.
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and 1 < query.size(2) <= 512


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 was trained with the tanh form; the exact GELU moves its logits by about 1e-2.
        return self.residual_dropout(self.down_proj(F.gelu(self.up_proj(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.attn = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        at: Tensor | None = None,
        packing: Packing | None = None,
        is_last: bool = False,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or with `at` (B,) the one wanted position of each row, (B, 1, C), for a quarter of
        the work: only its keys and values are computed for all positions.

        With `is_last`, of packed sequences only the wanted tokens are returned, (1, M, C).
        """
        if is_last and packing is not None:
            packing = packing._replace(places=packing.places[packing.wanted])
        mixed = self.attn(self.attn_norm(x), attention_mask, cache, layer, at, packing)
        if is_last and packing is not None:
            x = x.index_select(1, packing.wanted)
        if at is not None:
            x = x[torch.arange(len(at), device=at.device), at].unsqueeze(1)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


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
        self.position_embedding = nn.Embedding(config.context_length, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.token_embedding.weight
        if init == "gpt2":
            self._init_gpt2()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for `input_ids` (B, T); the other arguments as in `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, positions, attention_mask, cache))

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """The trunk: final-norm output for every position.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) or (T,) int64; default: 0..T-1, or what follows the cache.
            attention_mask: bool, broadcast to (B, H, T, S), True = may attend; default: causal. With right padding
                the causal mask is enough: no real position sees a pad.
            cache: keys and values of earlier positions; extended in place.
            packing: `input_ids` (1, N) are several sequences end to end; brings the positions along.

        Returns:
            (B, T, C); with `packing` (1, M, C), of the wanted tokens.

        Raises:
            ValueError: if the sequence does not fit into `context_length`.
        """
        if packing is not None:
            positions = packing.positions
        x = self.embed(input_ids, positions, start=0 if cache is None else cache.length)
        x = self.run_blocks(x, attention_mask, cache, packing=packing)
        if cache is not None:
            cache.length += input_ids.size(1)
        return self.final_norm(x)

    def embed(self, input_ids: Tensor, positions: Tensor | None = None, start: int = 0) -> Tensor:
        """Token plus position embedding (B, T, C); the default positions are `start`..`start` + T - 1.

        Raises:
            ValueError: if the sequence does not fit into `context_length`.
        """
        end = start + input_ids.size(1)
        if positions is None:
            if end > self.config.context_length:
                raise ValueError(
                    f"sequence of {end} tokens exceeds context_length={self.config.context_length}; "
                    "shorten it or use a model with a longer context"
                )
            positions = torch.arange(start, end, device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        # A frozen embedding may be kept in a narrower type than what is trained; the residual stream is not.
        return self.embedding_dropout(x.to(self.final_norm.weight.dtype))

    def run_blocks(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        start: int = 0,
        stop: int | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Blocks `start`..`stop` - 1 (default: all) in turn: (B, T, C) -> (B, T, C)."""
        layers = range(start, self.config.n_layer if stop is None else stop)
        for layer in layers:
            block = self.blocks[layer]
            packed: dict[str, Any] = {"packing": packing, "is_last": layer == self.config.n_layer - 1}
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, attention_mask, use_reentrant=False, **packed)
            else:
                x = block(x, attention_mask, cache, layer, **packed)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., C) -> (..., V)."""
        return self.lm_head(hidden)

    def head_weight(self) -> Tensor:
        """(V, C) what `logits` multiplies by, an adapter on the head included."""
        adapted = getattr(self.lm_head, "effective_weight", None)
        return self.lm_head.weight if adapted is None else adapted()

    @torch.no_grad()
    def attention_weights(self, input_ids: Tensor) -> list[Tensor]:
        """Attention weights (B, H, T, T) of every layer, by the explicit path. Be in eval mode."""
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        maps = []
        for block in self.blocks:
            maps.append(block.attn.explicit(block.attn_norm(x))[1])  # type: ignore[operator, union-attr]
            x = block(x)
        return maps

    def num_parameters(self) -> int:
        """Parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward FLOPs per token: 6 N + 12 L C T (PaLM, appendix B), N without position embeddings."""
        config = self.config
        matrices = self.num_parameters() - self.position_embedding.weight.numel()
        if not config.tied_head:  # an untied input embedding is a lookup, not a product
            matrices -= self.token_embedding.weight.numel()
        return 6 * matrices + 12 * config.n_layer * config.n_embd * sequence_length

    def _init_gpt2(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)  # GPT-2 paper, section 2.3
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)


def causal_mask(new: int, total: int, device: torch.device | str) -> Tensor:
    """Bool (new, total): the last `new` of `total` positions, each sees itself and what stands before it."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
