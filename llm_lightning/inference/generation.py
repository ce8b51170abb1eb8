"""Text continuation with a KV cache: several prompts in one batch, greedy or sampled. Works on token ids only.

Prompts of different lengths are padded on the left, so that all rows write to the same cache slot in each step; a mask
hides the padding, and each row counts its own positions. A row's result does not depend on the rest of the batch.

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

from llm_lightning import progress
from llm_lightning.models.attention import Context, causal_mask
from llm_lightning.models.gpt import GPT
from llm_lightning.models.sharding import without_gradients

PACKING_PAYS_FROM = 32
"""From this many steps on, `packed_linears` saves more time than it costs."""

COMPACT_AT = 0.75
"""Share of running rows at which finished rows leave the batch; earlier, copying the cache costs more."""

SHORTLIST = 1024
"""The likeliest tokens, which `top_p` tries first: sorting all 50,257 takes a fifth of a step's time."""

log = logging.getLogger(__name__)

OnToken = Callable[[int, int], None]
"""Called with (row, id) for each new token, but not for a stop id."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature=0` is greedy: always the likeliest token.

    `top_k` keeps the k likeliest tokens; `top_p` then keeps the fewest of them whose probabilities sum to at
    least top_p (nucleus sampling, Holtzman et al. 2020). With a `seed`, row i of a batch draws the same random
    numbers in any batch.

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

    A row ends after `max_new_tokens`, before a stop id, or at the model's context limit (logged as a warning). The
    last token may be one past the context, because it is never fed back. Global random state and the model's mode
    are left unchanged.

    Args:
        prompts: token ids, one sequence per row, at least one id each.
        temperature, top_k, top_p, seed: see `Sampling`.
        stop_ids: ids that end a row, such as the end of text.
        never: ids that are never drawn, such as rows of the head without a token (see
            `Tokenizer.ids_without_token`).
        on_token: see `OnToken`.

    Returns:
        the new ids of each row, without the stop id.

    Raises:
        ValueError: if a prompt is empty, longer than the context or holds an unknown id, or a setting is out of
            range.
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
    with without_gradients(model), evaluating(model), packed_linears(model, max(limits)):
        new_ids = _decode(model, prompts, limits, sampling, frozenset(stop_ids), _mask(model, never), on_token)
    if any(len(ids) == most < max_new_tokens for ids, most in zip(new_ids, room, strict=True)):
        log.warning(
            "generation stopped at context_length=%d before max_new_tokens=%d",
            model.config.context_length,
            max_new_tokens,
        )
    return new_ids


def next_ids(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw one id per row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: (B, V).
        uniform: (B, 1) float32 in [0, 1); unused if greedy.

    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # The largest score is 0, so the division cannot overflow to +inf at any temperature.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    probabilities = scores.softmax(dim=-1)
    if sampling.top_k is None and sampling.top_p is None:
        return _invert(probabilities, uniform).squeeze(-1)
    probabilities, ids = _likeliest(probabilities, sampling)
    return ids.gather(-1, _invert(probabilities, uniform)).squeeze(-1)


def _likeliest(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The probabilities left by top_k and top_p, descending (B, K), and their ids."""
    vocab_size = probabilities.size(-1)
    kept, ids = probabilities.topk(min(sampling.top_k or SHORTLIST, vocab_size))
    if sampling.top_p is None:
        return kept, ids
    held = kept.sum(dim=-1, keepdim=True)
    if sampling.top_k is None:
        if (held < sampling.top_p).any():  # the distribution is too flat for the short list
            kept, ids = probabilities.sort(dim=-1, descending=True)
        held = torch.ones_like(held)
    before = kept.cumsum(dim=-1) - kept  # total probability of the likelier tokens
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
    """Feed the prompts, then one token per row and step; finished rows leave the batch in groups."""
    device = model.device
    new_ids: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    generators = [random.Random(None if sampling.seed is None else f"{sampling.seed} {row}") for row in rows]
    batch = _Batch(model, prompts, max(limits))
    logits = batch.prefill(prompts)
    ended: set[int] = set()
    while True:
        # 24 random bits are exact in float32, so the number stays below 1.
        uniform = torch.tensor([[generators[row].getrandbits(24) / 2**24] for row in rows], device=device)
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
        progress.mark()


def _mask(model: GPT, never: Collection[int]) -> Tensor | None:
    """(V,) bool: True for the ids in `never`; None if there are none."""
    if not never:
        return None
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    mask[torch.tensor(sorted(never))] = True
    return mask.to(model.device)


class _Batch:
    """The running rows: their cache, and the padding before each row in slots."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, device = model, model.device
        self.longest = max(len(prompt) for prompt in prompts)
        capacity = self.longest + max_new_tokens - 1  # the last new token is not fed back
        # On a CPU, attention of one position is up to five times slower over bf16 keys than over fp32 keys.
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
        # Padding attends to itself: a softmax over nothing would be NaN.
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
        # A finished row may run past the last position; its logits are not used.
        positions = (slot - self.padding[:, None]).clamp(max=self.model.config.context_length - 1)
        return self._last_logits(input_ids, positions, visible)

    def keep(self, rows: list[int]) -> None:
        """Keep only `rows` of the batch."""
        index = torch.tensor(rows, device=self.slots.device)
        self.cache.keep(index)
        self.padding = self.padding[index]
        self.is_padded = bool(self.padding.any())

    def _last_logits(self, input_ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        context = Context(mask, positions, self.cache)
        return self.model.logits(self.model.hidden_states(input_ids, context)[:, -1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; on exit, restore the mode of every submodule."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def packed_linears(model: nn.Module, steps: int) -> Iterator[None]:
    """On a CPU, run the linear layers with copies of their weights in the blocked layout of its matrix kernels.

    Reading the weights limits the speed of generation, and the kernels read this layout up to twice as fast. It costs
    a second copy of the weights and the time of about 20 steps, so it is skipped below `PACKING_PAYS_FROM` steps.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]  # no subclass, such as LoRA's
    packed = [linear for linear in linears if _can_pack(linear.weight)] if steps >= PACKING_PAYS_FROM else []
    for linear in packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        linear.forward = partial(_packed_forward, weight, linear.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in packed:
            del linear.forward  # uncovers the method of the class


def _can_pack(weight: Tensor) -> bool:
    """Whether this CPU has kernels for a plain (not sharded) weight of this dtype; autocast does not cover them."""
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
