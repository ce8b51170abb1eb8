"""Direct Preference Optimization: make chosen answers likelier than rejected ones, measured against a reference.

The policy runs once over both answers of every pair, and so does the reference, without gradients, unless its
log-probabilities are stored; the summed log-probabilities of the answers give one loss per pair
(`losses.preference_loss`). `reference.py` holds the reference.

Tensor letters: B pairs, M answer tokens, C width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_lightning.data.pairs import PreferenceBatch
from llm_lightning.losses import check_preference_loss, preference_loss
from llm_lightning.metrics.preferences import PREFERENCE_METRICS, preference_metrics, preference_sums
from llm_lightning.models.gpt import GPT
from llm_lightning.tasks.base import StepOutput, TaskModule
from llm_lightning.tasks.reference import Reference, answer_log_probs, answer_states, build_reference


class DPOModule(TaskModule):
    """Preference tuning of a policy against a frozen reference.

    Args:
        model: the initial policy; the reference is the same model, frozen.
        loss, beta, label_smoothing, gamma: see `losses.preference_loss`; `simpo` needs no reference.
        reference: `copy`, `adapter_off`, `cached`, or `auto`: `adapter_off` if there are adapters, else `copy`.
        max_chosen_drop: nats by which the chosen answers may become less likely before a warning.

    Raises:
        ValueError: if there is dropout, or a setting is impossible for this model.
    """

    task, item = "dpo", "pair"
    model: GPT

    def __init__(
        self, *, model: GPT, loss: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0, gamma: float = 0.5,
        reference: str = "auto", max_chosen_drop: float = 20.0, **common: Any,
    ) -> None:  # fmt: skip
        lora = common.get("lora")
        if model.config.has_dropout or (lora and lora.dropout):
            raise ValueError(
                "preference tuning compares the policy with its reference, and dropout would make them differ; set "
                "model.dropout=0 and lora.dropout=0"
            )
        check_preference_loss(loss, beta, label_smoothing, gamma)
        provider = build_reference(reference, model, has_adapters=lora is not None, is_reference_free=loss == "simpo")
        super().__init__(model=model, **common)
        self.beta, self.max_chosen_drop = beta, max_chosen_drop
        self.preference_loss = partial(
            preference_loss, kind=loss, beta=beta, label_smoothing=label_smoothing, gamma=gamma
        )
        self.reference_provider = provider
        self.reference = provider.frozen  # its own weights, if it has any: a submodule, so that checkpoints have them

    def step_output(self, batch: PreferenceBatch) -> StepOutput:
        n = batch.n_targets  # 0 on a process that ran out of pairs before the others: every tensor below is empty
        states = answer_states(self.model, batch)  # (M, C)
        policy = answer_log_probs(states, self.model.head_weight(), batch)  # (2B,)
        if torch.is_grad_enabled():
            reference, kl = self.reference_provider.log_probs(batch), None
        else:  # the KL divergence is a metric of evaluations
            reference, kl = self.reference_provider.log_probs_and_kl(batch, self.model, states)
        lengths = batch.lengths  # first the chosen answers, then the rejected ones, as everywhere
        result = self.preference_loss(policy[:n], policy[n:], reference[:n], reference[n:], lengths[:n], lengths[n:])
        metrics, outputs = preference_sums(result, policy, reference, lengths, kl)
        return StepOutput(result.loss.sum(), n, metrics, outputs)

    def metric_names(self) -> tuple[str, ...]:
        kl = ("kl_per_token",) if self.reference_provider.gives_kl else ()
        return ("loss", *PREFERENCE_METRICS, *kl, "margin_length_correlation")

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        if stage == "val":
            self.reference_provider.warn_of_drop(means["chosen_log_ratio"], self.max_chosen_drop)
        return means | preference_metrics(means, outputs["margin"], outputs["longer_by"])

    def train(self, mode: bool = True) -> DPOModule:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def configure_callbacks(self) -> list[Reference]:
        return [self.reference_provider]

    def results(self) -> dict[str, Any]:
        return {"reference": self.reference_provider.kind}
