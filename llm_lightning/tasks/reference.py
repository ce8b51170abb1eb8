"""The reference of preference tuning: the policy as it was before the first update.

One class per kind: a frozen copy, the policy with its adapters off, log-probabilities that were computed once and
stored, or none. All of them give the summed log-probabilities of a batch of pairs. At step 0 policy and reference must
agree, which is checked.

Tensor letters: B pairs, M answer tokens, C width.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from llm_lightning.data.pairs import PreferenceBatch
from llm_lightning.files.frozen_cache import FrozenCache
from llm_lightning.losses import sequence_log_probs, token_kl, token_log_probs
from llm_lightning.models.attention import Context
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import adapters_off
from llm_lightning.models.sharding import release
from llm_lightning.nearest import nearest
from llm_lightning.tasks.stored_results import fill
from llm_lightning.weights.digests import code_digest, weights_digest

if TYPE_CHECKING:
    from llm_lightning.tasks.base import TaskModule

REFERENCES = ("copy", "adapter_off", "cached")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference of rewards at step 0; with half precision 1e-2."""
PAIRS_PER_BATCH = 8
"""Pairs whose reference log-probabilities are computed at once, before training."""
STORED = "reference_log_probs"
"""Checkpoint key of cached log-probabilities."""

log = logging.getLogger(__name__)


def answer_states(model: GPT, batch: PreferenceBatch) -> Tensor:
    """(M, C): trunk output at the positions that predict a token of an answer."""
    hidden = model.hidden_states(batch.input_ids, Context.of(batch.packing))
    return hidden.flatten(0, 1).index_select(0, batch.output_positions)


def answer_log_probs(states: Tensor, head_weight: Tensor, batch: PreferenceBatch) -> Tensor:
    """(2B,): the summed log-probability of each answer, first all chosen ones, then all rejected ones."""
    return sequence_log_probs(token_log_probs(states, head_weight, batch.labels), batch.branch, len(batch.lengths))


class Reference(L.Callback):
    """Log-probabilities of the reference. Subclasses differ in where they come from.

    It is a Lightning callback, so that it can act before the first step, check the first batch, and read and write
    checkpoints.
    """

    kind: str
    gives_kl = False
    """Whether the KL divergence of the policy can be computed; it needs the whole distribution."""
    frozen: GPT | None = None
    """The reference's own weights, if it has any; the task registers them as its submodule `reference`."""
    _must_check = False
    _has_warned = False

    @torch.no_grad()
    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        """(2B,) as `answer_log_probs`."""
        raise NotImplementedError

    def log_probs_and_kl(
        self, batch: PreferenceBatch, policy: GPT, policy_states: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`log_probs`, and KL(policy || reference) of each token, (M,), or None where `gives_kl` is False."""
        return self.log_probs(batch), None

    def prepare(self, module: TaskModule) -> None:
        """Called before the first batch."""

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the state of this kind from a checkpoint."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        lineage = pl_module.header.get("lineage")
        if trainer.global_step == 0 and lineage is not None and lineage.get("parent") is None:
            log.warning("Policy and reference start from random weights; give init_from=RUN, a run of task=sft")
        self._must_check = trainer.global_step == 0
        self.prepare(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        if self._must_check:
            with trainer.precision_plugin.forward_context():
                self.check_start(pl_module, batch)
            self._must_check = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.load(checkpoint)

    def warn_of_drop(self, log_ratio: float, limit: float) -> None:
        """Warn, once, where the chosen answers have become less likely by more than `limit` nats."""
        if self.kind != "none" and log_ratio < -limit and not self._has_warned:
            self._has_warned = True
            log.warning(
                "Chosen answers have become less likely by %.1f nats each (task.max_chosen_drop=%g): the margin grows "
                "because rejected ones fall faster; lower optimizer.lr or raise task.beta",
                -log_ratio,
                limit,
            )

    @torch.no_grad()
    def check_start(self, module: Any, batch: PreferenceBatch) -> None:
        """Refuse a reference that differs from the policy at step 0: the sigmoid loss would not start at ln 2.

        Raises:
            ValueError: if a reward, beta times a log-ratio, is not 0.
        """
        model, precision = module.model, module.trainer.precision
        policy = answer_log_probs(answer_states(model, batch), model.head_weight(), batch)
        differences = (policy - self.log_probs(batch)).abs()  # none in a process without a pair
        largest = torch.cat([differences, differences.new_zeros(1)]).max()
        difference = module.trainer.strategy.reduce(largest, reduce_op="max").item()  # all processes refuse, or none
        is_half = precision not in ("32-true", "64-true")
        tolerance = 1e-2 if is_half else TOLERANCES.get(next(model.parameters()).dtype, 1e-5)
        if not module.beta * difference <= tolerance:
            raise ValueError(
                f"policy and reference differ at step 0: a log-probability by {difference:.3g}, a reward by "
                f"{module.beta * difference:.3g} (at most {tolerance:g}), so that the loss does not start at ln 2 = "
                f"{math.log(2):.4f}; the reference ({self.kind}) is not the model that the policy starts from: give "
                "both the same weights, or use task.reference=copy"
            )


class ModelReference(Reference):
    """A reference that is a model: `model()` yields it."""

    gives_kl = True

    @contextmanager
    def model(self) -> Iterator[GPT]:
        raise NotImplementedError
        yield  # makes it a generator

    @torch.no_grad()
    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        with self.model() as model:
            return answer_log_probs(answer_states(model, batch), model.head_weight(), batch)

    @torch.no_grad()
    def log_probs_and_kl(
        self, batch: PreferenceBatch, policy: GPT, policy_states: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        policy_weight = policy.head_weight()
        with self.model() as model:
            states, weight = answer_states(model, batch), model.head_weight()
            kl = token_kl(policy_states, policy_weight, states, weight)
            return answer_log_probs(states, weight, batch), kl


class Copy(ModelReference):
    """A frozen copy of the policy, saved with each checkpoint. It never leaves eval mode."""

    kind = "copy"

    def __init__(self, policy: GPT) -> None:
        self.frozen: GPT = copy.deepcopy(policy).requires_grad_(False).eval()

    @contextmanager
    def model(self) -> Iterator[GPT]:
        yield self.frozen
        release(self.frozen)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.precision == "bf16-mixed":
            # Cast once what autocast would cast at every step; embeddings and norms stay as they are, so that step 0
            # agrees to the bit.
            for layer in self.frozen.blocks.modules():
                if isinstance(layer, nn.Linear):
                    layer.to(torch.bfloat16)


class AdapterOff(ModelReference):
    """The policy without its adapters: costs no memory; like a copy, one more forward pass per batch."""

    kind = "adapter_off"

    def __init__(self, policy: GPT) -> None:
        self.policy = policy

    @contextmanager
    def model(self) -> Iterator[GPT]:
        with adapters_off(self.policy):
            yield self.policy


class Cached(Reference):
    """Log-probabilities of all pairs, computed before training and kept on disk and in each checkpoint."""

    kind = "cached"

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        rows = [self._known[key] for key in batch.keys]  # (2,) each
        known = torch.stack(rows).T.flatten() if rows else torch.zeros(0)
        return known.to(batch.lengths.device)

    def prepare(self, module: TaskModule) -> None:
        """Compute the log-probabilities that neither an earlier run nor the checkpoint has.

        Raises:
            ValueError: if some are missing after the first update, when the policy is no longer the reference.
        """
        datamodule: Any = module.datamodule
        samples = list({sample.key: sample for sample in datamodule.all_samples()}.values())
        needed = [sample.key for sample in samples]
        if all(key in self._known for key in needed):
            return
        if module.global_step > 0:
            raise ValueError(
                "this checkpoint lacks the reference's log-probabilities, and the weights have changed since; start "
                "the run again"
            )
        policy, trainer = module.trunk, module.trainer
        # Without adapters: at step 0 they have no effect, and they differ between seeds.
        weights = ((name, p.detach()) for name, p in sorted(module.model.named_parameters()) if "lora_" not in name)
        identity = {
            "task": module.task,
            "weights": weights_digest(weights),
            **policy.config.cache_key_fields(),
            "precision": trainer.precision,
            "device": module.device.type,
        }
        dtype = torch.promote_types(policy.dtype, torch.float32)
        store = FrozenCache(identity, width=2, dtype=dtype, code=code_digest("models", "losses.py"))

        def compute(indices: list[int]) -> Tensor:
            batch = datamodule.collate([samples[index] for index in indices])
            batch = trainer.strategy.batch_to_device(batch, module.device)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                log_probs = answer_log_probs(answer_states(policy, batch), policy.head_weight(), batch)
                return log_probs.to(dtype).unflatten(0, (2, -1)).T.contiguous().cpu()

        keys = [bytes.fromhex(key) for key in needed]
        options = {"rows_per_batch": PAIRS_PER_BATCH, "description": "reference log-probabilities"}
        fill(store, module, keys, [1] * len(keys), compute, **options)
        self._known = {key: store.rows(bytes.fromhex(key))[0] for key in needed}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._known:
            checkpoint[STORED] = {"keys": list(self._known), "values": torch.stack(list(self._known.values()))}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        stored = checkpoint.get(STORED)
        if stored:
            self._known = dict(zip(stored["keys"], stored["values"], strict=True))


class NoReference(Reference):
    """For losses that do not look at a reference: its log-probabilities are 0."""

    kind = "none"

    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        return batch.lengths.new_zeros(batch.lengths.shape, dtype=torch.float32)

    def check_start(self, module: Any, batch: PreferenceBatch) -> None:
        """There is no reference to compare with."""


def build_reference(setting: str, policy: GPT, *, has_adapters: bool, is_reference_free: bool) -> Reference:
    """The reference that `task.reference` names; `policy` has no adapters yet.

    Raises:
        ValueError: if there is no such kind, or it needs adapters and there are none.
    """
    if setting not in (*REFERENCES, "auto"):
        raise ValueError(f"task.reference={setting!r} {_refusal(setting)}; use auto, {', '.join(REFERENCES)}")
    if is_reference_free:
        return NoReference()
    if setting == "auto":
        setting = "adapter_off" if has_adapters else "copy"
    if setting == "adapter_off" and not has_adapters:
        raise ValueError(
            "task.reference=adapter_off needs adapters, and all weights are trained here; add lora=default, or use "
            "copy or cached"
        )
    return {"copy": lambda: Copy(policy), "adapter_off": lambda: AdapterOff(policy), "cached": Cached}[setting]()


def kind_of_earlier_version(setting: str, *, is_adapter: bool) -> str:
    """The kind of reference in a checkpoint whose header names `setting`.

    Earlier versions also had `adapter_clone`, equal to the policy without its adapters, and paths of models that
    agreed with the policy. An adapter alone holds no reference: its base is the reference.
    """
    if is_adapter or setting == "adapter_clone":
        return "adapter_off"
    return setting if setting in (*REFERENCES, "auto") else "copy"


def _refusal(setting: str) -> str:
    near = nearest(setting, REFERENCES)
    if near or not any(mark in setting for mark in "/\\."):
        return "is unknown" + (f": did you mean {near}?" if near else "")
    return "is no longer accepted: the reference must equal the initial policy, which is what copy holds"
