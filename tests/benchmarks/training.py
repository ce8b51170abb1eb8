"""Training at 124M parameters, batch 4 x 256: ours through a real Trainer, the book's code, transformers.

    python tests/benchmarks/run.py training [--quick]

Ours: PretrainingModule, tied head, bf16-mixed, AdamW and clipping as configured by default. The book: its untied
163M `GPTModel` in fp32 with its loss and AdamW, as in its chapter 5. transformers: GPT2LMHeadModel with SDPA, fused
AdamW and clipping (what its Trainer uses), once under bf16 autocast and once with bf16 weights; the faster one is the
peer, though bf16 weights alone lose small updates. No dropout anywhere; random tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

from contest import Run, peak_mib, ratio, run_rounds, timed, write_results

BATCH, TIME, VOCABULARY = 4, 256, 50257
WARMUP_STEPS = 2
SETTINGS = {"parameters": "124M", "batch": f"{BATCH} x {TIME}"}

Contender = Callable[[int], tuple[float, Run]]
"""Steps -> memory after imports, and times per step."""


def contest_of(script: str, doc: str, contenders: Mapping[str, Contender], name: str, settings: dict[str, Any]) -> None:
    """Run all contenders in turn, or one of them in this process; the first is ours."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of three steps")
    parser.add_argument("--contender", choices=contenders, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(contenders[options.contender], options.steps)))
        return
    n_rounds, steps = (1, 3) if options.quick else (3, 5)
    rounds = run_rounds(script, list(contenders), n_rounds, ["--steps", str(steps)])
    report(rounds, name, settings | {"steps": steps})


def report(rounds: list[dict[str, Run]], name: str, settings: dict[str, Any]) -> None:
    """Ours over each peer."""
    ratios = {}
    for peer in (contender for contender in rounds[0] if contender != "ours"):
        ratios[f"times the tokens/s of {peer}"] = ratio(rounds, "ours", peer, "tokens_per_second")
        ratios[f"times less CPU time than {peer}"] = ratio(rounds, peer, "ours", "cpu_seconds")
        ratios[f"of the peak memory of {peer}"] = ratio(rounds, "ours", peer, "peak_mib_above_imports")
    write_results(name, settings, rounds, ratios)


def measure(contender: Contender, steps: int) -> Run:
    """Run one contender, which returns its memory after imports and its times per step."""
    warnings.filterwarnings("ignore")
    baseline, times = contender(steps)
    return {
        "tokens_per_second": BATCH * TIME / times["seconds"],
        **times,
        "peak_mib_above_imports": peak_mib() - baseline,
    }


def ours(steps: int) -> tuple[float, Run]:
    """Every weight is trained."""
    return train_ours(steps)


def train_ours(steps: int, config: Any = None, precision: str = "bf16-mixed", **options: Any) -> tuple[float, Run]:
    """Train a PretrainingModule (default: GPT-2 small) with a Trainer, and time it from update to update."""
    import lightning as L
    import torch

    from llm_lightning.data.base import BaseDataModule
    from llm_lightning.data.batches import Example, collate_padded
    from llm_lightning.models.gpt import GPT, GPTConfig
    from llm_lightning.optim.adamw import AdamWConfig
    from llm_lightning.optim.schedules import WarmupCosineConfig
    from llm_lightning.tasks.pretraining import PretrainingModule
    from llm_lightning.tokenizers.build import build_tokenizer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tokenizer = build_tokenizer("gpt2")
    config = config or GPTConfig()
    baseline = peak_mib()

    class RandomTokens(BaseDataModule):
        """As many random windows as the run reads."""

        eval_samples: dict[str, Any] = {}  # noqa: RUF012

        def build(self) -> None:
            ids = torch.randint(0, config.vocab_size, ((WARMUP_STEPS + steps) * BATCH, TIME + 1)).numpy()
            self.train_samples = [Example(i, row) for i, row in enumerate(ids)]  # type: ignore[assignment]

        def collate(self, samples: Any) -> Any:
            return collate_padded(samples, pad_id=0)

        def preview(self, n: int) -> str:
            return ""

        def describe(self) -> str:
            return ""

    class Clock(L.Callback):
        """Times of the ends of all steps."""

        def __init__(self) -> None:
            self.wall: list[float] = []
            self.cpu: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())

    data, clock = RandomTokens(batch_size=BATCH), Clock()
    data.build()
    module = PretrainingModule(
        model=GPT(config), tokenizer=tokenizer, optimizer=AdamWConfig(), scheduler=WarmupCosineConfig(), **options
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, precision=precision, deterministic=True, max_epochs=1, logger=False,
        callbacks=[clock], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    wall, cpu = clock.wall[WARMUP_STEPS - 1 :], clock.cpu[WARMUP_STEPS - 1 :]
    seconds = statistics.median(end - start for start, end in pairwise(wall))
    return baseline, {"seconds": seconds, "cpu_seconds": (cpu[-1] - cpu[0]) / steps}


def book(steps: int) -> tuple[float, Run]:
    """Train the book's GPTModel by the lines of its train_model_simple."""
    import torch
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import calc_loss_batch

    baseline = peak_mib()
    model = GPTModel(
        {
            "vocab_size": VOCABULARY, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
            "drop_rate": 0.0, "qkv_bias": False,
        }
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)

    def step() -> None:
        tokens = torch.randint(0, VOCABULARY, (BATCH, TIME + 1))
        optimizer.zero_grad()
        loss = calc_loss_batch(tokens[:, :-1], tokens[:, 1:], model, torch.device("cpu"))
        loss.backward()
        optimizer.step()

    timed(step, WARMUP_STEPS)
    return baseline, timed(step, steps)


def transformers_autocast(steps: int) -> tuple[float, Run]:
    """fp32 weights under bf16 autocast."""
    return transformers(steps, pure_bf16=False)


def transformers_bf16(steps: int) -> tuple[float, Run]:
    """Weights, gradients and optimizer state in bf16."""
    return transformers(steps, pure_bf16=True)


def transformers(steps: int, *, pure_bf16: bool) -> tuple[float, Run]:
    """Train a GPT2LMHeadModel as the Trainer of transformers does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    baseline = peak_mib()
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return baseline, train_theirs(model, VOCABULARY, steps, pure_bf16=pure_bf16)


def train_theirs(model: Any, vocabulary: int, steps: int, *, pure_bf16: bool) -> Run:
    """Time updates of a model of transformers, without a cache."""
    import torch

    model.train()
    model.config.use_cache = False
    if pure_bf16:
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        tokens = torch.randint(0, vocabulary, (BATCH, TIME))
        with nullcontext() if pure_bf16 else torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timed(step, WARMUP_STEPS)
    return timed(step, steps)


CONTENDERS = {
    "ours": ours,
    "book": book,
    "transformers_autocast": transformers_autocast,
    "transformers_bf16": transformers_bf16,
}


if __name__ == "__main__":
    contest_of(__file__, __doc__, CONTENDERS, "training", SETTINGS)
