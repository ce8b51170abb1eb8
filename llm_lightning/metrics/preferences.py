"""Metrics of preference tuning: rewards, their margin, and how far the policy has moved from its reference.

Tensor letters: B pairs, M answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_lightning.losses import PreferenceResult
from llm_lightning.metrics.intervals import wilson_interval

PREFERENCE_METRICS = (
    "reward_accuracy", "reward_margin", "reward_accuracy_low", "reward_accuracy_high", "chosen_reward",
    "rejected_reward", "chosen_log_prob", "rejected_log_prob", "chosen_log_ratio", "log_ratio_per_token",
)  # fmt: skip


def preference_sums(
    result: PreferenceResult, policy: Tensor, reference: Tensor, lengths: Tensor, kl: Tensor | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Metrics of one batch as name -> (sum, count), over its pairs or over the tokens of its answers; and rows.

    Args:
        result: of the batch's loss.
        policy, reference: (2B,) summed log-probabilities, all chosen answers, then all rejected ones.
        lengths: (2B,) tokens of each answer.
        kl: (M,) divergence of each token, if known.

    Returns:
        the sums, and for `preference_metrics` the (B,) `margin` and `longer_by`.
    """
    n = len(lengths) // 2
    policy = policy.detach()
    margin = (result.chosen_reward - result.rejected_reward).detach()
    of_pairs = {
        "reward_accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),  # at the start, all are ties
        "reward_margin": margin,
        "chosen_reward": result.chosen_reward.detach(),
        "rejected_reward": result.rejected_reward.detach(),
        "chosen_log_prob": policy[:n],
        "rejected_log_prob": policy[n:],
        "chosen_log_ratio": (policy - reference)[:n],
    }
    # The tokens are the data's, not samples of the policy: the log-ratio is an estimate, and all that training logs.
    of_tokens = {"log_ratio_per_token": (policy - reference).sum()}
    if kl is not None:
        of_tokens["kl_per_token"] = kl.sum()
    pairs, tokens = torch.tensor(float(n), device=margin.device), lengths.float()
    sums = {name: (values.sum(), pairs) for name, values in of_pairs.items()}
    sums |= {name: (total, tokens.sum()) for name, total in of_tokens.items()}
    return sums, {"margin": margin, "longer_by": tokens[:n] - tokens[n:]}


def preference_metrics(means: Mapping[str, float], margin: Tensor, longer_by: Tensor) -> dict[str, float]:
    """The 95% interval of the reward accuracy, and the correlation of margins with lengths.

    Args:
        margin: (N,) reward margin of each pair of an evaluation.
        longer_by: (N,) tokens by which the chosen answer is longer.
    """
    margin, longer_by = margin.double(), longer_by.double()
    low, high = wilson_interval(round(means["reward_accuracy"] * len(margin)), len(margin))
    spread = margin.std(unbiased=False) * longer_by.std(unbiased=False)
    covariance = ((margin - margin.mean()) * (longer_by - longer_by.mean())).mean()
    return {
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        # Near 0: the policy does not simply prefer the longer answer.
        "margin_length_correlation": float(covariance / spread) if spread > 0 else 0.0,
    }
