"""Whether a metric is better when small or large; picks the best checkpoint and stops runs early."""

from __future__ import annotations

BETTER = {
    "loss": "min",
    "val_loss": "min",
    "perplexity": "min",
    "bits_per_byte": "min",
    "kl_per_token": "min",
    "accuracy": "max",
    "precision": "max",
    "recall": "max",
    "f1": "max",
    "auroc": "max",
    "reward_accuracy": "max",
    "reward_margin": "max",
    "exact_match": "max",
}
"""Other metrics have no direction of their own: a reward or a log-probability may be meant to rise or to stay."""


def better_when(metric: str) -> str | None:
    """`min` or `max`, by the name of a metric (`val/accuracy`); None if the name does not tell."""
    name = metric.rpartition("/")[2].removeprefix("eval_")
    return BETTER.get(name.removesuffix("_low").removesuffix("_high"))
