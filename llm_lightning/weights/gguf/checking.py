"""Check a GGUF file after writing: read it back, and let llama.cpp compute from it, where `xllamacpp` is installed.

A number is rounded by at most `ROUNDING` of its size. A linear layer with such errors, independent of each other, has
outputs with relative errors of the same size; the 2 L layers that add to the residual stream, and the head, add theirs
like a random walk. So logits with the standard deviation s move by about ROUNDING * sqrt(2 L + 2) * s, and the largest
of some millions by 6 times as much. Llama.cpp rounds what it multiplies with the weights to their type once more, so
the same bound holds for it; `FLOAT32` is what two float32 programs differ by. Both logits and logarithms of
probabilities have this scale.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.gpt import GPT
from llm_lightning.weights.gguf import llama_cpp
from llm_lightning.weights.gguf.reading import read_gguf

ROUNDING = {
    "f32": 0.0,
    "f16": 2.0**-11,  # half a unit in the last of 11 bits
    "bf16": 2.0**-9,  # of 8 bits
    "q8_0": math.sqrt(32 / 12) / 127,  # root mean square of a block of 32, where a step is its largest / 127
}
FLOAT32 = 1e-3
"""Of the standard deviation; for llama.cpp, which sums in another order, in nats as well."""
LENGTH, FIRST = 64, 48  # ids, of which llama.cpp predicts those from FIRST on: one completion for each


def check_file(file: Path, model: GPT, dtype: str) -> dict[str, Any]:
    """Compare logits of the file with those of the model in float32.

    Returns:
        the largest differences (`max_logit_difference`, `llama_cpp_max_log_probability_difference`), their bounds and
        the version of `xllamacpp`; None where it is not installed.

    Raises:
        ValueError: if a difference exceeds its bound, or llama.cpp does not read the file.
    """
    ids = torch.arange(min(model.config.context_length, LENGTH)) * 7919 % model.config.vocab_size
    expected = _logits(model, ids)
    written = _logits(read_model(file), ids)
    spread = expected.std(dim=-1).mean().item()
    bound = max(FLOAT32, 6 * ROUNDING[dtype] * math.sqrt(2 * model.config.n_layer + 2)) * spread
    difference = (written - expected).abs().max().item()
    if not difference <= bound:
        raise ValueError(
            f"the file reads back with logits that differ by {difference:.2g}, more than {dtype} explains "
            f"({bound:.2g}); nothing was written. Please report it"
        )
    return {"max_logit_difference": difference, "bound": bound} | _by_llama_cpp(file, written, ids.tolist(), bound)


def read_model(file: Path) -> GPT:
    """The model in a GGUF file, float32."""
    loaded = read_gguf(file)
    with torch.device("meta"):
        model = GPT(loaded.config, init="torch")
    model.load_state_dict(loaded.state, assign=True)
    if loaded.config.tied_head:
        model.lm_head.weight = model.token_embedding.weight
    return model.eval()


@torch.no_grad()
def _logits(model: GPT, ids: Tensor) -> Tensor:
    """(T, V), float32."""
    was_training, dtype = model.training, model.dtype
    logits = model.eval().float()(ids[None])[0]
    model.to(dtype).train(was_training)
    return logits


def _by_llama_cpp(file: Path, logits: Tensor, ids: Sequence[int], bound: float) -> dict[str, Any]:
    """Compare our logits (T, V) of the file with what llama.cpp computes from it."""
    if not llama_cpp.is_installed():
        return {"xllamacpp": None, "llama_cpp_max_log_probability_difference": None}
    version = importlib.metadata.version("xllamacpp")
    first = min(FIRST, len(ids) // 2)
    theirs = llama_cpp.predictions(file, ids, first)
    difference = largest_difference(logits[first - 1 : -1].log_softmax(-1), ids[first:], theirs)
    bound = max(bound, FLOAT32)
    if not difference <= bound:
        raise ValueError(
            f"llama.cpp (xllamacpp {version}) computes log-probabilities from the file that differ by {difference:.2g} "
            f"from ours, more than {bound:.2g}; nothing was written. Please report it, with the version"
        )
    return {"xllamacpp": version, "llama_cpp_max_log_probability_difference": difference}


def largest_difference(ours: Tensor, following: Sequence[int], theirs: Sequence[llama_cpp.Prediction]) -> float:
    """Between log-probabilities (T, V) and llama.cpp's, of the tokens that follow and of its likeliest."""
    return max(
        abs(row[token].item() - value)
        for row, actual, prediction in zip(ours, following, theirs, strict=True)
        for token, value in [(actual, prediction.actual), *prediction.top.items()]
    )
