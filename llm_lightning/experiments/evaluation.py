"""Evaluate a tuned model (task=sft, task=dpo) on the splits of its data, as its run evaluated the test split.

The task is rebuilt from the checkpoint, with its reference, and a Trainer with the run's settings tests it: the same
batches through the same code give the numbers that the run printed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from llm_lightning.callbacks.responses import answer_questions, exact_match_metrics
from llm_lightning.data.conversations import ConversationDataModule
from llm_lightning.data.packing import may_share_prefix
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import ConstantConfig
from llm_lightning.tasks.base import TaskModule
from llm_lightning.tasks.dpo import DPOModule
from llm_lightning.tasks.reference import kind_of_earlier_version
from llm_lightning.tasks.sft import SFTModule
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.checkpoint import CheckpointError
from llm_lightning.weights.load import LoadedModel, resolve
from llm_lightning.weights.renamed import REMOVED

TASKS: dict[str, type[TaskModule]] = {"sft": SFTModule, "dpo": DPOModule}
"""Tasks by name; a class that a checkpoint names is never built."""
ANSWERED = {"max_records": 200, "max_new_tokens": 256, "batch_size": 32}
"""Options for the answers if a run of task=sft generated none itself."""
PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}


def evaluate_split(
    loaded: LoadedModel,
    data: ConversationDataModule[Any],
    split: str,
    *,
    checkpoint: str | Path,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Measure one split as the checkpoint's run measured its test split: loss, exact match, reward accuracy.

    Args:
        loaded: what `load_model(checkpoint)` returned.
        data: the data that the model was trained with, built.
        split: `train`, `val` or `test`.
        dtype: of the weights; default: the run's precision.

    Returns:
        the metrics by their names in `summary.json`, without the split; the number of `records` or `pairs` measured;
        and the number of `answers` compared.

    Raises:
        CheckpointError: if the checkpoint does not hold what its task needs.
    """
    config = loaded.header.get("config", {})
    module = rebuild_task(loaded, checkpoint)
    samples: Any = {"train": data.train_samples, **data.eval_samples, **data.test_samples}[split]
    data.seed, data.num_workers, data.test_samples = int(config.get("seed") or 0), 0, {split: samples}
    data.share_prefix = may_share_prefix(loaded.header["model"], loaded.header.get("lora"))
    data.choose_layout()  # from the batches of the run's seed, as in training
    answers = _Answers(split, _answered_as(loaded.header))
    device = next(loaded.model.parameters()).device
    settings = config.get("trainer", {})
    with _quiet(), _deterministic():
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision=PRECISIONS[dtype] if dtype else settings.get("precision", "32-true"),  # type: ignore[arg-type]
            deterministic=settings.get("deterministic", True),
            callbacks=[answers],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.test(module, datamodule=data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics = {name.removeprefix(f"{split}/"): value for name, value in logged.items() if name.startswith(f"{split}/")}
    return {**metrics, **answers.counts, data.samples_are: len(samples)}


def rebuild_task(loaded: LoadedModel, checkpoint: str | Path) -> TaskModule:
    """The task module of a checkpoint, with its reference.

    An adapter file holds no reference; its reference is the base without the adapter, as at the start of its run.
    """
    header, path = loaded.header, resolve(checkpoint)
    assert path is not None, "weights of others name no task"
    try:
        options = {key: value for key, value in header["config"]["task"].items() if key != "_target_"}
        if "loss" in options:
            options["loss"] = REMOVED.get(("task.loss", options["loss"]), options["loss"])
        stored = {} if "base" in header else checkpoints.load(path, mmap=True)
        state = stored.get("state_dict") or {f"model.{k}": v for k, v in loaded.model.state_dict().items()}
        if "reference" in options:
            state = {name: tensor for name, tensor in state.items() if not name.endswith(".reference")}
            options["reference"] = kind_of_earlier_version(options["reference"], is_adapter="base" in header)
        with torch.random.fork_rng(devices=[]):
            module = TASKS[header["task"]](
                model=GPT(GPTConfig(**header["model"]), init="torch"),
                tokenizer=loaded.tokenizer,
                optimizer=AdamWConfig(),
                scheduler=ConstantConfig(),
                lora=LoRAConfig(**header["lora"]) if header.get("lora") else None,
                **options,
            )
        if isinstance(module, DPOModule):
            module.reference_provider.load(stored)
            own = module.state_dict()
            for name in [name for name in state if name.startswith("reference.")]:
                state[name] = state[name][: len(own[name])]  # earlier versions' references may have more positions
        module.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} does not hold what its task needs ({type(error).__name__}: {reason}); use another checkpoint of "
            "the run"
        ) from error
    return module


def _answered_as(header: dict[str, Any]) -> dict[str, Any] | None:
    """The run's options for answering its test questions; None if it answered none and is not of task=sft."""
    own = (header.get("config", {}).get("callbacks") or {}).get("responses")
    if not own:
        return dict(ANSWERED) if header["task"] == "sft" else None
    return {key: own.get(key, default) for key, default in ANSWERED.items()}


class _Answers(L.Callback):
    """Measures what `callbacks.responses` does, but writes no file."""

    def __init__(self, split: str, options: dict[str, Any] | None) -> None:
        self.split, self.options = split, options
        self.counts: dict[str, int] = {}

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.options is None:
            return
        from tqdm import tqdm

        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        with tqdm(desc="answering", unit="answer", leave=False, disable=None) as bar:
            rows = answer_questions(
                pl_module, datamodule, self.split, **self.options, on_response=lambda *_: bar.update() and None
            )
        metrics = {f"{self.split}/{name}": value for name, value in exact_match_metrics(rows).items()}
        pl_module.log_dict(metrics, logger=False, rank_zero_only=True)
        self.counts = {"answers": len(rows)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages about devices and loaders."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Restore the process's choice of algorithms, which a Trainer changes."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
