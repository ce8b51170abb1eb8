"""Instruction tuning (supervised finetuning): predict the answers of conversations."""

from __future__ import annotations

from torch import Tensor

from llm_lightning.data.batches import LMBatch
from llm_lightning.losses import causal_lm_loss, perplexity
from llm_lightning.models.attention import Context
from llm_lightning.models.gpt import GPT
from llm_lightning.tasks.base import StepOutput, TaskModule


class SFTModule(TaskModule):
    """Cross-entropy of the tokens that `data.loss_on` names, each with the same weight, whatever its record."""

    task, item = "sft", "token"
    model: GPT

    def step_output(self, batch: LMBatch) -> StepOutput:
        hidden = self.model.hidden_states(batch.input_ids, Context.of(batch.packing))  # (B, T, C), or packed (1, M, C)
        labels = batch.labels
        if batch.packing is not None:
            labels = labels.index_select(1, batch.packing.output_positions)
        return StepOutput(causal_lm_loss(hidden, self.model.head_weight(), labels), batch.n_targets)

    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "perplexity")

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        return means | {"perplexity": perplexity(means["loss"])}
