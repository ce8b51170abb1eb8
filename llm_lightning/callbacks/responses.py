"""What a finetuned model answers: the questions of the test split, with its best weights, at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from llm_lightning.answer_metrics import exact_match, most_frequent_answer_score, wilson_interval
from llm_lightning.atomic import write_atomically
from llm_lightning.responses import answered, respond


class Responses(L.Callback):
    """Answer test questions greedily: `responses.json` in the run folder, and the share of exact matches.

    Args:
        max_records: how many, the first ones of the split.
        max_new_tokens: per answer, at most.
        batch_size: questions at once.
    """

    def __init__(self, *, max_records: int = 200, max_new_tokens: int = 256, batch_size: int = 32) -> None:
        for name, value in (("max_records", max_records), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"callbacks.responses.{name}={value} must be at least 1")
        self.max_records = max_records
        self.answered: tuple[int, int] | None = None  # how many records, of how many
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if pl_module.is_sharded or not hasattr(datamodule, "conversations_of"):
            return  # sharded weights run in all processes together; `llm-lightning respond` answers from the checkpoint
        if trainer.is_global_zero:
            every = datamodule.conversations_of("test")
            length = pl_module.trunk.config.context_length
            template, tokenizer = datamodule.template, pl_module.tokenizer
            records = [one for one in every if len(template.prompt_ids(tokenizer, one)) < length][: self.max_records]
            self.answered = len(records), len(every)
            with trainer.precision_plugin.forward_context():
                texts = respond(pl_module.trunk, tokenizer, template, records, **self.options)
            rows = [answered(one, {"model_response": text}) for one, text in zip(records, texts, strict=True)]
            path = Path(trainer.default_root_dir) / "responses.json"
            write_atomically(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
            self._log(pl_module, [(row["model_response"], row["output"]) for row in rows])
        trainer.strategy.barrier()

    def _log(self, pl_module: Any, pairs: list[tuple[str, str]]) -> None:
        right = sum(exact_match(response, reference) for response, reference in pairs)
        low, high = wilson_interval(right, len(pairs))
        metrics = {
            "test/exact_match": right / len(pairs),
            "test/exact_match_low": low,
            "test/exact_match_high": high,
            "test/exact_match_of_most_frequent": most_frequent_answer_score([reference for _, reference in pairs])[1],
        }
        pl_module.log_dict(metrics, logger=False, rank_zero_only=True)
        pl_module.log_row(metrics, pl_module.global_step)
