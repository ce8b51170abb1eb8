"""Instruction tuning at 124M: an epoch of the book's records, ours through a real Trainer, TRL's, the book's loop.

    python tests/benchmarks/run.py sft [--quick] [--shuffled]
    python tests/benchmarks/sft.py --model smollm2        SmolLM2-135M's sizes, without the book

All start from the same random weights and read the same batches of 8 in the same order: the book's 935 training
records of instruction-data.json (from $LLM_LIGHTNING_DATA; without it, downloaded), the alpaca template, only the
answers and their ends learnt, AdamW with lr 5e-5 and weight decay 0.1. Batches hold records of similar length, our
default, which leaves 5% padding and so helps whoever pads; with `--shuffled` they are a plain shuffle, the default of
TRL and the book, and 19% are padding.

- `ours`: SFTModule as it is by default: bf16-mixed, clipping, records packed end to end. `ours_padded`: not packed.
- `trl_autocast`: SFTTrainer with fp32 weights under bf16 autocast, as ours; it clips as ours does. This is the peer.
  `trl_bf16`: bf16 weights and optimizer state, which take less memory but lose small updates, so that its loss falls
  behind; it has not been faster either. See `trl` for its settings.
- `book`: its fp32 `GPTModel` (an untied head: 163M), collate function and loop, with the mask of its exercise 7.2, the
  response header masked, too. Its chapter 7 does not clip, which is why its first losses from random weights are a
  little higher: with clipping they are ours to 1 in 5,000. 15 batches are measured, and scaled to an epoch.

The first two batches are warm-up; time counts from the end of the second to the end of the last. Tokens are those that
are learnt. `loss` is the mean per learnt token over all measured batches, `loss_at_first` over those that the book
reads, too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clocked import SHARED_ARGUMENTS, Clock, clocked, train_ours
from contest import Run, peak_mib, ratio, run_rounds, write_results
from sizes import REHEARSAL, config_of, theirs_from

BATCH, VOCABULARY, CONTEXT, END_OF_TEXT = 2 if REHEARSAL else 8, 50257, 1024, 50256
LR, WEIGHT_DECAY = 5e-5, 0.1
WARMUP_BATCHES, BATCHES, QUICK_BATCHES, BOOK_BATCHES = 2, 117, 8, 17
SETTINGS = {"records": 935, "batch": BATCH}
IGNORE_INDEX = -100

Batch = list[dict[str, list[int]]]
"""Records: `input_ids` with their end, and a `completion_mask` as long, 1 where a token is learnt."""


Contender = Callable[[Path, int, bool], tuple[float, Clock]]
"""Folder, batches, shuffled -> memory after imports, and the times."""


def main() -> None:
    """Run all contenders in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of six batches")
    parser.add_argument("--shuffled", action="store_true", help="batches of any lengths")
    parser.add_argument("--model", choices=["gpt2", "smollm2"], default="gpt2")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, options.folder, options.batches, options.shuffled)))
        return
    n_rounds, batches = (1, QUICK_BATCHES) if options.quick else (3, BATCHES)
    names = [name for name in CONTENDERS if name != "book" or options.model == "gpt2"]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.shuffled, options.model)
        shared = ["--folder", folder, "--batches", str(batches), *(["--shuffled"] if options.shuffled else [])]
        rounds = run_rounds(__file__, names, n_rounds, shared)
    measured = {
        "order": "shuffled" if options.shuffled else "by length",
        "batches_measured": batches - WARMUP_BATCHES,
        "of_the_book": min(batches, BOOK_BATCHES) - WARMUP_BATCHES,
    }
    name = "sft" + "_smollm2" * (options.model == "smollm2") + "_shuffled" * options.shuffled
    report(rounds, name, SETTINGS | {"model": options.model} | measured)


def report(rounds: list[dict[str, Run]], name: str, settings: dict[str, Any]) -> None:
    """Ours over each peer."""
    ratios = {}
    for mine, peer in (
        ("ours", "trl_autocast"),
        ("ours", "trl_bf16"),
        ("ours", "book"),
        ("ours_padded", "trl_autocast"),
        ("ours", "ours_padded"),
    ):
        if peer not in rounds[0]:
            continue
        whose = f"{mine} to {peer}"
        ratios[f"times the records/s: {whose}"] = ratio(rounds, mine, peer, "records_per_second")
        ratios[f"of the peak memory: {whose}"] = ratio(rounds, mine, peer, "peak_mib_above_imports")
        ratios[f"of the loss at first: {whose}"] = ratio(rounds, mine, peer, "loss_at_first")
    write_results(name, settings, rounds, ratios)


def measure(name: str, folder: Path, batches: int, shuffled: bool) -> Run:
    """Run one contender, which returns its memory after imports and the end and loss of every batch."""
    warnings.filterwarnings("ignore")
    if name == "book":
        batches = min(batches, BOOK_BATCHES)
    baseline, clock = CONTENDERS[name](folder, batches, shuffled)
    peak = peak_mib() - baseline
    measured = read_batches(folder)[WARMUP_BATCHES:batches]
    targets = [sum(sum(record["completion_mask"]) for record in batch) for batch in measured]
    seconds = clock.wall[batches - 1] - clock.wall[WARMUP_BATCHES - 1]
    records = sum(map(len, measured))
    losses = clock.losses[WARMUP_BATCHES:batches]
    return {
        "records_per_second": records / seconds,
        "tokens_per_second": sum(targets) / seconds,
        "seconds_per_epoch": SETTINGS["records"] / records * seconds,  # type: ignore[operator]
        "cpu_seconds_per_batch": (clock.cpu[batches - 1] - clock.cpu[WARMUP_BATCHES - 1]) / len(measured),
        "loss": weighted_mean(losses, targets),
        "loss_at_first": weighted_mean(losses[: BOOK_BATCHES - WARMUP_BATCHES], targets),
        "peak_mib_above_imports": peak,
    }


def weighted_mean(values: list[float], weights: list[int]) -> float:
    """Of as many as there are values."""
    pairs = list(zip(values, weights, strict=False))
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def prepare(folder: Path, shuffled: bool, model: str = "gpt2") -> None:
    """Write random weights as a folder of transformers', and the batches of our first epoch for the peers."""
    import torch

    from llm_lightning.models.gpt import GPT
    from llm_lightning.tokenizers.build import build_tokenizer
    from llm_lightning.weights.hf_export import export_hf

    torch.manual_seed(0)
    config = config_of(model)
    export_hf(GPT(config), config, build_tokenizer("gpt2"), folder / "model")
    data = instruction_data(bucket=not shuffled)
    epoch = [[data.train_samples[index] for index in data.expected_samples(0, n)] for n in range(BATCHES)]
    rows = [
        [{"input_ids": row.token_ids.tolist(), "completion_mask": row.is_target.astype(int).tolist()} for row in batch]
        for batch in epoch
    ]
    (folder / "batches.json").write_text(json.dumps(rows))


def read_batches(folder: Path) -> list[Batch]:
    """What `prepare` wrote."""
    batches: list[Batch] = json.loads((folder / "batches.json").read_text())
    return batches


def instruction_data(**options: Any) -> Any:
    """The book's records in the book's split."""
    from llm_lightning.data.instruction import InstructionDataModule
    from llm_lightning.tokenizers.build import build_tokenizer

    shared = os.environ.get("LLM_LIGHTNING_DATA")
    data = InstructionDataModule(
        tokenizer=build_tokenizer("gpt2"), context_length=CONTEXT, batch_size=BATCH, split="order",
        name="book_instructions", path=str(Path(shared) / "instruction-data.json") if shared else None, **options,
    )  # fmt: skip
    data.build()
    return data


def ours(folder: Path, batches: int, shuffled: bool, *, packing: bool | str = "auto") -> tuple[float, Clock]:
    """Train an SFTModule with a Trainer."""
    from llm_lightning.data.instruction import InstructionDataModule  # noqa: F401
    from llm_lightning.optim.adamw import AdamWConfig
    from llm_lightning.optim.schedules import ConstantConfig
    from llm_lightning.tasks.sft import SFTModule
    from llm_lightning.tokenizers.build import build_tokenizer
    from llm_lightning.weights.load import load_model

    build_tokenizer("gpt2").encode("warm")
    baseline, clock = peak_mib(), Clock()

    data = instruction_data(bucket=not shuffled, packing=packing)
    model = load_model(folder / "model").gpt
    module = SFTModule(
        model=model,
        tokenizer=data.tokenizer,
        optimizer=AdamWConfig(lr=LR, weight_decay=WEIGHT_DECAY),
        scheduler=ConstantConfig(),
    )
    train_ours(module, data, clock, batches)
    return baseline, clock


def trl(folder: Path, batches: int, shuffled: bool, *, pure_bf16: bool) -> tuple[float, Clock]:
    """Train transformers' model with an SFTTrainer.

    Its defaults, but for gradient checkpointing, which costs time: SDPA, fused AdamW, clipping, and its loss "nll",
    which never holds all logits ("chunked_nll" is its alias). Eager attention takes about as long at this length.
    Padding-free batches need FlashAttention, which a CPU has not.
    """
    import torch
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = [row for batch in read_batches(folder)[:batches] for row in batch]
    disable_progress_bars()
    baseline, clock = peak_mib(), Clock()

    model = theirs_from(folder / "model", torch.bfloat16 if pure_bf16 else torch.float32).train()
    # Texts are tokens already; of the tokenizer only the id of the padding is read.
    words = {**{f"{index}": index for index in range(END_OF_TEXT)}, "<|endoftext|>": END_OF_TEXT}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    trainer = clocked(SFTTrainer, clock)(
        model=model,
        args=SFTConfig(
            **SHARED_ARGUMENTS, output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, learning_rate=LR,
            weight_decay=WEIGHT_DECAY, completion_only_loss=True, packing=False, bf16=not pure_bf16,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return baseline, clock


def book(folder: Path, batches: int, shuffled: bool) -> tuple[float, Clock]:
    """Train the book's GPTModel by the lines of its train_model_simple."""
    import torch
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import calc_loss_batch, load_weights_into_gpt
    from llms_from_scratch.ch07 import custom_collate_fn
    from safetensors.torch import load_file

    rows = read_batches(folder)[:batches]
    baseline, clock = peak_mib(), Clock()
    model = GPTModel(
        {
            "vocab_size": VOCABULARY, "context_length": CONTEXT, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
            "drop_rate": 0.0, "qkv_bias": True,
        }
    )  # fmt: skip
    load_weights_into_gpt(model, as_book(load_file(folder / "model" / "model.safetensors")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    model.train()
    for batch in rows:
        # It appends the end of text itself.
        inputs, targets = custom_collate_fn([row["input_ids"][:-1] for row in batch], allowed_max_length=CONTEXT)
        for row, record in enumerate(batch):
            targets[row, : record["completion_mask"].index(1) - 1] = IGNORE_INDEX
        optimizer.zero_grad()
        loss = calc_loss_batch(inputs, targets, model, torch.device("cpu"))
        loss.backward()
        optimizer.step()
        clock.tick(loss.item())
    return baseline, clock


def as_book(state: dict[str, Any]) -> dict[str, Any]:
    """Weights in the tree that the book reads from OpenAI's files."""
    arrays = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in state.items()}
    blocks: list[dict[str, Any]] = [{} for _ in range(12)]
    for name, array in arrays.items():
        if not name.startswith("h."):
            continue
        _, number, *path, kind = name.split(".")
        place = blocks[int(number)]
        for part in path:
            place = place.setdefault(part, {})
        place["b" if kind == "bias" else "g" if path[0].startswith("ln") else "w"] = array
    outer = {"wte": "wte.weight", "wpe": "wpe.weight", "g": "ln_f.weight", "b": "ln_f.bias"}
    return {"blocks": blocks, **{theirs: arrays[name] for theirs, name in outer.items()}}


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "ours_padded": partial(ours, packing=False),
    "trl_autocast": partial(trl, pure_bf16=False),
    "trl_bf16": partial(trl, pure_bf16=True),
    "book": book,
}


if __name__ == "__main__":
    main()
