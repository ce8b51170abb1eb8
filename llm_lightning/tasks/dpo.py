"""Direct Preference Optimization: make chosen answers likelier than rejected ones, measured against a reference.

What flows: one forward pass of the policy over both answers of every pair, one without gradients of the reference;
the summed log-probabilities of each answer; one loss per pair (`losses.preference_loss`). The reference is what the
policy was at the start: a frozen copy, the policy with its adapters off, a frozen clone of its adapter, or log-
probabilities that were computed once and stored. At step 0 policy and reference must agree, which is checked.

Tensor letters: B pairs, M answer tokens, C width.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_lightning.data.pairs import PreferenceBatch
from llm_lightning.files.frozen_cache import FrozenCache, weights_digest
from llm_lightning.losses import (
    check_preference_loss,
    preference_loss,
    sequence_log_probs,
    token_kl,
    token_log_probs,
)
from llm_lightning.metrics.answers import wilson_interval
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import LoRALinear, adapter_state, adapters_off, add_adapter, use_adapter
from llm_lightning.tasks.base import StepOutput, TaskModule
from llm_lightning.tokenizers import Tokenizer
from llm_lightning.weights.checkpoint import load_model, merged_trunk

REFERENCES = ("copy", "adapter_off", "adapter_clone", "cached")
CLONE = "reference"
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Of rewards at step 0; of half-precision types 1e-2."""
PAIRS_PER_BATCH = 8

log = logging.getLogger(__name__)


class DPOModule(TaskModule):
    """Preference tuning of a policy against a frozen reference, which never leaves eval mode.

    Args:
        model: the policy at its start, and so the reference.
        loss: `sigmoid` (the paper's), `average` (the book's), `ipo`, `length_normalised` or `simpo` (no reference).
        beta: how dear a departure from the reference is.
        label_smoothing: the share of pairs that are taken to be the wrong way round (conservative DPO).
        gamma: the margin that `simpo` asks for.
        reference: one of `REFERENCES`, or `auto`: adapters off where there are adapters, else a copy; or a model (see
            `load_model`) with the policy's weights.
        max_chosen_drop: nats by which the chosen answers may become less likely before a warning.

    Raises:
        ValueError: if there is dropout, or the reference is impossible for this model, or of another shape or
            tokenizer.
        FileNotFoundError: if it is a folder without a model.
    """

    task, item = "dpo", "pair"
    model: GPT

    def __init__(
        self,
        *,
        model: GPT,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        reference: str = "auto",
        max_chosen_drop: float = 20.0,
        **common: Any,
    ) -> None:
        config, lora = model.config, common.get("lora")
        if any((config.embedding_dropout, config.attention_dropout, config.residual_dropout, lora and lora.dropout)):
            raise ValueError(
                "preference tuning compares the policy with its reference, so that dropout would be taken for a "
                "difference; set model.dropout=0 and lora.dropout=0"
            )
        check_preference_loss(loss, beta, label_smoothing, gamma)
        resolver = _resolve(reference, has_adapters=lora is not None, needs_none=loss == "simpo")
        frozen: GPT | None = None
        if resolver == "copy":
            frozen = copy.deepcopy(model).requires_grad_(False)
        elif resolver == "given":
            frozen = _given(reference, model, common["tokenizer"])
        super().__init__(model=model, **common)
        self.loss, self.beta, self.label_smoothing, self.gamma = loss, beta, label_smoothing, gamma
        self.reference_kind, self.max_chosen_drop = resolver, max_chosen_drop
        self.reference = frozen
        if resolver == "adapter_clone":
            _clone_adapter(model)
        self._must_check = False
        self._has_warned = False
        self._known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> DPOModule:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    # --- one batch -------------------------------------------------------------------------------------------------

    def step_output(self, batch: PreferenceBatch) -> StepOutput:
        n = batch.n_targets  # 0 in a process that ran out of pairs before the others: all is empty, and every sum 0
        states = self.scored_states(self.model, batch)
        policy = self.log_probs_of(states, self.model.head_weight(), batch)  # (2B,)
        reference, kl = self.reference_of(batch, None if torch.is_grad_enabled() else states)
        found = preference_loss(
            *(policy[:n], policy[n:], reference[:n], reference[n:], batch.lengths[:n], batch.lengths[n:]),
            kind=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
        )
        margin = (found.chosen_reward - found.rejected_reward).detach()
        sums = {
            "reward_accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),  # at the start, all are ties
            "reward_margin": margin,
            "chosen_reward": found.chosen_reward.detach(),
            "rejected_reward": found.rejected_reward.detach(),
            "chosen_log_prob": policy[:n].detach(),
            "rejected_log_prob": policy[n:].detach(),
            "chosen_log_ratio": (policy - reference)[:n].detach(),
        }
        count = torch.tensor(float(n), device=margin.device)
        tokens = batch.lengths.float()
        # Over the tokens of the data, not of the policy's own. The first is an estimate, and all that training logs.
        per_token = {"log_ratio_per_token": (policy - reference).detach().sum()}
        if kl is not None:
            per_token["kl_per_token"] = kl.sum()
        return StepOutput(
            found.loss.sum(),
            n,
            metrics={name: (values.sum(), count) for name, values in sums.items()}
            | {name: (total, tokens.sum()) for name, total in per_token.items()},
            outputs={"margin": margin, "longer_by": tokens[:n] - tokens[n:]},
        )

    def scored_states(self, model: GPT, batch: PreferenceBatch) -> Tensor:
        """(M, C) trunk output where a token of an answer is predicted."""
        hidden = model.hidden_states(batch.input_ids, packing=batch.packing)
        return hidden.flatten(0, 1).index_select(0, batch.wanted)

    def log_probs_of(self, states: Tensor, head_weight: Tensor, batch: PreferenceBatch) -> Tensor:
        """The summed log-probability of each answer, (2B,): all chosen ones, then all rejected ones."""
        return sequence_log_probs(token_log_probs(states, head_weight, batch.labels), batch.branch, len(batch.lengths))

    def log_probs(self, model: GPT, batch: PreferenceBatch) -> Tensor:
        """`log_probs_of` what `model` makes of the batch."""
        return self.log_probs_of(self.scored_states(model, batch), model.head_weight(), batch)

    @torch.no_grad()
    def reference_of(self, batch: PreferenceBatch, policy_states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The reference's `log_probs` and, given the policy's states, KL(policy || reference) of each token.

        KL is None where only log-probabilities of the reference are known, or nothing.
        """
        if self.reference_kind == "none":
            return batch.lengths.new_zeros(batch.lengths.shape, dtype=torch.float32), None
        if self.reference_kind == "cached":
            rows = [self._known[key] for key in batch.keys]  # (2,) each
            known = torch.stack(rows).T.flatten() if rows else torch.zeros(0)
            return known.to(batch.lengths.device), None
        policy_weight = self.model.head_weight()
        with self.as_reference() as model:
            states, weight = self.scored_states(model, batch), model.head_weight()
            kl = None if policy_states is None else token_kl(policy_states, policy_weight, states, weight)
            return self.log_probs_of(states, weight, batch), kl

    @contextmanager
    def as_reference(self) -> Iterator[GPT]:
        """The reference; or the policy, with what was trained taken away as long as the context lasts."""
        if self.reference is not None:
            yield self.reference
        elif self.reference_kind == "adapter_off":
            with adapters_off(self.model):
                yield self.model
        else:
            use_adapter(self.model, CLONE)
            try:
                yield self.model
            finally:
                use_adapter(self.model, "default")

    # --- the start -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.reference is not None and self.trainer.precision == "bf16-mixed":
            # As autocast would cast them at every step; embeddings and norms stay, so that step 0 agrees to the bit.
            for block in self.reference.blocks.modules():
                if isinstance(block, nn.Linear):
                    block.to(torch.bfloat16)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.is_sharded:
            raise ValueError("task=dpo does not run on sharded weights; use accelerator=ddp, gpu, mps or cpu")
        if self.global_step == 0 and "lineage" in self.header and self.header["lineage"].get("parent") is None:
            log.warning("Policy and reference start from random weights; give init_from=RUN, a run of task=sft")
        self._must_check = self.global_step == 0 and self.reference_kind != "none"
        if self.reference_kind == "cached":
            self._ensure_known()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        if self._must_check and batch.n_targets:
            self.check_start(batch)
            self._must_check = False
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def check_start(self, batch: PreferenceBatch) -> None:
        """Refuse a reference that is not what the policy is now.

        Raises:
            ValueError: if a log-ratio at step 0 is not 0, so that the sigmoid loss is not ln 2.
        """
        difference = (self.log_probs(self.model, batch) - self.reference_of(batch, None)[0]).abs().max().item()
        half = self.trainer.precision not in ("32-true", "64-true")
        tolerance = 1e-2 if half else TOLERANCES.get(next(self.model.parameters()).dtype, 1e-5)
        if not self.beta * difference <= tolerance:
            raise ValueError(
                f"policy and reference differ at step 0: a log-probability by {difference:.3g}, a reward by "
                f"{self.beta * difference:.3g} (at most {tolerance:g}), so that the loss does not start at ln 2 = "
                f"{math.log(2):.4f}; the reference ({self.reference_kind}) is not what the policy starts from: give "
                "both the same weights, or take task.reference=copy"
            )

    def _ensure_known(self) -> None:
        """Compute the reference's log-probabilities of all pairs, as far as no earlier run or checkpoint did."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = list({sample.key: sample for sample in datamodule.all_samples()}.values())
        wanted = [sample.key for sample in samples]
        if all(key in self._known for key in wanted):
            return
        if self.global_step > 0:
            raise ValueError(
                "the reference's log-probabilities are not in this checkpoint, and the weights have moved on; start "
                "the run again"
            )
        # Adapters change nothing yet, and are drawn anew for every seed.
        weights = ((name, p.detach()) for name, p in sorted(self.model.named_parameters()) if "lora_" not in name)
        identity = {
            "task": self.task,
            "weights": weights_digest(weights),
            "n_head": self.model.config.n_head,
            "precision": self.trainer.precision,
            "device": self.device.type,
        }
        store = FrozenCache(identity, width=2, dtype=torch.float32)

        def compute(indices: list[int]) -> Tensor:
            batch = datamodule.collate([samples[index] for index in indices])
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                return self.log_probs(self.model, batch).float().unflatten(0, (2, -1)).T.contiguous().cpu()

        keys = [bytes.fromhex(key) for key in wanted]
        store.ensure(
            keys, [1] * len(keys), compute, rows_per_batch=PAIRS_PER_BATCH, description="reference log-probabilities"
        )
        self._known = {key: store.rows(bytes.fromhex(key))[0] for key in wanted}

    # --- the whole -------------------------------------------------------------------------------------------------

    def metric_names(self) -> tuple[str, ...]:
        rewards = ("reward_accuracy", "reward_margin", "reward_accuracy_low", "reward_accuracy_high", "chosen_reward")
        rest = ("rejected_reward", "chosen_log_prob", "rejected_log_prob", "chosen_log_ratio", "log_ratio_per_token")
        kl = () if self.reference_kind in ("cached", "none") else ("kl_per_token",)
        return ("loss", *rewards, *rest, *kl, "margin_length_correlation")

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        margin, longer = outputs["margin"].double(), outputs["longer_by"].double()
        low, high = wilson_interval(round(means["reward_accuracy"] * len(margin)), len(margin))
        spread = margin.std(unbiased=False) * longer.std(unbiased=False)
        covariance = ((margin - margin.mean()) * (longer - longer.mean())).mean()
        metrics = {
            **means,
            "reward_accuracy_low": low,
            "reward_accuracy_high": high,
            # Near 0: what is preferred is not simply the longer answer.
            "margin_length_correlation": float(covariance / spread) if spread > 0 else 0.0,
        }
        if (
            stage == "val"
            and self.reference_kind != "none"
            and means["chosen_log_ratio"] < -self.max_chosen_drop
            and not self._has_warned
        ):
            self._has_warned = True
            log.warning(
                "Chosen answers have become less likely by %.1f nats each (task.max_chosen_drop=%g): the margin grows "
                "because rejected ones fall faster; lower optimizer.lr or raise task.beta",
                -means["chosen_log_ratio"],
                self.max_chosen_drop,
            )
        return metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._known:
            keys = list(self._known)
            checkpoint["reference_log_probs"] = {"keys": keys, "values": torch.stack([self._known[k] for k in keys])}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.load_reference(checkpoint)

    def load_reference(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the reference's log-probabilities from a checkpoint of `task.reference=cached`."""
        stored = checkpoint.get("reference_log_probs")
        if stored:
            self._known = dict(zip(stored["keys"], stored["values"], strict=True))

    def results(self) -> dict[str, Any]:
        return {"reference": self.reference_kind}


def _resolve(reference: str, *, has_adapters: bool, needs_none: bool) -> str:
    """What to use; raises ValueError, saying what is possible, if it cannot be had."""
    is_path = reference not in (*REFERENCES, "auto")
    if is_path:
        near = difflib.get_close_matches(reference, REFERENCES, 1)
        if near or not Path(reference).exists():
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"task.reference={reference!r} is unknown: {hint}use auto, {', '.join(REFERENCES)}, or the path of a "
                "model"
            )
    if needs_none:
        return "none"
    if is_path:
        return "given"
    if reference == "auto":
        return "adapter_off" if has_adapters else "copy"
    if reference.startswith("adapter") and not has_adapters:
        raise ValueError(
            f"task.reference={reference} needs adapters, and all weights are trained here; add lora=default, or use "
            "copy or cached"
        )
    return reference


def _given(path: str, policy: GPT, tokenizer: Tokenizer) -> GPT:
    """The model at `path`; raises ValueError if the policy's tokens or positions mean something else to it."""
    loaded = load_model(path)
    reference = merged_trunk(loaded.gpt)
    if loaded.tokenizer.describe() != tokenizer.describe():
        raise ValueError(
            f"task.reference={path} has another tokenizer than the policy ({loaded.tokenizer.describe()['name']}, not "
            f"{tokenizer.describe()['name']}, or trained on another text); take a model with the policy's, or "
            "task.reference=copy"
        )
    for name in ("vocab_size", "n_layer", "n_head", "n_embd", "qkv_bias", "context_length"):
        theirs, ours = getattr(reference.config, name), getattr(policy.config, name)
        if theirs < ours if name == "context_length" else theirs != ours:
            raise ValueError(
                f"task.reference={path} has {name} {theirs}, and the policy {ours}; take the model that the policy "
                "starts from, or task.reference=copy"
            )
    return reference.float().eval().requires_grad_(False)


def _clone_adapter(model: GPT) -> None:
    """Add a frozen copy of the adapter in use."""
    state = {name: tensor.detach().clone() for name, tensor in adapter_state(model).items()}
    configs = [layer.configs["default"] for layer in model.modules() if isinstance(layer, LoRALinear)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    add_adapter(model, configs[0], CLONE)
    with torch.no_grad():
        for name, tensor in adapter_state(model, CLONE).items():
            tensor.copy_(state[name])
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    use_adapter(model, "default")
