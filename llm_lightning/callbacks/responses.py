"""Answers of a finetuned model to the questions of the test split, with its best weights, at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from llm_lightning.files.atomic import write_atomically
from llm_lightning.inference.respond import answer, answered
from llm_lightning.metrics.answers import exact_match, most_frequent_answer_score
from llm_lightning.metrics.intervals import wilson_interval


class Responses(L.Callback):
    """Answer test questions greedily, into `responses.json` of the run folder, and log the share of exact matches.

    Args:
        max_records: answer the first ones of the split.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per batch.
    """

    def __init__(self, *, max_records: int = 200, max_new_tokens: int = 256, batch_size: int = 32) -> None:
        for name, value in (("max_records", max_records), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"callbacks.responses.{name}={value} must be at least 1")
        self.max_records = max_records
        self.answered: tuple[int, int] | None = None  # (answered, all) records
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "conversations_of"):
            return
        rows: list[dict[str, Any]] = []
        if trainer.is_global_zero or pl_module.is_sharded:  # sharded weights run in all processes together
            rows = answer_questions(pl_module, datamodule, "test", self.max_records, **self.options)
        if trainer.is_global_zero:
            self.answered = len(rows), len(datamodule.conversations_of("test"))
            path = Path(trainer.default_root_dir) / "responses.json"
            write_atomically(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
            metrics = {f"test/{name}": value for name, value in exact_match_metrics(rows).items()}
            pl_module.log_dict(metrics, logger=False, rank_zero_only=True)
            pl_module.log_row(metrics, pl_module.global_step)
        trainer.strategy.barrier()


def answer_questions(
    pl_module: Any, datamodule: Any, split: str, max_records: int, **options: Any
) -> list[dict[str, Any]]:
    """The first records of a split that leave room for an answer, each with its `model_response`.

    Args:
        pl_module: a task that is attached to its trainer.
        options: of `inference.respond.answer`.
    """
    length = pl_module.trunk.config.context_length
    template, tokenizer = datamodule.template, pl_module.tokenizer
    records = datamodule.conversations_of(split)
    records = [one for one in records if len(template.prompt_ids(tokenizer, one)) < length][:max_records]
    with pl_module.trainer.precision_plugin.forward_context():
        texts = answer(pl_module.trunk, tokenizer, template, records, **options)
    return [answered(one, {"model_response": text}) for one, text in zip(records, texts, strict=True)]


def exact_match_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share of exactly right answers, its interval, and the score of always giving the commonest answer.

    Args:
        rows: the result of `answer_questions`; without rows there are no metrics.
    """
    if not rows:
        return {}
    pairs = [(row["model_response"], row["output"]) for row in rows]
    right = sum(exact_match(response, reference) for response, reference in pairs)
    low, high = wilson_interval(right, len(pairs))
    return {
        "exact_match": right / len(pairs),
        "exact_match_low": low,
        "exact_match_high": high,
        "exact_match_of_most_frequent": most_frequent_answer_score([reference for _, reference in pairs])[1],
    }
