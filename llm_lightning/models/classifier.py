"""A GPT trunk with a linear head that reads one vector per sequence.

What flows: ids are embedded and pass through the blocks; of the last block only the position that the head reads is
computed; final norm; head. Any number of lower blocks can be computed apart (`run_lower`, then `finish`), which is
what lets frozen blocks be computed once.

Tensor letters: B batch, T time, C width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llm_lightning.models.gpt import GPT

POOLINGS = ("last", "first", "mean", "last_position", "mean_position")
"""Which hidden state the head reads: of the last real token, of the first, the mean over the real tokens; or, pads
and all, as the book's code does, of the last position, or the mean over all."""


class Classifier(nn.Module):
    """Class logits of whole sequences.

    Args:
        trunk: a GPT with a tied head, which is never run and costs nothing.
        n_classes: K.
        pooling: one of `POOLINGS`. With right padding and causal attention, `last` does not depend on the padding.
        causal: False lets every position see all real tokens (with a `..._position` pooling: all positions).

    Raises:
        ValueError: for an unknown pooling or fewer than two classes.
    """

    def __init__(self, trunk: GPT, n_classes: int, *, pooling: str = "last", causal: bool = True) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"task.pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
        if n_classes < 2:
            raise ValueError(f"{n_classes} class(es): a classifier tells at least two apart")
        assert trunk.config.tied_head, "an untied language-model head would be carried along for nothing"
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.n_embd, n_classes)
        self.pooling, self.causal = pooling, causal
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(0.5))
        """() of two classes: the probability of class 1 from which it is chosen."""

    @property
    def reads_pads(self) -> bool:
        """Whether padding is treated as text."""
        return self.pooling.endswith("_position")

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, K) of `input_ids` (B, T), padded on the right, of which the first `lengths` (B,) are real."""
        return self.finish(self.trunk.embed(input_ids), lengths)

    def run_lower(self, input_ids: Tensor, lengths: Tensor, n_blocks: int) -> Tensor:
        """What stands behind the first `n_blocks` blocks, (B, T, C); `finish(..., start=n_blocks)` does the rest."""
        x = self.trunk.embed(input_ids)
        return self.trunk.run_blocks(x, self._mask(x, lengths), stop=n_blocks)

    def finish(self, x: Tensor, lengths: Tensor, start: int = 0) -> Tensor:
        """(B, T, C) in front of block `start` -> logits (B, K)."""
        return self.head(self.pool(x, lengths, start))

    def pool(self, x: Tensor, lengths: Tensor, start: int = 0) -> Tensor:
        """(B, T, C) in front of block `start` -> what the head reads, (B, C)."""
        trunk, n_layer = self.trunk, self.trunk.config.n_layer
        mask = self._mask(x, lengths)
        time = torch.arange(x.size(1), device=x.device)
        ends = torch.full_like(lengths, x.size(1)) if self.reads_pads else lengths
        if self.pooling.startswith("mean"):
            hidden = trunk.final_norm(trunk.run_blocks(x, mask, start=start))
            is_real = (time < ends[:, None]).unsqueeze(-1).to(hidden.dtype)
            return (hidden * is_real).sum(1) / ends[:, None]
        at = torch.zeros_like(ends) if self.pooling == "first" else ends - 1
        x = trunk.run_blocks(x, mask, start=start, stop=n_layer - 1)
        visible = time <= at[:, None] if self.causal else time < ends[:, None]  # (B, T)
        return trunk.final_norm(trunk.blocks[-1](x, visible[:, None, None], at=at)).squeeze(1)

    def predict(self, logits: Tensor) -> Tensor:
        """(B, K) -> the chosen class of each row, (B,): the likeliest; of two classes, by `threshold`."""
        if logits.size(-1) == 2:
            return (logits.float().softmax(-1)[:, 1] >= self.threshold).long()
        return logits.argmax(-1)

    def _mask(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        """None: causal, which with right padding hides the padding too."""
        if self.causal:
            return None
        ends = torch.full_like(lengths, x.size(1)) if self.reads_pads else lengths
        return (torch.arange(x.size(1), device=x.device) < ends[:, None])[:, None, None]


def train_only(model: Classifier, n_blocks: int) -> None:
    """Freeze all but the head and, if `n_blocks` > 0, the last `n_blocks` blocks and the final norm.

    Raises:
        ValueError: if there are fewer blocks.
    """
    n_layer = model.trunk.config.n_layer
    if not 0 <= n_blocks <= n_layer:
        raise ValueError(f"task.trained_blocks={n_blocks} must be between 0 and model.n_layer={n_layer}, or all")
    model.trunk.requires_grad_(False)
    if n_blocks > 0:
        model.trunk.final_norm.requires_grad_(True)
        for block in list(model.trunk.blocks)[n_layer - n_blocks :]:
            block.requires_grad_(True)


def frozen_depth(model: Classifier) -> int | None:
    """How many lower blocks compute the same for ever: none of their parameters, nor the embeddings', is trained.

    Returns:
        their number; None if the whole trunk is frozen, so that only the pooled vector is needed.
    """
    trunk = model.trunk
    if _is_trained(trunk.token_embedding.parameters()) or _is_trained(trunk.position_embedding.parameters()):
        return 0
    depth = next((i for i, block in enumerate(trunk.blocks) if _is_trained(block.parameters())), trunk.config.n_layer)
    if depth == trunk.config.n_layer and not _is_trained(trunk.final_norm.parameters()):
        return None
    # The last block is computed for one position only, and so is never part of what is stored for all.
    return min(depth, trunk.config.n_layer - 1)


def _is_trained(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)
