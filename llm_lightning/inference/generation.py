"""Text continuation with a KV cache: several prompts in one batch, greedy or sampled. Knows no tokenizer.

Prompts of different lengths are padded on the left, so that the next position of every row is the same slot of the
cache; a mask hides the padding and each row counts its own positions. A row gives what its prompt gives alone.

Tensor letters: B batch (rows still running), T prompt length, S slots in use, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm_lightning.models.attention import Context, causal_mask
from llm_lightning.models.gpt import GPT

PACKING_PAYS_FROM = 32
"""Steps from which `packed_linears` is worth its preparation."""

COMPACT_AT = 0.75
"""Share of running rows at which the others leave the batch: they cost little beside the copy of the cache."""

SHORTLIST = 1024
"""Tokens that `top_p` looks at first: sorting all 50,257 takes a fifth of the time of a step."""

log = logging.getLogger(__name__)

OnToken = Callable[[int, int], None]
"""Called with (row, id) as each new token is known; a stop id is not reported."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature=0` is greedy: always the likeliest token.

    `top_k` keeps the k likeliest tokens; `top_p` then keeps the fewest of them whose probabilities sum to at
    least top_p (nucleus sampling, Holtzman et al. 2020). With a `seed`, row i of a batch always draws the same
    numbers, whatever else is in the batch.

    Raises:
        ValueError: if a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; leave it out to keep every token")


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    never: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue every prompt, all in one batch.

    A row ends after `max_new_tokens`, before a stop id, or at the model's context limit (which is logged). The
    last token may stand one past the context: it is never fed back. No global random state is touched, and the
    model is left in the mode it was in.

    Args:
        prompts: token ids, one sequence per row, at least one id each.
        temperature, top_k, top_p, seed: see `Sampling`.
        stop_ids: ids that end a row, such as the end of text.
        never: ids that are never drawn, however likely: rows of the head that stand for no token (see
            `Tokenizer.ids_without_token`).
        on_token: see `OnToken`.

    Returns:
        the new ids of each row, without the stop id.

    Raises:
        ValueError: if a prompt is empty, longer than the context or holds an unknown id, or a setting is out of
            its range.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for row, prompt in enumerate(prompts):
        _check_prompt(model, row, prompt)
    if not prompts:
        return []
    room = [model.config.context_length + 1 - len(prompt) for prompt in prompts]
    limits = [min(max_new_tokens, most) for most in room]
    with evaluating(model), packed_linears(model, max(limits)):
        new_ids = _decode(model, prompts, limits, sampling, frozenset(stop_ids), _mask(model, never), on_token)
    if any(len(ids) == most < max_new_tokens for ids, most in zip(new_ids, room, strict=True)):
        log.warning(
            "generation stopped at context_length=%d before max_new_tokens=%d",
            model.config.context_length,
            max_new_tokens,
        )
    return new_ids


def next_ids(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw one id per row: the token at which the cumulative probability passes `uniform`.

    Args:
        logits: (B, V).
        uniform: (B, 1) float32 in [0, 1); not read when greedy.

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Largest score 0: however small the temperature, the division cannot overflow to +inf.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    probabilities = scores.softmax(dim=-1)
    if sampling.top_k is None and sampling.top_p is None:
        return _invert(probabilities, uniform).squeeze(-1)
    probabilities, ids = _likeliest(probabilities, sampling)
    return ids.gather(-1, _invert(probabilities, uniform)).squeeze(-1)


def _likeliest(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The probabilities that top_k and top_p leave over, in falling order, (B, K), and their ids."""
    vocab_size = probabilities.size(-1)
    kept, ids = probabilities.topk(min(sampling.top_k or SHORTLIST, vocab_size))
    if sampling.top_p is None:
        return kept, ids
    held = kept.sum(dim=-1, keepdim=True)
    if sampling.top_k is None:
        if (held < sampling.top_p).any():  # too flat for a short list
            kept, ids = probabilities.sort(dim=-1, descending=True)
        held = torch.ones_like(held)
    before = kept.cumsum(dim=-1) - kept  # what the likelier tokens hold together
    return kept.masked_fill(before >= sampling.top_p * held, 0.0), ids


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B, K) weights, not necessarily summing to 1, and (B, 1) uniform numbers -> (B, 1) indices into K."""
    cumulative = probabilities.cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def _decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    limits: list[int],
    sampling: Sampling,
    stop_ids: frozenset[int],
    never: Tensor | None,
    on_token: OnToken | None,
) -> list[list[int]]:
    """Feed the prompts, then one token per row and step; rows that have ended leave the batch in groups."""
    device = model.device
    new_ids: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    numbers = [random.Random(None if sampling.seed is None else f"{sampling.seed} {row}") for row in rows]
    batch = _Batch(model, prompts, max(limits))
    logits = batch.prefill(prompts)
    ended: set[int] = set()
    while True:
        # 24 random bits are exact in float32 and below 1 after any rounding.
        uniform = torch.tensor([[numbers[row].getrandbits(24) / 2**24] for row in rows], device=device)
        if never is not None:
            logits = logits.masked_fill(never, -math.inf)
        chosen = next_ids(logits, uniform, sampling).tolist()
        running = []
        for index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if row in ended:
                continue
            if token in stop_ids:
                ended.add(row)
                continue
            new_ids[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if len(new_ids[row]) < limits[row]:
                running.append(index)
            else:
                ended.add(row)
        if not running:
            return new_ids
        if len(running) <= COMPACT_AT * len(rows):
            rows, chosen = [rows[index] for index in running], [chosen[index] for index in running]
            batch.keep(running)
        logits = batch.step(chosen)


def _mask(model: GPT, never: Collection[int]) -> Tensor | None:
    """(V,) bool: True for the ids in `never`; None where there are none."""
    if not never:
        return None
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    mask[torch.tensor(sorted(never))] = True
    return mask.to(model.device)


class _Batch:
    """The running rows: their cache, and how many slots of padding stand before each."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, device = model, model.device
        self.longest = max(len(prompt) for prompt in prompts)
        capacity = self.longest + max_new_tokens - 1  # the last new token is not fed
        # On a CPU, attention of one position over bf16 keys takes up to five times as long as over fp32 keys.
        dtype = torch.promote_types(model.dtype, torch.float32) if device.type == "cpu" else model.dtype
        self.cache = model.new_cache(len(prompts), capacity, dtype)
        self.padding = torch.tensor([self.longest - len(prompt) for prompt in prompts], device=device)
        self.slots = torch.arange(capacity, device=device)
        self.is_padded = bool(self.padding.any())

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Feed whole prompts; return the logits (B, V) after each prompt's last token."""
        rows = [[0] * (self.longest - len(prompt)) + list(prompt) for prompt in prompts]
        input_ids = torch.tensor(rows, device=self.slots.device)
        if not self.is_padded:
            return self._last_logits(input_ids, None, None)
        slots = self.slots[: self.longest]
        visible = (slots >= self.padding[:, None])[:, None, None]  # (B, 1, 1, T): not padding
        # Padding sees itself: a row of the softmax with nothing to see would be NaN.
        itself = torch.eye(self.longest, dtype=torch.bool, device=slots.device)
        mask = causal_mask(self.longest, self.longest, slots.device) & visible | itself
        return self._last_logits(input_ids, (slots - self.padding[:, None]).clamp(min=0), mask)

    def step(self, tokens: list[int]) -> Tensor:
        """Feed one token per row; return the next logits (B, V)."""
        input_ids = torch.tensor(tokens, device=self.slots.device)[:, None]
        slot = self.cache.length
        if not self.is_padded and slot < self.model.config.context_length:
            return self._last_logits(input_ids, None, None)
        visible = (self.slots[: slot + 1] >= self.padding[:, None])[:, None, None]  # (B, 1, 1, S)
        # A row that has ended may run beyond the positions there are; what it gives is not read.
        positions = (slot - self.padding[:, None]).clamp(max=self.model.config.context_length - 1)
        return self._last_logits(input_ids, positions, visible)

    def keep(self, rows: list[int]) -> None:
        """Drop every other row."""
        index = torch.tensor(rows, device=self.slots.device)
        self.cache.keep(index)
        self.padding = self.padding[index]
        self.is_padded = bool(self.padding.any())

    def _last_logits(self, input_ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        context = Context(mask, positions, self.cache)
        return self.model.logits(self.model.hidden_states(input_ids, context)[:, -1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; on leaving, give every submodule back the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def packed_linears(model: nn.Module, steps: int) -> Iterator[None]:
    """On a CPU, run the linear layers from copies of their weights in the blocked layout of its matrix kernels.

    Generation is bound by reading the weights, and the kernels read this layout at up to twice the speed. It costs a
    second copy of the weights and about the time of 20 steps, so fewer than `PACKING_PAYS_FROM` steps leave it out.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]  # not LoRA's or any other kind
    packed = [linear for linear in linears if _can_pack(linear.weight)] if steps >= PACKING_PAYS_FROM else []
    for linear in packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        linear.forward = partial(_packed_forward, weight, linear.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in packed:
            del linear.forward  # the class's own is behind it


def _can_pack(weight: Tensor) -> bool:
    """Whether this CPU has kernels for a plain (not sharded) weight of this type; autocast does not know them."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (
        weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed_forward(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _check_prompt(model: GPT, row: int, prompt: Sequence[int]) -> None:
    if not prompt:
        raise ValueError(f"prompt {row + 1} is empty; give at least one token")
    if len(prompt) > model.config.context_length:
        raise ValueError(
            f"prompt {row + 1} of {len(prompt)} tokens exceeds context_length={model.config.context_length}; "
            "shorten it or use a model with a longer context"
        )
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise ValueError(
            f"prompt {row + 1} holds token id {wrong}, but vocab_size={model.config.vocab_size}; "
            "encode it with the tokenizer that the model was trained with"
        )
