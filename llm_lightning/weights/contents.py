"""What a reader of published weights returns, whatever the files are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from llm_lightning.models.gpt import GPTConfig


class Pretrained(NamedTuple):
    """Weights with our names and layout, contiguous, in the dtype of the file, and their source."""

    config: GPTConfig
    state: dict[str, Tensor]
    tokenizer: dict[str, Any] | None
    """A description for `tokenizers.build.from_description`; None if the files do not determine it."""
    info: dict[str, Any]
    """`source`, `digest` (sha256), `dtype`; of the hub also `name`, which names the commit, and `files`, the sha256 of
    each by its name."""
    template: dict[str, Any] | None = None
    """A description of the model's own chat template; None if the files have none."""
    generation: dict[str, Any] | None = None
    """`eos_token_id` (a list), `bos_token_id`, `pad_token_id` and settings of sampling, as far as the files state
    them."""
