"""The frozen lower blocks of a classifier: run without gradients, or once for every sample and then read from disk.

Blocks below the lowest trained one give the same output in every epoch and run, so it is computed once and kept on
disk (`files/frozen_cache.py`); training then runs only the trained rest, with the same result.

Tensor letters: B batch, T time, C width, K classes.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from llm_lightning.data.batches import LabelledSample
from llm_lightning.files.frozen_cache import FrozenCache, FrozenCacheError
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.malloc import trim_malloc
from llm_lightning.models.classifier import Classifier, frozen_depth
from llm_lightning.tasks.stored_results import fill
from llm_lightning.weights.digests import code_digest, weights_digest

if TYPE_CHECKING:
    from llm_lightning.tasks.base import TaskModule

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 1024
"""Tokens that frozen blocks compute at once, padding included: enough for a CPU, and little memory."""


class FrozenBlocks(L.Callback):
    """Logits of a classifier whose lower blocks are frozen. A callback, to fill the cache before the first step.

    `depth` is the number of frozen lower blocks: 0 where the lowest is trained, None where the whole trunk is frozen.

    Args:
        model: the classifier; which of its parameters are trained is decided before.
        pad_to: the fixed length of all samples, if the data has one.
        pad_id: the id of padding.
        use_cache: keep the output of the frozen blocks on disk.
    """

    def __init__(self, model: Classifier, *, pad_to: int | None, pad_id: int, use_cache: bool) -> None:
        self.model, self.pad_to, self.pad_id, self.use_cache = model, pad_to, pad_id, use_cache
        self.depth = frozen_depth(model)
        self.store: FrozenCache | None = None

    def logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, T), (B,) -> (B, K), at least float32."""
        logits = self._logits(input_ids, lengths)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        if self.depth == 0:
            return self.model(input_ids, lengths)
        if self.store is None:
            with torch.no_grad():
                x = self._compute(input_ids, lengths)
        else:
            rows = zip(input_ids.cpu().numpy(), lengths.tolist(), strict=True)
            n_rows = 1 if self.depth is None else input_ids.size(1)
            x = self.store.batch([_key(row[:length]) for row, length in rows], n_rows).to(input_ids.device)
        x = x.to(self.model.head.weight.dtype)
        if self.depth is None:
            return self.model.read(x[:, 0])
        return self.model.finish(x, lengths, start=self.depth)

    def _compute(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Output of the frozen part in the type of its weights: (B, T, C), or of a wholly frozen trunk (B, 1, C)."""
        if self.depth is None:
            x = self.model.vectors(input_ids, lengths).unsqueeze(1)
        else:
            x = self.model.run_lower(input_ids, lengths, self.depth)
        return x.to(self.model.trunk.dtype)

    # --- the store -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if reason := self.cache_disabled_reason(pl_module):
            log.info("Frozen-block cache off: %s", reason)
        self._open(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._open(pl_module)

    def cache_disabled_reason(self, module: TaskModule) -> str | None:
        """Why frozen blocks are computed at every step; None if they are cached."""
        if self.depth == 0:
            return "the lowest block is being trained"
        if not self.use_cache:
            return "task.frozen_cache=false"
        if self.model.trunk.config.has_dropout:
            return "with model.dropout above 0 their output changes at every step"
        return None

    def _open(self, module: TaskModule) -> None:
        """Compute the output of the frozen blocks for every sample that no earlier run has stored."""
        if self.store is not None or self.cache_disabled_reason(module) is not None:
            return
        datamodule: Any = module.datamodule
        samples = datamodule.all_samples()
        # The dummy sample that a process evaluates when it has run out of texts before the others.
        samples.append(LabelledSample(-1, np.array([self.pad_id]), IGNORE_INDEX))

        def compute(indices: list[int]) -> Tensor:
            part = datamodule.collate([samples[index] for index in indices])
            ids, lengths = part.input_ids.to(module.device), part.lengths.to(module.device)
            with torch.no_grad(), module.trainer.precision_plugin.forward_context():
                rows = self._compute(ids, lengths)
            counts = self._n_rows(part.lengths.tolist())
            return torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)]).cpu()

        trunk = self.model.trunk
        identity, code = self._identity(module), code_digest("models")
        store = FrozenCache(identity, width=trunk.config.n_embd, dtype=trunk.dtype, code=code)
        training = self.model.training
        self.model.eval()
        try:
            fill(
                store,
                module,
                [_key(sample.token_ids) for sample in samples],
                self._n_rows([len(sample.token_ids) for sample in samples]),
                compute,
                rows_per_batch=TOKENS_PER_BATCH if self.depth is not None else TOKENS_PER_BATCH // 8,
                description="frozen blocks",
            )
        except FrozenCacheError as error:
            log.warning("Frozen-block cache off: %s", error)
            return
        finally:
            self.model.train(training)
        trim_malloc()
        self.store = store

    def _identity(self, module: TaskModule) -> dict[str, Any]:
        frozen = ((name, p.detach()) for name, p in self.model.named_parameters() if not p.requires_grad)
        return {
            "task": module.task,
            "weights": weights_digest(frozen),
            "blocks": self.depth,
            **self.model.trunk.config.cache_key_fields(),
            "pooling": self.model.pooling if self.depth is None or self.model.reads_pads else None,
            "causal": self.model.causal,
            "pad_to": self.pad_to if self.model.reads_pads else None,
            "precision": module.trainer.precision,
            "device": module.device.type,
        }

    def _n_rows(self, lengths: list[int]) -> list[int]:
        """Rows that the frozen part gives for sequences of these lengths."""
        if self.depth is None:
            return [1] * len(lengths)
        if self.model.reads_pads:
            assert self.pad_to is not None
            return [self.pad_to] * len(lengths)
        return lengths


def _key(token_ids: np.ndarray) -> bytes:
    """The name of a sequence in the store."""
    return hashlib.sha256(token_ids.astype(np.int64).tobytes()).digest()
