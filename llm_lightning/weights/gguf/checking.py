"""Check a GGUF file after writing: read it back, and let llama.cpp compute from it, where `xllamacpp` is installed.

What is compared are the log-probabilities of the ten likeliest tokens at each position of a text.

A number is rounded by at most `ROUNDING` of its size. A linear layer with such errors, independent of each other, has
outputs with relative errors of the same size; the 2 L layers that add to the residual stream, and the head, add theirs
like a random walk. So logits with the standard deviation s move by about ROUNDING * sqrt(2 L + 2) * s; the bound is 6
times as much, the largest of some hundred normal deviations and half as much again. Llama.cpp rounds what it multiplies
with the weights to their type as well, so the same bound holds for it. `FLOAT32` is by how much two programs differ in
float32. For comparison: with the rows of queries and keys in the wrong order, SmolLM2 differs by 8.
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
from llm_lightning.weights.chat import Prompt
from llm_lightning.weights.gguf import llama_cpp
from llm_lightning.weights.gguf.reading import read_gguf

ROUNDING = {
    "f32": 0.0,
    "f16": 2.0**-11,  # half a unit in the last of 11 bits
    "bf16": 2.0**-8,  # of 8 bits
    "q8_0": math.sqrt(32 / 12) / 127,  # root mean square of a block of 32, where a step is its largest / 127
}
FLOAT32, GELU = 1e-3, ROUNDING["f16"]
"""The least bound; how llama.cpp rounds the results of GELU, which it looks up in a table of float16."""
TEXT = (
    "The lighthouse keeper wrote down the weather every evening. On 3 March 1875 the wind came from the north, the sea "
    'was rough, and no ship passed before half past eight. "Tomorrow," he said to the cat, "we\'ll need more oil, and '
    "you'll have to catch your own fish.\"\n\n  The café was 4½ miles away; ÜBER 100,000 €, 東京!"
)
"""What ways of cutting a text differ in is in it: numbers, contractions, white space, letters of other alphabets."""
LENGTH = 64  # ids of the text, of which llama.cpp predicts the second half: one completion for each


def check_file(
    file: Path, model: GPT, ids: Sequence[int], dtype: str, prompts: Sequence[Prompt] = ()
) -> dict[str, Any]:
    """Compare what the file computes with what the model computes in float32.

    Args:
        ids: of `TEXT`; the first `LENGTH`, or as many as fit, are predicted.
        prompts: conversations, and their ids by our template.

    Returns:
        `max_difference` of log-probabilities, and `bound`; `xllamacpp` (its version), `llama_cpp_max_difference`, and
        `llama_cpp_other_prompts`, the number of prompts of which it makes other tokens: None where it is not installed.

    Raises:
        ValueError: if a difference exceeds the bound, or llama.cpp does not read the file or encodes otherwise.
    """
    shown = ids[: min(LENGTH, model.config.context_length)]
    logits = _logits(model, shown)
    spread = logits.std(dim=-1).mean().item()
    walk = 6 * math.sqrt(2 * model.config.n_layer + 2) * spread
    bound = max(FLOAT32, walk * ROUNDING[dtype])
    expected, written = logits.log_softmax(-1), _logits(read_model(file), shown).log_softmax(-1)
    likeliest = expected.topk(min(llama_cpp.TOP, expected.size(-1))).indices
    difference = (expected - written).gather(-1, likeliest).abs().max().item()
    _refuse_beyond(bound, difference, "read back, it computes")
    if model.config.mlp == "gelu":
        bound = max(bound, walk * GELU)
    return {"max_difference": difference} | _by_llama_cpp(file, written, ids, prompts, bound)


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
def _logits(model: GPT, ids: Sequence[int]) -> Tensor:
    """(T, V), float32."""
    was_training, dtype = model.training, model.dtype
    logits = model.eval().float()(torch.tensor([ids], device=model.device))[0].cpu()
    model.to(dtype).train(was_training)
    return logits


def _by_llama_cpp(
    file: Path, log_probabilities: Tensor, ids: Sequence[int], prompts: Sequence[Prompt], bound: float
) -> dict[str, Any]:
    """Compare our log-probabilities (T, V) of the file with llama.cpp's."""
    if not llama_cpp.is_installed():
        return {"bound": bound, "xllamacpp": None, "llama_cpp_max_difference": None, "llama_cpp_other_prompts": None}
    version = importlib.metadata.version("xllamacpp")
    n = len(log_probabilities)
    chats = [prompt.messages for prompt in prompts]
    theirs = llama_cpp.compute(file, TEXT, ids[:n], n // 2, chats=chats, threads=torch.get_num_threads())
    if theirs.tokens != list(ids):
        raise ValueError(
            f"the GGUF file is wrong: llama.cpp (xllamacpp {version}) encodes a text of {len(ids)} tokens as "
            f"{len(theirs.tokens)} others; nothing was written. Please report it"
        )
    difference = largest_difference(log_probabilities, theirs.predictions)
    _refuse_beyond(bound, difference, f"llama.cpp (xllamacpp {version}) computes from it")
    others = sum(tokens != prompt.ids for tokens, prompt in zip(theirs.chats, prompts, strict=True))
    found = {"llama_cpp_max_difference": difference, "llama_cpp_other_prompts": others}
    return {"bound": bound, "xllamacpp": version, **found}


def largest_difference(log_probabilities: Tensor, theirs: Sequence[llama_cpp.Prediction]) -> float:
    """Between ours (T, V) and llama.cpp's of its likeliest tokens; 0 without predictions."""
    return max(
        (
            abs(log_probabilities[prediction.at - 1, token].item() - value)
            for prediction in theirs
            for token, value in prediction.top.items()
        ),
        default=0.0,
    )


def _refuse_beyond(bound: float, difference: float, who: str) -> None:
    if not difference <= bound:
        raise ValueError(
            f"the GGUF file is wrong: {who} log-probabilities that differ by {difference:.2g}, and the bound is "
            f"{bound:.2g}; nothing was written. Please report it"
        )
