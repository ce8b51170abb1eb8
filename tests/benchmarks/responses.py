"""Answers to the book's 110 test prompts at 124M: ours, transformers with its cache, the book's uncached loop.

    python tests/benchmarks/run.py responses [--quick]

Greedy, 32 tokens each. Weights are random, and the end of text ends nothing, so that all write as many tokens; reading
the prompts counts. Prompts are those of instruction-data.json (from $LLM_LIGHTNING_DATA; without it, downloaded) in the
alpaca template.

- `ours`: `respond` with bf16 weights and its batches of 32 prompts of similar length; its answers are texts.
- `transformers_batch_32`, `transformers_batch_8`: `generate` of GPT2LMHeadModel with SDPA, its cache and bf16 weights,
  padded on the left, in the same order as ours; the faster of the two is the peer.
- `book`: `generate` of its chapter 5, fp32, one prompt at a time, every step reading the whole text again. Four prompts
  are measured and scaled to 110.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contest import Run, peak_mib, ratio, run_rounds, timed, write_results

PROMPTS, NEW_TOKENS, VOCABULARY, BOOK_PROMPTS = 110, 32, 50257, 4
SETTINGS = {"parameters": "124M", "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "prompts_of_the_book": BOOK_PROMPTS}

Contender = Callable[[int], tuple[float, int, Run]]
"""Repeats -> memory after imports, prompts answered, and the times."""


def main() -> None:
    """Run all contenders in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, in which all prompts are answered once")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(CONTENDERS[options.contender], options.repeats)))
        return
    n_rounds, repeats = (1, 1) if options.quick else (5, 2)
    report(run_rounds(__file__, list(CONTENDERS), n_rounds, ["--repeats", str(repeats)]), SETTINGS)


def report(rounds: list[dict[str, Run]], settings: dict[str, Any]) -> None:
    """Ours over transformers at its better batch size, and over the book."""
    better = max(
        ("transformers_batch_32", "transformers_batch_8"),
        key=lambda name: statistics.median(one[name]["tokens_per_second"] for one in rounds),
    )
    ratios = {}
    for peer in (better, "book"):
        ratios[f"times the tokens/s of {peer}"] = ratio(rounds, "ours", peer, "tokens_per_second")
        ratios[f"of the peak memory of {peer}"] = ratio(rounds, "ours", peer, "peak_mib_above_imports")
    write_results("responses", settings, rounds, ratios)


def measure(contender: Contender, repeats: int) -> Run:
    """Run one contender, which returns its memory after imports, how many prompts it answered, and the times."""
    warnings.filterwarnings("ignore")
    baseline, answered, times = contender(repeats)
    peak = peak_mib() - baseline
    share = PROMPTS / answered
    return {
        "tokens_per_second": answered * NEW_TOKENS / times["seconds"],
        "seconds_for_110_prompts": times["seconds"] * share,
        "cpu_seconds_for_110_prompts": times["cpu_seconds"] * share,
        "peak_mib_above_imports": peak,
    }


def test_conversations() -> tuple[Any, Any, list[Any]]:
    """Tokenizer, template and the conversations of the book's test split."""
    from llm_lightning.data.instruction import NAMED
    from llm_lightning.data.records.instruction import read_instructions
    from llm_lightning.data.splits import order_split
    from llm_lightning.data.templates.choose import choose_template
    from llm_lightning.files.download import download
    from llm_lightning.tokenizers.build import build_tokenizer

    shared = os.environ.get("LLM_LIGHTNING_DATA")
    path = Path(shared) / "instruction-data.json" if shared else download(NAMED["book_instructions"])
    records, _ = read_instructions(path)
    test = [records[index] for index in order_split(len(records), (0.05, 0.1))["test"]]
    assert len(test) == PROMPTS
    return build_tokenizer("gpt2"), choose_template("alpaca"), test


def prompts_by_length() -> list[list[int]]:
    """Token ids of all prompts, the longest first."""
    tokenizer, template, test = test_conversations()
    return sorted((template.prompt_ids(tokenizer, one) for one in test), key=len, reverse=True)


def ours(repeats: int) -> tuple[float, int, Run]:
    """`respond` with bf16 weights."""
    from llm_lightning.inference.respond import answer as respond
    from llm_lightning.models.gpt import GPT, GPTConfig

    tokenizer, template, test = test_conversations()
    tokenizer.eot_id = None  # nothing ends early
    baseline = peak_mib()
    model = GPT(GPTConfig()).bfloat16().eval()

    def answer(n: int) -> None:
        respond(model, tokenizer, template, test, max_new_tokens=n)

    answer(2)
    return baseline, PROMPTS, timed(lambda: answer(NEW_TOKENS), repeats)


def transformers(repeats: int, *, batch: int) -> tuple[float, int, Run]:
    """`generate` of GPT2LMHeadModel."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    prompts = prompts_by_length()
    baseline = peak_mib()
    model = GPT2LMHeadModel(GPT2Config()).bfloat16().eval()
    model.generation_config.eos_token_id = None  # nothing ends early
    batches = [padded_left(prompts[start : start + batch]) for start in range(0, PROMPTS, batch)]

    def answer(n: int) -> None:
        for ids, mask in batches:
            made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, pad_token_id=0)
            assert made.shape == (len(ids), ids.size(1) + n)

    with torch.inference_mode():
        answer(2)
        return baseline, PROMPTS, timed(lambda: answer(NEW_TOKENS), repeats)


def padded_left(prompts: list[list[int]]) -> tuple[Any, Any]:
    """Ids and mask, (B, T) each."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def book(repeats: int) -> tuple[float, int, Run]:
    """`generate` of chapter 5, for four prompts from the longest to the shortest."""
    import torch
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import generate

    prompts = prompts_by_length()
    # In the middle of each quarter: as long on average as all of them, about.
    chosen = [torch.tensor([prompts[(2 * n + 1) * PROMPTS // (2 * BOOK_PROMPTS)]]) for n in range(BOOK_PROMPTS)]
    baseline = peak_mib()
    model = GPTModel(
        {
            "vocab_size": VOCABULARY, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
            "drop_rate": 0.0, "qkv_bias": True,
        }
    ).eval()  # fmt: skip

    def answer(n: int) -> None:
        for prompt in chosen:
            generate(model, prompt, max_new_tokens=n, context_size=1024)

    answer(1)
    return baseline, BOOK_PROMPTS, timed(lambda: answer(NEW_TOKENS), 1)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "transformers_batch_32": partial(transformers, batch=32),
    "transformers_batch_8": partial(transformers, batch=8),
    "book": book,
}


if __name__ == "__main__":
    main()
