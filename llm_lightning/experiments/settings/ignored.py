"""Settings that other settings make ineffective: the run logs one line for each typed one.

Settings that never have an effect are refused instead (`checks.SET_ELSEWHERE` and `NOTHING_READS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from llm_lightning.experiments.settings.nodes import dotted
from llm_lightning.experiments.settings.overrides import key_of

Values = Mapping[str, Any]
"""Dotted key -> value of one run."""


class Rule(NamedTuple):
    """Settings that nothing reads while something else holds."""

    keys: tuple[str, ...]
    """Patterns of keys."""
    holds: Callable[[Values], Any]
    because: str


def _is_off(node: str) -> Callable[[Values], bool]:
    return lambda values: values.get(node) is None


def _named_set(values: Values) -> bool:
    own = ("path", "hf_dataset", "mixture", "val_path", "test_path", "val_sets")
    return not any(values.get(f"data.{name}") for name in own)


def _has_own(split: str) -> Callable[[Values], bool]:
    """Whether a split has files, or a split of the hub, to itself."""

    def holds(values: Values) -> bool:
        of_hub = values.get("data.hf_dataset") is not None and values.get(f"data.hf_{split}_split") is not None
        return of_hub or values.get(f"data.{split}_path") is not None

    return holds


def _no_checkpoint_or_stop(values: Values) -> bool:
    return all(values.get(f"callbacks.{name}") is None for name in ("checkpoints", "early_stopping"))


def _no_warmup(values: Values) -> bool:
    return not values.get("scheduler.warmup")


def _one_batch(values: Values) -> Any:
    return values.get("trainer.fast_dev_run")


def _path_wins(values: Values) -> bool:
    return values.get("data.path") is not None and values.get("data.name") != "sms_spam"  # there it names a local copy


RULES = (
    Rule(("data.name",), _path_wins, "data.path takes precedence"),
    Rule(("data.name",), lambda v: v.get("data.hf_dataset") is not None, "data.hf_dataset takes precedence"),
    Rule(("data.name",), lambda v: v.get("data.mixture") is not None, "data.mixture takes precedence"),
    Rule(
        tuple(f"data.hf_{name}" for name in ("config", "split", "revision")),
        _is_off("data.hf_dataset"),
        "no data.hf_dataset",
    ),
    Rule(("data.val_fraction",), _has_own("val"), "data.val_path or data.hf_val_split gives the validation data"),
    Rule(("data.test_fraction",), _has_own("test"), "data.test_path or data.hf_test_split gives the test data"),
    Rule(
        ("data.text_field", "data.text_column", "data.label_column", "data.columns.*"),
        _named_set,
        "a named data set has its own fields; give data.path or data.hf_dataset",
    ),
    Rule(
        ("trainer.accumulate_grad_batches",),
        lambda v: v.get("data.global_batch_size") is not None,
        "it follows from data.global_batch_size",
    ),
    Rule(("data.split_seed",), lambda v: v.get("data.split") == "order", "data.split=order draws nothing"),
    Rule(("data.bucket",), lambda v: v.get("data.shuffle") is False, "data.shuffle=false keeps the order of the data"),
    Rule(("model",), lambda v: v.get("init_from"), "the weights of init_from say what the model is"),
    Rule(("tokenizer", "tokenizer.*"), lambda v: v.get("init_from"), "it comes with the weights of init_from"),
    Rule(("model.init", "model.vocab_size"), lambda v: v.get("init_from"), "the weights of init_from have their own"),
    Rule(("task.gamma",), lambda v: v.get("task.loss") != "simpo", "only task.loss=simpo has one"),
    Rule(("task.reference",), lambda v: v.get("task.loss") == "simpo", "task.loss=simpo has no reference"),
    Rule(("task.trained_blocks",), lambda v: v.get("lora.rank"), "adapters are trained instead (lora)"),
    Rule(("optimizer.clip_after_warmup",), _no_warmup, "there is no warmup"),
    Rule(("optimizer.clip_after_warmup",), _is_off("optimizer.max_grad_norm"), "max_grad_norm=null never clips"),
    Rule(("scheduler.initial_lr",), _no_warmup, "scheduler.warmup=0 has no first rate"),
    Rule(("scheduler.min_lr", "scheduler.decay_shape"), lambda v: v.get("scheduler.decay") == 0, "it never decays"),
    Rule(("monitor", "monitor_mode"), _no_checkpoint_or_stop, "neither checkpoints nor early stopping are on"),
    Rule(
        ("callbacks.samples.n_prompts",),
        lambda v: v.get("callbacks.samples.prompts") is not None,
        "callbacks.samples.prompts gives the prompts; null takes those of the validation data",
    ),
    Rule(
        ("callbacks.samples.top_k",),
        lambda v: v.get("callbacks.samples.temperature") == 0,
        "callbacks.samples.temperature=0 always takes the likeliest token",
    ),
    Rule(
        ("trainer.log_every_n_steps", "callbacks.throughput.peak_tflops"),
        lambda v: not v.get("logger"),
        "logger=none logs nothing",
    ),
    Rule(
        ("callbacks.plots.*",),
        lambda v: v.get("callbacks.plots") is not None and not _has_metrics_file(v),
        "curves are drawn from metrics.csv; add logger=csv",
    ),
    Rule(
        (
            *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "limit_*", "val_check_interval")),
            *(f"trainer.{name}" for name in ("num_sanity_val_steps", "check_val_every_n_epoch")),
            *(f"callbacks.{name}.*" for name in ("checkpoints", "plots", "samples", "responses")),
            "logger*",
        ),
        _one_batch,
        "trainer.fast_dev_run runs one batch of everything and leaves no files",
    ),
)


def ignored_settings(config: Mapping[str, Any], typed: Iterable[str]) -> Iterator[str]:
    """One line for each typed setting without effect in this run, and for the cost of a switched-off group.

    Args:
        config: the run's, resolved.
        typed: the words of the command line.
    """
    values = dotted(config)
    for key, word in {key_of(word): word for word in typed}.items():
        reason = next((rule.because for rule in RULES if _concerns(rule, key) and rule.holds(values)), None)
        if reason and values.get(key) is not None:
            yield f"{_shown(word, values)} is ignored: {reason}"
    if values.get("callbacks.checkpoints") is None and not _one_batch(values):
        yield "No checkpoints are kept: the run leaves no weights, and cannot be continued"
    if values.get("callbacks.plots") is not None and not _has_metrics_file(values) and not _one_batch(values):
        yield "No curves are drawn: they come from metrics.csv, which logger=csv writes"


def _concerns(rule: Rule, key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in rule.keys)


def _has_metrics_file(values: Values) -> bool:
    return any(str(target).endswith(".MetricsFile") for key, target in values.items() if key.startswith("logger."))


def _shown(word: str, values: Values) -> str:
    key = key_of(word)
    value = values.get(key)
    if isinstance(value, (Mapping, list)):
        return word if "." not in key else key
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
