"""Losses: pure functions of tensors. Labels arrive already shifted (see `data/batches.py`); none is shifted here.

Tensor letters: B batch, T time, C width, V vocabulary, N positions that have a target, M labels (a position that
predicts two different tokens counts twice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm_lightning.nearest import did_you_mean

IGNORE_INDEX = -100
"""The label of a position that has no target: prompt, padding, or beyond the end of the data."""

CHUNK_POSITIONS = 1024
"""Positions whose logits exist at once: 100 MB in bfloat16 with GPT-2's vocabulary, however large the batch."""

HEAD_BLOCK = 16384
"""Rows of the head whose gradient is computed at once: a CPU then takes a sixth less time than for all together."""


def causal_lm_loss(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over all targets, in nats.

    The head runs only on positions that have a target, `CHUNK_POSITIONS` at a time, and its gradient is taken in the
    forward pass while the logits are at hand: neither logits nor probabilities are kept or computed twice.

    Args:
        hidden: (B, T, C) trunk output.
        head_weight: (V, C).
        labels: (B, T) int64, shifted, IGNORE_INDEX where there is no target.

    Returns:
        (), float32 (float64 for float64 input); divide by the number of targets for the mean.
    """
    keep = labels != IGNORE_INDEX
    loss: Tensor = _HeadLoss.apply(hidden[keep], head_weight, labels[keep])
    return loss


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats: of the aggregated loss, never a mean of exps."""
    return math.exp(min(mean_loss, 700))  # beyond, a float overflows


def weights_of_classes(setting: Sequence[float] | str | None, counts: Sequence[int]) -> Tensor | None:
    """(K,) weights of the classes in a cross-entropy.

    Args:
        setting: one positive number per class; `balanced`: total / (K x count); None: no weights.
        counts: training samples of each class.

    Raises:
        ValueError: for anything else.
    """
    if setting is None:
        return None
    if setting == "balanced":
        return torch.tensor([sum(counts) / (len(counts) * count) for count in counts])
    weights = [setting] if isinstance(setting, (int, float, str)) else list(setting)
    numbers = [one for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(numbers) != len(counts) or len(weights) != len(counts) or not min(numbers) > 0:
        raise ValueError(
            f"task.class_weights={setting} must be balanced or {len(counts)} positive numbers, one for each class"
        )
    return torch.tensor([float(weight) for weight in numbers])


class _HeadLoss(torch.autograd.Function):
    """The head and its cross-entropy as one differentiable function: (N, C), (V, C), (N,) -> ()."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        matrix = _aligned(weight, dtype)
        loss = torch.zeros((), dtype=_exact(hidden.dtype), device=hidden.device)
        for start in range(0, max(1, len(labels)), CHUNK_POSITIONS):  # no target at all: one empty chunk, zeros
            chunk = slice(start, start + CHUNK_POSITIONS)
            inputs = hidden[chunk].to(dtype)
            logits = inputs @ matrix.T
            loss += _loss_to_gradient(logits[:, : len(weight)], labels[chunk])  # columns beyond it stay zero
            if hidden_grad is not None:
                hidden_grad[chunk] = logits @ matrix
            if weight_grad is not None:
                for block, columns in zip(weight_grad.split(HEAD_BLOCK), logits.split(HEAD_BLOCK, 1), strict=True):
                    part = (columns.T @ inputs)[: len(block)]
                    block.copy_(part) if start == 0 else block.add_(part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if scale.device.type == "cpu" and scale == 1:  # as in training; asking a GPU would make the CPU wait for it
            return hidden_grad, weight_grad, None
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * scale.to(weight_grad.dtype),
            None,
        )


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, C) -> (V rounded up to 64, C) in `dtype`, with rows of zeros behind the vocabulary.

    Every product with the logits then has sizes that suit the kernels of CPUs and GPUs: GPT-2's 50,257 columns are
    odd. A view of aligned rows is not enough: a kernel may read a row to a multiple of its tile and multiply the
    surplus by zero (oneDNN's for AMX does), which gives nan where the memory was never written.
    """
    surplus = -len(weight) % 64
    if not surplus:
        return weight.to(dtype)
    padded = weight.new_zeros((len(weight) + surplus, weight.size(1)), dtype=dtype)
    padded[: len(weight)] = weight
    return padded


def _loss_to_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Overwrite `logits` (N, V) with the gradient of their summed cross-entropy, softmax - one-hot; return the sum.

    A CPU takes 32 rows at a time, so that the float32 copy fits into its cache.
    """
    rows = 32 if logits.device.type == "cpu" else len(labels)
    loss = torch.zeros((), dtype=_exact(logits.dtype), device=logits.device)
    for block, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
        exact = block.to(loss.dtype)
        probabilities = exact.softmax(dim=-1)
        # log(sum(exp(x))) = max(x) - log(max(softmax(x))): no second exponential, and nothing that can underflow.
        log_normalizer = exact.amax(dim=-1) - probabilities.amax(dim=-1).log()
        loss += (log_normalizer - exact.gather(1, targets)[:, 0]).sum()
        block.copy_(probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0)))
    return loss


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type of probabilities: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def token_log_probs(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, in nats, with gradients for each of them.

    At most `CHUNK_POSITIONS` positions have logits at once; where there are more, they are computed again in the
    backward pass instead of being kept.

    Args:
        hidden: (M, C) trunk output where a label is predicted; a position with two labels is in it twice.
        head_weight: (V, C).
        labels: (M,) int64.

    Returns:
        (M,), float32 (float64 for float64 input).
    """
    if len(labels) <= CHUNK_POSITIONS:
        return _label_log_probs(hidden, head_weight, labels)
    chunks = zip(hidden.split(CHUNK_POSITIONS), labels.split(CHUNK_POSITIONS), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_label_log_probs, part, head_weight, targets, **options) for part, targets in chunks])


def _label_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _log_probs(hidden, weight).gather(1, labels[:, None])[:, 0]


def _log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    """(M, C), (V, C) -> (M, V)"""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Cast here, so that the gradients of several chunks are summed in the type of the weight.
    logits = F.linear(hidden.to(dtype), weight.to(dtype))
    return logits.to(_exact(dtype)).log_softmax(dim=-1)


@torch.no_grad()
def token_kl(hidden: Tensor, head_weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor) -> Tensor:
    """KL(policy || reference) of the next token in nats: exact, over the whole vocabulary.

    Args:
        hidden, reference_hidden: (M, C) trunk outputs of both models at the same positions.
        head_weight, reference_weight: (V, C).

    Returns:
        (M,), float32 (float64 for float64 input), without gradient.
    """
    parts = []
    for chunk, reference_chunk in zip(
        hidden.split(CHUNK_POSITIONS), reference_hidden.split(CHUNK_POSITIONS), strict=True
    ):
        ours, theirs = _log_probs(chunk, head_weight), _log_probs(reference_chunk, reference_weight)
        parts.append(F.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts)


def sequence_log_probs(log_probs: Tensor, branch: Tensor, n_sequences: int) -> Tensor:
    """Sum the (M,) log-probabilities of tokens; token m belongs to sequence `branch[m]`: (n_sequences,)."""
    return log_probs.new_zeros(n_sequences).index_add(0, branch, log_probs)


PREFERENCE_LOSSES = ("sigmoid", "average", "ipo", "simpo")
PER_TOKEN = ("average", "ipo", "simpo")
"""Losses of the mean over the tokens of an answer; `sigmoid` takes the sum."""


class PreferenceResult(NamedTuple):
    """Loss and rewards of each pair."""

    loss: Tensor
    """(B,)"""
    chosen_reward: Tensor
    """(B,) beta x (policy - reference), of the quantity that the loss uses (`simpo`: beta x policy). No gradient."""
    rejected_reward: Tensor
    """(B,) the same for the rejected answer."""


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    n_chosen: Tensor,
    n_rejected: Tensor,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
) -> PreferenceResult:
    """Make the chosen answers likelier than the rejected ones, relative to the reference.

    With s(y) = log policy(y) - log reference(y), summed over the tokens of answer y, of which there are |y|:

    - `sigmoid`: -log sigmoid(beta (s(chosen) - s(rejected))). DPO, Rafailov et al. 2023, eq. 7.
    - `average`: the same with s(y) / |y|, the mean per token, as in the book's chapter 7, whose printed rewards lack
      the factor beta. TRL calls it `sigmoid_norm`. The paper derives the sum: see
      eric-mitchell/direct-preference-optimization#40.
    - `ipo`: (s(chosen) / |chosen| - s(rejected) / |rejected| - 1 / (2 beta))^2. Azar et al. 2023, eq. 17 with tau =
      beta, and the means per token that TRL takes, on its authors' word; the paper writes sums.
    - `simpo`: -log sigmoid(beta (log policy(chosen) / |chosen| - log policy(rejected) / |rejected|) - gamma), without
      a reference. Meng et al. 2024, eq. 6.

    `label_smoothing` e is the assumed share of wrong labels: (1 - e) x the loss + e x the loss of the swapped pair
    (conservative DPO, Mitchell 2023, eq. 3). In TRL 1.16 only its CPO trainer has it; `robust` is another loss.

    Args:
        policy_chosen, policy_rejected: (B,) summed log-probabilities.
        reference_chosen, reference_rejected: (B,) the same for the reference; `simpo` ignores them.
        n_chosen, n_rejected: (B,) tokens in each sum.
        kind: one of `PREFERENCE_LOSSES`.
        beta: KL strength, more than 0: a higher one keeps the policy closer to the reference.
        label_smoothing: at least 0, less than 0.5. `ipo` has none.
        gamma: target margin of `simpo`, at least 0; the others have none.

    Raises:
        ValueError: for an unknown kind or a number out of range.
    """
    check_preference_loss(kind, beta, label_smoothing, gamma)
    chosen, rejected = policy_chosen, policy_rejected
    if kind != "simpo":
        assert reference_chosen is not None, f"{kind} needs the reference"
        assert reference_rejected is not None, f"{kind} needs the reference"
        chosen, rejected = chosen - reference_chosen, rejected - reference_rejected
    if kind in PER_TOKEN:
        chosen, rejected = chosen / n_chosen, rejected / n_rejected
    difference = chosen - rejected
    if kind == "ipo":
        loss = (difference - 1 / (2 * beta)) ** 2
    else:
        logits = beta * difference - (gamma if kind == "simpo" else 0.0)
        loss = -(1 - label_smoothing) * F.logsigmoid(logits)
        if label_smoothing:
            loss = loss - label_smoothing * F.logsigmoid(-logits)
    return PreferenceResult(loss, beta * chosen.detach(), beta * rejected.detach())


def check_preference_loss(kind: str, beta: float, label_smoothing: float = 0.0, gamma: float = 0.5) -> None:
    """Raise ValueError where `preference_loss` would, without tensors: before any data is read."""
    if kind not in PREFERENCE_LOSSES:
        hint = did_you_mean(kind, PREFERENCE_LOSSES)
        raise ValueError(f"preference loss {kind!r} is unknown: {hint}use {', '.join(PREFERENCE_LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be more than 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and less than 0.5")
    if kind == "ipo" and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} has no meaning for ipo; set it to 0")
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma} must be at least 0")
