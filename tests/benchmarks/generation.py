"""Greedy generation with 124M parameters: ours and transformers with their caches in bf16, the book's uncached loop.

    python tests/benchmarks/run.py generation [--quick]

Every contender continues prompts of 64 random tokens with random weights and never stops early; reading the prompt
counts. The book's `generate_text_simple` runs its own model in fp32 and makes as many tokens.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from contest import Run, peak_mib, ratio, run_rounds, timed, write_results

PROMPT, VOCABULARY = 64, 50257


def main() -> None:
    """Run all contenders in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of few tokens")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(CONTENDERS[options.contender], options.new_tokens)))
        return
    n_rounds, new_tokens = (1, 48) if options.quick else (5, 128)
    rounds = run_rounds(__file__, list(CONTENDERS), n_rounds, ["--new-tokens", str(new_tokens)])
    report(rounds, {"parameters": "124M", "prompt": PROMPT, "new_tokens": new_tokens})


def report(rounds: list[dict[str, Run]], settings: dict[str, Any]) -> None:
    """Ours over each peer."""
    ratios = {}
    for ours, peer in (
        ("ours_batch_1", "transformers_batch_1"),
        ("ours_batch_8", "transformers_batch_8"),
        ("ours_batch_1", "book_batch_1"),
    ):
        ratios[f"times the tokens/s: {ours} to {peer}"] = ratio(rounds, ours, peer, "tokens_per_second")
        ratios[f"of the peak memory: {ours} to {peer}"] = ratio(rounds, ours, peer, "peak_mib_above_imports")
    write_results("generation", settings, rounds, ratios)


def measure(contender: Callable[[int], tuple[float, int, Run]], new_tokens: int) -> Run:
    """Run one contender, which returns its memory after imports, the tokens made and the times."""
    warnings.filterwarnings("ignore")
    baseline, made, times = contender(new_tokens)
    peak = peak_mib() - baseline
    return {"tokens_per_second": made / times["seconds"], **times, "peak_mib_above_imports": peak}


def ours(new_tokens: int, *, batch: int) -> tuple[float, int, Run]:
    """`generate` with bf16 weights."""
    import torch

    from llm_lightning.inference.generation import generate
    from llm_lightning.models.gpt import GPT, GPTConfig

    baseline = peak_mib()
    model = GPT(GPTConfig()).bfloat16().eval()
    prompts = torch.randint(0, VOCABULARY, (batch, PROMPT)).tolist()
    generate(model, prompts, max_new_tokens=4)
    return baseline, batch * new_tokens, timed(lambda: generate(model, prompts, max_new_tokens=new_tokens), 2)


def transformers(new_tokens: int, *, batch: int) -> tuple[float, int, Run]:
    """`generate` of GPT2LMHeadModel with SDPA, its cache and bf16 weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    baseline = peak_mib()
    model = GPT2LMHeadModel(GPT2Config()).bfloat16().eval()
    prompts = torch.randint(0, VOCABULARY, (batch, PROMPT))

    def generate(n: int) -> None:
        mask = torch.ones_like(prompts)
        model.generate(
            prompts, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n, pad_token_id=0
        )

    generate(4)
    return baseline, batch * new_tokens, timed(lambda: generate(new_tokens), 2)


def book(new_tokens: int) -> tuple[float, int, Run]:
    """`generate_text_simple`: every step reads the whole text again."""
    import torch
    from llms_from_scratch.ch04 import GPTModel, generate_text_simple

    baseline = peak_mib()
    model = GPTModel(
        {
            "vocab_size": VOCABULARY, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
            "drop_rate": 0.0, "qkv_bias": False,
        }
    ).eval()  # fmt: skip
    prompt = torch.randint(0, VOCABULARY, (1, PROMPT))

    def generate(n: int) -> None:
        generate_text_simple(model, prompt, max_new_tokens=n, context_size=1024)

    generate(2)
    return baseline, new_tokens, timed(lambda: generate(new_tokens), 1)


CONTENDERS = {
    "ours_batch_1": partial(ours, batch=1),
    "transformers_batch_1": partial(transformers, batch=1),
    "ours_batch_8": partial(ours, batch=8),
    "transformers_batch_8": partial(transformers, batch=8),
    "book_batch_1": book,
}


if __name__ == "__main__":
    main()
