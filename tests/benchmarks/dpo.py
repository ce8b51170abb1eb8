"""Preference tuning at 124M: the book's pairs, ours through a real Trainer, TRL's DPOTrainer, the book's loop.

    python tests/benchmarks/run.py dpo [--quick]
    python tests/benchmarks/dpo.py --model smollm2        SmolLM2-135M's sizes, without the book

All start from the same random weights and read the same batches of 8 in the same order: training pairs of
instruction-data-with-preference.json (from $LLM_LIGHTNING_DATA; without it, downloaded), the alpaca template, the ends
of answers scored, beta 0.1, AdamW with lr 5e-6 and weight decay 0.01. Batches hold pairs of similar length, our
default, which helps whoever pads.

- `copy`, `cached`: DPOModule as it is by default (bf16-mixed, packed), with a frozen copy as the reference, or with its
  log-probabilities computed before the first step. `adapter_off`: LoRA of rank 16; the reference is without it.
- `trl`, `trl_cached`, `trl_lora`: DPOTrainer with fp32 weights under bf16 autocast, as ours, and the same three
  references. `trl_bf16`, `trl_bf16_cached`: bf16 weights and optimizer state, which lose small updates.
- `book`: its fp32 `GPTModel` (an untied head: 163M) and its four forward passes a batch, with its loss (the mean per
  token), without clipping.

The first two batches are warm-up; time counts from the end of the second to the end of the last, so that what is
computed before the first step is in no figure.
"""

from __future__ import annotations

import argparse
import copy as copies
import json
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from clocked import SHARED_ARGUMENTS, Clock, clocked, train_ours
from contest import Run, peak_mib, ratio, run_rounds, write_results
from sft import as_book
from sizes import REHEARSAL, config_of, theirs_from

BATCH, VOCABULARY, CONTEXT, END_OF_TEXT = 2 if REHEARSAL else 8, 50257, 1024, 50256
LR, WEIGHT_DECAY, BETA, RANK = 5e-6, 0.01, 0.1, 16
WARMUP_BATCHES, BATCHES, QUICK_BATCHES, BOOK_BATCHES = 2, 32, 8, 6
SETTINGS = {"batch": f"{BATCH} pairs", "beta": BETA, "rank": RANK}
HELD_OUT = 2
"""Pairs behind those that are read, because a data module wants some to validate and to test on."""


def main() -> None:
    """Run all contenders in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of six batches")
    parser.add_argument("--model", choices=["gpt2", "smollm2"], default="gpt2")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, options.folder)))
        return
    n_rounds, batches = (1, QUICK_BATCHES) if options.quick else (3, BATCHES)
    names = [name for name in CONTENDERS if name != "book" or options.model == "gpt2"]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), batches, options.model)
        rounds = run_rounds(__file__, names, n_rounds, ["--folder", folder])
    name = "dpo" + "_smollm2" * (options.model == "smollm2")
    report(rounds, name, SETTINGS | {"model": options.model, "batches_measured": batches - WARMUP_BATCHES})


def report(rounds: list[dict[str, Run]], name: str, settings: dict[str, Any]) -> None:
    """Ours over each peer."""
    ratios = {}
    for mine, peer in (
        ("copy", "book"),
        ("copy", "trl"),
        ("copy", "trl_bf16"),
        ("cached", "trl_cached"),
        ("cached", "trl_bf16_cached"),
        ("adapter_off", "trl_lora"),
        ("cached", "copy"),
    ):
        if peer not in rounds[0]:
            continue
        whose = f"{mine} to {peer}"
        ratios[f"times the pairs/s: {whose}"] = ratio(rounds, mine, peer, "pairs_per_second")
        ratios[f"of the peak memory: {whose}"] = ratio(rounds, mine, peer, "peak_mib_above_imports")
    write_results(name, settings, rounds, ratios)


def measure(name: str, folder: Path) -> Run:
    """Run one contender, which returns its memory after imports and the end and loss of every batch."""
    warnings.filterwarnings("ignore")
    batches = len(read_rows(folder)) // BATCH
    if name == "book":
        batches = min(batches, BOOK_BATCHES)
    baseline, clock = CONTENDERS[name](folder, batches)
    peak = peak_mib() - baseline
    measured = batches - WARMUP_BATCHES
    seconds = clock.wall[batches - 1] - clock.wall[WARMUP_BATCHES - 1]
    tokens = sum(row["n_scored"] for row in read_rows(folder)[WARMUP_BATCHES * BATCH : batches * BATCH])
    return {
        "pairs_per_second": measured * BATCH / seconds,
        "tokens_per_second": tokens / seconds,
        "seconds_per_batch": seconds / measured,
        "cpu_seconds_per_batch": (clock.cpu[batches - 1] - clock.cpu[WARMUP_BATCHES - 1]) / measured,
        "first_loss": clock.losses[0],
        "last_loss_of_the_book": clock.losses[min(batches, BOOK_BATCHES) - 1],
        "peak_mib_above_imports": peak,
    }


def prepare(folder: Path, batches: int, model: str = "gpt2") -> None:
    """Write random weights as a folder of transformers', and the pairs of our first batches for everyone."""
    import torch

    from llm_lightning.data.preference import PreferenceDataModule
    from llm_lightning.models.gpt import GPT
    from llm_lightning.tokenizers.build import build_tokenizer
    from llm_lightning.weights.hf_export import export_hf

    tokenizer = build_tokenizer("gpt2")
    torch.manual_seed(0)
    config = config_of(model)
    export_hf(GPT(config), config, tokenizer, folder / "model")
    shared = os.environ.get("LLM_LIGHTNING_DATA")
    path = str(Path(shared) / "instruction-data-with-preference.json") if shared else None
    data = PreferenceDataModule(
        tokenizer=tokenizer, context_length=CONTEXT, batch_size=BATCH, split="order", name="book_preferences", path=path
    )
    data.build()
    chosen = [index for n in range(batches) for index in data.expected_samples(0, n)]
    samples = [data.train_samples[index] for index in chosen]
    records = data.records["train"]
    rows = [
        {
            "prompt": tokenizer.decode(sample.prompt_ids.tolist()),
            "chosen": records[sample.sample_id].turns[-1].response,
            "rejected": records[sample.sample_id].rejected,
            "n_scored": len(sample.chosen_ids) + len(sample.rejected_ids),
        }
        for sample in samples
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    pairs = [records[sample.sample_id].record for sample in samples]
    held_out = [one.record for one in data.records["val"] if not one.has_equal_answers][:HELD_OUT]
    (folder / "pairs.json").write_text(json.dumps(pairs + held_out))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """What `prepare` wrote for the peers."""
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return rows


def ours(folder: Path, batches: int, *, reference: str) -> tuple[float, Clock]:
    """Train a DPOModule with a Trainer."""
    from llm_lightning.data.preference import PreferenceDataModule
    from llm_lightning.models.lora import LoRAConfig
    from llm_lightning.optim.adamw import AdamWConfig
    from llm_lightning.optim.schedules import ConstantConfig
    from llm_lightning.tasks.dpo import DPOModule
    from llm_lightning.tokenizers.build import build_tokenizer
    from llm_lightning.weights.load import load_model

    os.environ["LLM_LIGHTNING_CACHE"] = str(folder / "cache" / str(os.getpid()))
    tokenizer = build_tokenizer("gpt2")
    tokenizer.encode("warm")
    baseline, clock = peak_mib(), Clock()

    part = 1 / len(json.loads((folder / "pairs.json").read_text()))
    data = PreferenceDataModule(
        tokenizer=tokenizer, context_length=CONTEXT, batch_size=BATCH, path=str(folder / "pairs.json"), split="order",
        val_fraction=part, test_fraction=part, shuffle=False, bucket=False, eval_batches=0,
    )  # fmt: skip
    data.build()
    module = DPOModule(
        model=load_model(folder / "model").gpt,
        tokenizer=tokenizer,
        optimizer=AdamWConfig(lr=LR, weight_decay=WEIGHT_DECAY),
        scheduler=ConstantConfig(),
        beta=BETA,
        reference=reference,
        lora=LoRAConfig(rank=RANK, alpha=RANK) if reference == "adapter_off" else None,
    )
    train_ours(module, data, clock, batches)
    return baseline, clock


def trl(
    folder: Path, batches: int, *, pure_bf16: bool = False, cached: bool = False, lora: bool = False
) -> tuple[float, Clock]:
    """Train transformers' model with a DPOTrainer.

    Its defaults, but for gradient checkpointing, which costs time: SDPA, fused AdamW, clipping, and log-probabilities
    computed in chunks of the head.
    """
    import torch
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    names = ("prompt", "chosen", "rejected")
    rows = [{name: row[name] for name in names} for row in read_rows(folder)[: batches * BATCH]]
    disable_progress_bars()
    baseline, clock = peak_mib(), Clock()

    dtype = torch.bfloat16 if pure_bf16 else torch.float32
    model = theirs_from(folder / "model", dtype)
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear") if lora else None
    trainer = clocked(DPOTrainer, clock)(
        model=model,
        args=DPOConfig(
            **SHARED_ARGUMENTS, output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, learning_rate=LR,
            weight_decay=WEIGHT_DECAY, beta=BETA, max_length=CONTEXT, precompute_ref_log_probs=cached,
            bf16=not pure_bf16,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=adapters,
    )  # fmt: skip
    trainer.train()
    return baseline, clock


def book(folder: Path, batches: int) -> tuple[float, Clock]:
    """Train the book's GPTModel as its DPO notebook does: both models on both answers, each padded to the longest."""
    import torch
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import load_weights_into_gpt
    from safetensors.torch import load_file
    from torch.nn.functional import logsigmoid
    from torch.nn.utils.rnn import pad_sequence

    from llm_lightning.tokenizers.build import build_tokenizer

    tokenizer = build_tokenizer("gpt2")
    rows = read_rows(folder)[: batches * BATCH]
    baseline, clock = peak_mib(), Clock()
    policy = GPTModel(
        {
            "vocab_size": VOCABULARY, "context_length": CONTEXT, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
            "drop_rate": 0.0, "qkv_bias": True,
        }
    )  # fmt: skip
    (weights,) = (folder / "model").glob("*.safetensors")
    load_weights_into_gpt(policy, as_book(load_file(weights)))
    reference = copies.deepcopy(policy).eval()
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def log_probs(model: Any, ids: Any, is_scored: Any) -> Any:
        picked = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (picked * is_scored[:, 1:]).sum(1) / is_scored[:, 1:].sum(1)

    for start in range(0, len(rows), BATCH):
        sequences, masks = [], []
        for side in ("chosen", "rejected"):
            for row in rows[start : start + BATCH]:
                prompt = tokenizer.encode(row["prompt"])
                ids = torch.tensor([*prompt, *tokenizer.encode(row[side]), END_OF_TEXT])
                sequences.append(ids)
                masks.append(torch.arange(len(ids)) >= len(prompt))
        chosen, rejected = pad_sequence(sequences, True, END_OF_TEXT).split(BATCH)
        chosen_mask, rejected_mask = pad_sequence(masks, True, False).split(BATCH)
        policy_ratio = log_probs(policy, chosen, chosen_mask) - log_probs(policy, rejected, rejected_mask)
        with torch.no_grad():
            reference_ratio = log_probs(reference, chosen, chosen_mask) - log_probs(reference, rejected, rejected_mask)
        loss = -logsigmoid(BETA * (policy_ratio - reference_ratio)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.tick(loss.item())
    return baseline, clock


CONTENDERS: dict[str, Any] = {
    "copy": partial(ours, reference="copy"),
    "cached": partial(ours, reference="cached"),
    "adapter_off": partial(ours, reference="adapter_off"),
    "trl": trl,
    "trl_cached": partial(trl, cached=True),
    "trl_lora": partial(trl, lora=True),
    "trl_bf16": partial(trl, pure_bf16=True),
    "trl_bf16_cached": partial(trl, pure_bf16=True, cached=True),
    "book": book,
}


if __name__ == "__main__":
    main()
