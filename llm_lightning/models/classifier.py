"""A GPT trunk with a linear head that reads one vector per sequence.

Ids are embedded and pass through the blocks, of which the last one computes only the position that the head reads
(with a mean: all); then come the final norm and the head. The lower blocks can be run separately (`run_lower`, then
`finish`), so that frozen blocks are computed once.

Tensor letters: B batch, T time, C width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llm_lightning.models.attention import Context
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import LoRALinear

POOLINGS = ("last", "first", "mean", "last_position", "mean_position")
"""The hidden state that the head reads: of the last real token, of the first, or the mean over the real tokens; with
the padding, as in the book's code: of the last position, or the mean over all."""


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

    def __init__(self, trunk: GPT, n_classes: int, pooling: str = "last", causal: bool = True) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"task.pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
        if n_classes < 2:
            raise ValueError(f"{n_classes} class(es): a classifier needs at least two")
        assert trunk.config.tied_head, "an untied language-model head is never run and only costs memory"
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.n_embd, n_classes)
        self.pooling, self.causal = pooling, causal
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(0.5))
        """(): with two classes, the probability of class 1 from which it is predicted."""

    @property
    def reads_pads(self) -> bool:
        """Whether padding is treated as text."""
        return self.pooling.endswith("_position")

    def check_padding(self, pad_to: int | None) -> None:
        """Refuse a pooling that reads padding where batches are padded to their longest text."""
        if self.reads_pads and pad_to is None:
            raise ValueError(
                f"task.pooling={self.pooling} reads the padding, which then must not depend on the batch; "
                "set data.pad_to (longest_train, context or a number), or task.pooling=last"
            )

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, K) for `input_ids` (B, T), padded on the right behind `lengths` (B,) tokens."""
        return self.finish(self.trunk.embed(input_ids), lengths)

    def run_lower(self, input_ids: Tensor, lengths: Tensor, n_blocks: int) -> Tensor:
        """The output of the first `n_blocks` blocks, (B, T, C); `finish(..., start=n_blocks)` does the rest."""
        x = self.trunk.embed(input_ids)
        return self.trunk.run_blocks(x, Context(self._mask(x, lengths)), stop=n_blocks)

    def finish(self, x: Tensor, lengths: Tensor, start: int = 0) -> Tensor:
        """The input of block `start`, (B, T, C) -> logits (B, K)."""
        return self.read(self.pool(x, lengths, start))

    def vectors(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """The output of the whole trunk: the vectors that the head reads, (B, C)."""
        return self.pool(self.trunk.embed(input_ids), lengths)

    def read(self, vectors: Tensor) -> Tensor:
        """The head: (B, C) -> (B, K)."""
        logits: Tensor = self.head(vectors)
        return logits

    def pool(self, x: Tensor, lengths: Tensor, start: int = 0) -> Tensor:
        """The input of block `start`, (B, T, C) -> the vector that the head reads, (B, C)."""
        trunk, mask = self.trunk, self._mask(x, lengths)
        time = torch.arange(x.size(1), device=x.device)
        ends = torch.full_like(lengths, x.size(1)) if self.reads_pads else lengths
        if self.pooling.startswith("mean"):
            hidden = trunk.final_norm(trunk.run_blocks(x, Context(mask), start))
            is_real = (time < ends[:, None]).unsqueeze(-1).to(hidden.dtype)
            return (hidden * is_real).sum(1) / ends[:, None]
        output_positions = torch.zeros_like(ends) if self.pooling == "first" else ends - 1
        n_layer = trunk.config.n_layer
        x = trunk.run_blocks(x, Context(mask), start, n_layer - 1)
        visible = time <= output_positions[:, None] if self.causal else time < ends[:, None]  # (B, T)
        last = Context(visible[:, None, None], output_positions=output_positions)
        return trunk.final_norm(trunk.run_blocks(x, last, n_layer - 1)).squeeze(1)

    def predict(self, logits: Tensor) -> Tensor:
        """(B, K) -> the predicted class of each row, (B,): the likeliest one; with two classes, by `threshold`."""
        if logits.size(-1) == 2:
            return (logits.float().softmax(-1)[:, 1] >= self.threshold).long()
        return logits.argmax(-1)

    def _mask(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        """(B, 1, 1, T), or None: causal, which hides right padding too."""
        if self.causal:
            return None
        ends = torch.full_like(lengths, x.size(1)) if self.reads_pads else lengths
        return (torch.arange(x.size(1), device=x.device) < ends[:, None])[:, None, None]


def train_only(model: Classifier, n_blocks: int | str, *, is_pretrained: bool = False) -> None:
    """Freeze everything but the head and, if `n_blocks` > 0, the last `n_blocks` blocks and the final norm.

    Args:
        n_blocks: a number; `all`: freeze nothing; `auto`: 1 if the trunk is pretrained, else all.

    Raises:
        ValueError: if it is no number, or there are fewer blocks.
    """
    if n_blocks == "auto":
        n_blocks = 1 if is_pretrained else "all"
    if n_blocks == "all":
        return
    if isinstance(n_blocks, bool) or not isinstance(n_blocks, int):
        raise ValueError(f"task.trained_blocks={n_blocks} must be a number of blocks (0: the head alone), auto or all")
    n_layer = model.trunk.config.n_layer
    if not 0 <= n_blocks <= n_layer:
        raise ValueError(f"task.trained_blocks={n_blocks} must be between 0 and model.n_layer={n_layer}, or all")
    model.trunk.requires_grad_(False)
    if n_blocks > 0:
        model.trunk.final_norm.requires_grad_(True)
        for block in list(model.trunk.blocks)[n_layer - n_blocks :]:
            block.requires_grad_(True)


def train_head(model: Classifier) -> None:
    """Train the head beside the adapters of the trunk, unless it has an adapter itself."""
    if not isinstance(model.head, LoRALinear):
        model.head.requires_grad_(True)


def frozen_depth(model: Classifier) -> int | None:
    """The number of lower blocks whose output never changes: neither they nor the embeddings are trained.

    Returns:
        None if the whole trunk is frozen, so that only the pooled vector is needed.
    """
    trunk = model.trunk
    embeddings = [one for one in (trunk.token_embedding, trunk.position_embedding) if one is not None]
    if any(_is_trained(embedding.parameters()) for embedding in embeddings):
        return 0
    depth = next((i for i, block in enumerate(trunk.blocks) if _is_trained(block.parameters())), trunk.config.n_layer)
    if depth == trunk.config.n_layer and not _is_trained(trunk.final_norm.parameters()):
        return None
    # The last block is computed for one position only, so its output cannot be stored for all.
    return min(depth, trunk.config.n_layer - 1)


def _is_trained(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)
