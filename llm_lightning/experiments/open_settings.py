"""Settings that are open until the first weights are read, or the model's size is known.

    conf, command line -> null, auto -> take_from_weights, take_rate -> numbers in config.yaml and every checkpoint
                                     -> take_from_run, where the run goes on: what it chose when it began

With `init_from`, the weights say what the model is (`conf/model/_of_weights.yaml`): a null is theirs, and a value of
the command line, a task or an experiment counts where a run may choose it. `optimizer.lr=auto` is a row and a column of
`conf/optimizer/_rates.yaml`.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llm_lightning.experiments.ranks.launcher import is_main_process
from llm_lightning.experiments.run_records import Settings
from llm_lightning.models.gpt import FREE_FIELDS, GPTConfig
from llm_lightning.models.shapes import parameter_shapes
from llm_lightning.models.surgery import check_context
from llm_lightning.tasks.base import TaskModule
from llm_lightning.tokenizers.base import Tokenizer

AUTO = "auto"
MOST_CONTEXT = 1024
"""Longest input that a run takes from weights by itself: activations and logits grow with it."""
Rates = Mapping[str, Sequence[float]]
"""`optimizer.rates`: the bounds `up_to`, and for each row one rate more than there are bounds."""

log = logging.getLogger(__name__)


def take_from_run(settings: Settings, header: Mapping[str, Any]) -> None:
    """Fill open settings with what the run chose when it began.

    Args:
        header: of its checkpoint.
    """
    before = header["config"]
    for group in ("model", "tokenizer"):
        for key, value in settings[group].items():
            if value is None:
                settings[group][key] = before[group].get(key)
    if settings["optimizer"].get("lr") == AUTO:
        settings["optimizer"]["lr"] = before["optimizer"]["lr"]
    data = settings.get("data", {})
    if data.get("newlines") and "newlines" not in before.get("data", {}):
        data["newlines"] = "keep"  # as runs of earlier versions did


def take_from_weights(settings: Settings, own: GPTConfig, tokenizer: Tokenizer) -> None:
    """Fill open settings with what given weights bring; log typed ones that they overrule.

    Raises:
        ValueError: if `model.context_length` is longer than the weights have positions for.
    """
    model = settings["model"]
    if isinstance(model.get("context_length"), int):
        check_context(own, model["context_length"])
    for name, value in asdict(own).items():
        chosen = model.get(name)
        if chosen is None or (name not in FREE_FIELDS and not (name == "tied_head" and value)):
            if chosen not in (None, value) and name != "vocab_size":
                _say("model.%s=%s is ignored: the weights of init_from have %s", name, chosen, value)
            model[name] = value
            if name == "context_length" and value > MOST_CONTEXT:
                model[name] = MOST_CONTEXT
                _say("model.context_length=%d, although the weights allow %d: set it for more", MOST_CONTEXT, value)
    settings["tokenizer"]["name"] = tokenizer.describe()["name"]


def take_rate(settings: Settings, rates: Rates, task: type[TaskModule], model: GPTConfig) -> None:
    """Replace `optimizer.lr=auto` by the rate for the task, the size and adapters.

    Raises:
        ValueError: if the optimizer has no rates, or they are no table.
    """
    if settings["optimizer"].get("lr") != AUTO:
        return
    row = _row(rates, task) + ("_lora" if settings.get("lora") else "")
    if row == "pretraining" and settings.get("init_from"):
        row = "pretraining_continued"
    bounds, found = rates.get("up_to"), rates.get(row)
    if not bounds or not found:
        missing = "up_to" if found else row
        raise ValueError(f"optimizer.lr=auto: optimizer.rates has no {missing}; set optimizer.lr=NUMBER")
    if len(found) != len(bounds) + 1:
        raise ValueError(f"optimizer.rates.{row} has {len(found)} rates, but up_to divides {len(bounds) + 1} sizes")
    count = parameter_count(model)
    settings["optimizer"]["lr"] = found[bisect_left(bounds, count)]
    _say("optimizer.lr=%g: auto for %s and %s parameters", settings["optimizer"]["lr"], row, f"{count:,}")


def _say(message: str, *values: Any) -> None:
    if is_main_process():
        log.info(message, *values)


def _row(rates: Rates, task: type[TaskModule]) -> str:
    """The row of a task, or of the one that it is made from; pretraining's for others."""
    names = [str(vars(parent).get("task")) for parent in task.__mro__]
    return next((name for name in names if name in rates), "pretraining")


def parameter_count(config: GPTConfig) -> int:
    """Parameters of a GPT, a tied head counted once."""
    total = sum(map(math.prod, parameter_shapes(config).values()))
    return total - config.vocab_size * config.n_embd if config.tied_head else total
