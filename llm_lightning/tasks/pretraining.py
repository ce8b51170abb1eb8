"""Causal-language-model pretraining: predict every next token."""

from __future__ import annotations

import math

from torch import Tensor

from llm_lightning.data.batches import LMBatch
from llm_lightning.losses import causal_lm_loss, perplexity
from llm_lightning.models.gpt import GPT
from llm_lightning.tasks.base import StepOutput, TaskModule


class PretrainingModule(TaskModule):
    """Cross-entropy of the next token, over all positions."""

    task, item = "pretraining", "token"
    model: GPT

    def step_output(self, batch: LMBatch) -> StepOutput:
        hidden = self.model.hidden_states(batch.input_ids)  # (B, T, C)
        return StepOutput(causal_lm_loss(hidden, self.model.head_weight(), batch.labels), batch.n_targets)

    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "perplexity", "bits_per_byte")

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        bits = means["loss"] / math.log(2)
        bytes_per_token = self.datamodule.bytes_per_token(stage)  # type: ignore[attr-defined]
        return means | {"perplexity": perplexity(means["loss"]), "bits_per_byte": bits / bytes_per_token}
