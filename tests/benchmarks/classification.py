"""Chapter 6 at 124M: five epochs of finetuning on spam, `python train.py` beside the book's own loop.

    python tests/benchmarks/run.py classification [--quick]

All start from the same random weights and train the last block, final norm and head on the book's split of the SMS
Spam Collection (from $LLM_LIGHTNING_DATA; without it, of the embedded messages), batch 8, with the book's validations.

- `ours`: task=classification as it is by default: no padding, batches by length, the last real token; frozen blocks in
  bf16, computed once. `ours_again`: a second job, with another seed.
- `ours_as_book`: experiment=book/ch06, the book's padding to 120 tokens and last position.
- `book`: its SpamDataset, GPTModel and train_classifier_simple, fp32.

Seconds count from after the imports to the end of training: reading weights and data, frozen blocks, validations; for
ours also checkpoints, logs, plots and the test split.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from contest import Run, peak_mib, ratio, run_child, write_results

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val", "test")
IMPORTED = (
    "hydra", "lightning", "matplotlib.backends.backend_agg", "pandas", "safetensors.torch", "torch.utils.tensorboard",
    "llm_lightning.experiments.run", "llm_lightning.data.classification", "llm_lightning.tasks.classification",
)  # fmt: skip


def main() -> None:
    """Run all contenders in turn, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch of the book's, whose epochs all take as long")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, options.folder, options.epochs)))
        return
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            names = list(CONTENDERS) if number % 2 == 0 else ["book", *(name for name in CONTENDERS if name != "book")]
            one = {}
            for name in names:
                epochs = 1 if options.quick and name == "book" else 5
                one[name] = run_child(__file__, name, ["--folder", folder, "--epochs", str(epochs)])
            rounds.append({name: one[name] for name in CONTENDERS})
    report(
        rounds,
        {"parameters": "124M", "batch": 8, "epochs": 5, "epochs_of_the_book_measured": 1 if options.quick else 5},
    )


def report(rounds: list[dict[str, Run]], settings: dict[str, Any]) -> None:
    """The book over ours."""
    ratios = {}
    for name in ("ours", "ours_again", "ours_as_book"):
        ratios[f"times less time than the book: {name}"] = ratio(rounds, "book", name, "seconds_of_five_epochs")
        ratios[f"of the book's peak memory: {name}"] = ratio(rounds, name, "book", "peak_mib_above_imports")
        ratios[f"times less time in epoch 2 than in epoch 1: {name}"] = sorted(
            one[name]["epoch_1"] / one[name]["epoch_2"] for one in rounds
        )[len(rounds) // 2]
    write_results("classification", settings, rounds, ratios)


def measure(name: str, folder: Path, epochs: int) -> Run:
    """Run one contender, which returns its memory after imports and the seconds of the whole and of epochs 1 and 2."""
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        baseline, whole, by_epoch = CONTENDERS[name](folder, epochs)
    n_texts = 1040 if (folder / "messages.tsv").exists() else 248
    return {
        "tokens_per_second": n_texts * 30 * epochs / whole,  # real tokens, about; the training texts have 30 each
        "seconds": whole,
        "seconds_of_five_epochs": whole * 5 / epochs,
        "epoch_1": by_epoch[0],
        "epoch_2": by_epoch[1] if len(by_epoch) > 1 else by_epoch[0],
        "peak_mib_above_imports": peak_mib() - baseline,
    }


def prepare(folder: Path) -> None:
    """Write random weights in GPT-2's layout, and the texts, as a table each of the book's and for us."""
    import torch
    from safetensors.torch import save_file

    from llm_lightning.models.gpt import GPT, GPTConfig
    from llm_lightning.weights.families.gpt2 import to_hf

    torch.manual_seed(0)
    state = to_hf(GPT(GPTConfig()).state_dict(), GPTConfig())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "gpt2.safetensors")
    if data := os.environ.get("LLM_LIGHTNING_DATA"):
        (folder / "messages.tsv").write_bytes((Path(data) / "SMSSpamCollection.tsv").read_bytes())
    write_splits(folder)


def write_splits(folder: Path) -> None:
    """train.csv, val.csv, test.csv in the book's form, from our split, which is the book's own."""
    import pandas

    from llm_lightning.data.classification import ClassificationDataModule
    from llm_lightning.tokenizers.build import build_tokenizer

    messages = folder / "messages.tsv"
    named = {"name": "sms_spam", "path": str(messages), "split": "book"} if messages.exists() else {}
    data = ClassificationDataModule(tokenizer=build_tokenizer("gpt2"), context_length=1024, batch_size=8, **named)
    data.build()
    for split in SPLITS:
        rows = [(data.labels.index(label), text) for text, label in data.split_of(split)]
        pandas.DataFrame(rows, columns=["Label", "Text"]).to_csv(folder / f"{split}.csv", index=False)


def train(folder: Path, name: str, arguments: list[str]) -> tuple[float, float, list[float]]:
    """`python train.py ARGUMENTS` in this process."""
    for module in IMPORTED:
        import_module(module)
    from llm_lightning.experiments.launch import main as train_main
    from llm_lightning.tokenizers.build import build_tokenizer

    build_tokenizer("gpt2").encode("warm")  # as for the book's loop
    baseline, clock = peak_mib(), folder / f"{name}.json"
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["LLM_LIGHTNING_CACHE"] = str(folder / "cache")
    messages = folder / "messages.tsv"
    data = [f"data.path={messages}"] if messages.exists() else ["data.name=short_messages", "data.split=grouped"]
    sys.argv = [
        "train.py", "experiment=book/ch06", f"init_from={folder / 'gpt2.safetensors'}", *data, *arguments,
        f"hydra.run.dir={folder / name}", "trainer.enable_progress_bar=false", "trainer.precision=bf16-mixed",
        "allow_targets=[epoch_clock]", "+callbacks.clock._target_=epoch_clock.EpochClock",
        f"+callbacks.clock.path={clock}",
    ]  # fmt: skip
    start = time.perf_counter()
    train_main(ROOT / "train.py")
    return baseline, time.perf_counter() - start, json.loads(clock.read_text())


DEFAULTS = ["task.pooling=last", "data.pad_to=null", "data.bucket=true", "optimizer.decay=matrices"]


def ours(folder: Path, epochs: int) -> tuple[float, float, list[float]]:
    """The book's recipe, without its padding."""
    return train(folder, "ours", [*DEFAULTS, f"trainer.max_epochs={epochs}"])


def ours_again(folder: Path, epochs: int) -> tuple[float, float, list[float]]:
    """Another job of a sweep: what frozen blocks give is there."""
    return train(folder, "ours_again", [*DEFAULTS, "seed=124", f"trainer.max_epochs={epochs}"])


def ours_as_book(folder: Path, epochs: int) -> tuple[float, float, list[float]]:
    """The book's recipe, pads and all."""
    return train(folder, "ours_as_book", [f"trainer.max_epochs={epochs}"])


def book(folder: Path, epochs: int) -> tuple[float, float, list[float]]:
    """The lines of the book's chapter 6."""
    import pandas  # noqa: F401
    import torch
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import load_weights_into_gpt  # noqa: F401
    from llms_from_scratch.ch06 import SpamDataset, train_classifier_simple
    from torch.utils.data import DataLoader

    from llm_lightning.tokenizers.build import build_tokenizer

    encoding = build_tokenizer("gpt2").encoding  # type: ignore[attr-defined]
    encoding.encode("warm")
    baseline, start = peak_mib(), time.perf_counter()
    torch.manual_seed(123)
    sets = {"train": SpamDataset(folder / "train.csv", encoding)}
    sets |= {"val": SpamDataset(folder / "val.csv", encoding, max_length=sets["train"].max_length)}
    loader = DataLoader(sets["train"], batch_size=8, shuffle=True, drop_last=True)
    val_loader = DataLoader(sets["val"], batch_size=8)
    settings = {
        "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
        "drop_rate": 0.0, "qkv_bias": True,
    }  # fmt: skip
    model = GPTModel(settings)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.out_head = torch.nn.Linear(768, 2)
    for part in (model.trf_blocks[-1], model.final_norm):
        for parameter in part.parameters():
            parameter.requires_grad = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    ends: list[float] = []
    device = torch.device("cpu")
    for _ in range(epochs):
        train_classifier_simple(model, loader, val_loader, optimizer, device, num_epochs=1, eval_freq=50, eval_iter=5)
        ends.append(time.perf_counter())
    by_epoch = [end - before for before, end in zip([start, *ends], ends, strict=False)]
    return baseline, ends[-1] - start, by_epoch


CONTENDERS: dict[str, Callable[[Path, int], tuple[float, float, list[float]]]] = {
    "ours": ours,
    "ours_again": ours_again,
    "ours_as_book": ours_as_book,
    "book": book,
}


if __name__ == "__main__":
    main()
