"""Refuse values that a setting cannot have: the wrong kind, null where a value is needed, numbers out of range.

A class with a clear error of its own (`optimizer.lr must be positive`) checks itself. These are values for which
Lightning, Python or one of our loops would give an obscure error, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from llm_lightning.experiments.settings.meaning import UNDECLARED

OR_AUTO = ("optimizer.lr",)
"""Numbers that may also be `auto`."""

WORDS_ALLOWED = ("trainer.devices", "trainer.deterministic", "trainer.fast_dev_run")
"""Settings with a number or a switch as default that also accept another kind: `auto`, `warn`, a number."""

NUMBERS: dict[str, int | float] = {
    "data.global_batch_size": 64,
    "data.max_length": 128,
    "data.stride": 128,
    "model.vocab_size": 50304,
    "model.context_length": 1024,
    **dict.fromkeys(("model.n_layer", "model.n_head", "model.n_embd"), 12),
    **dict.fromkeys(("model.n_kv_head", "model.head_dim", "model.ffn_width"), 64),
    **{f"model.{name}dropout": 0.1 for name in ("", "embedding_", "attention_", "residual_")},
    "optimizer.lr": 3e-4,
    "tokenizer.vocab_size": 2048,
    "callbacks.throughput.peak_tflops": 100.0,
    "optimizer.adamw_lr": 3e-3,
    "optimizer.weight_decay": 0.1,
    "trainer.limit_train_batches": 0.1,
    "trainer.limit_val_batches": 0.1,
    "trainer.limit_test_batches": 0.1,
}
"""Settings that are null by default, else a number: an example, an integer if only whole numbers make sense."""

LEAST: dict[str, tuple[float, str]] = {
    "trainer.log_every_n_steps": (1, "logger=none switches the logs off"),
    "trainer.accumulate_grad_batches": (1, "1 accumulates nothing"),
    "trainer.check_val_every_n_epoch": (1, "trainer.limit_val_batches=0 leaves validation out"),
    "trainer.num_sanity_val_steps": (-1, "-1 takes all"),
    "data.num_workers": (0, "0 prepares batches in the process that trains"),
    "data.eval_batches": (0, "0 leaves train/eval_loss out"),
    "model.context_length": (1, "it is the longest input in tokens"),
    "seed": (0, "any whole number up to 2**32 - 1 will do"),
}
"""The minimum of a setting, and advice for a smaller value."""

POSITIVE = ("trainer.val_check_interval",)

MAY_BE_NULL = (
    *(key for key in UNDECLARED if key not in ("tokenizer.name", "allow_targets", "optimizer.lr")),
    "data.name",
    "data.columns.*",
    "tokenizer.vocab_size",
    "optimizer.max_grad_norm",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_*",
    "trainer.deterministic",
    "callbacks.*.monitor",
    "callbacks.checkpoints.every_n_*",
    "callbacks.samples.top_k",
)
"""Patterns of settings that null switches off or leaves open; every other setting needs a value."""


def refuse_wrong_values(config: Mapping[str, Any], known: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """Refuse values of another kind than the default, null where a value is needed, and numbers out of range.

    Args:
        config: dotted key -> value in a run.
        known: dotted key -> default, interpolations followed.
        where: key -> " in FILE" where a file sets it, else "".

    Raises:
        ValueError: naming the key and a right value.
    """
    for key, value in config.items():
        default = NUMBERS.get(key, known.get(key))
        if value is None:
            _refuse_null(key, known.get(key), where)
        elif key in OR_AUTO and value == "auto":
            continue
        elif isinstance(default, (bool, int, float)) and key not in WORDS_ALLOWED:
            _refuse_other_kind(key, value, default, where)
        _refuse_out_of_range(key, value, where)


def _refuse_null(key: str, default: Any, where: Callable[[str], str]) -> None:
    is_node = isinstance(default, Mapping)
    if default is None or (is_node and key.startswith(("callbacks.", "logger."))):
        return
    if not any(fnmatchcase(key, pattern) for pattern in MAY_BE_NULL):
        example = "" if is_node or str(default).startswith("?") else f", such as {_shown(default)}"
        raise ValueError(f"{key}=null{where(key)}: this setting needs a value{example}; leave it out for its default")


def _refuse_other_kind(key: str, value: Any, default: Any, where: Callable[[str], str]) -> None:
    if isinstance(default, bool):
        right, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        right, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        right, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    if not right:
        wanted = "a number" if isinstance(value, str) and wanted == "a whole number" else wanted
        shown = repr(value) if isinstance(value, str) else _shown(value)
        raise ValueError(f"{key}={shown}{where(key)} must be {wanted}, such as {_shown(default)}")


def _refuse_out_of_range(key: str, value: Any, where: Callable[[str], str]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least, advice = LEAST.get(key, (value, ""))
    if value < least:
        raise ValueError(f"{key}={value}{where(key)} must be at least {least:g}; {advice}")
    if key in POSITIVE and value <= 0:
        raise ValueError(f"{key}={value}{where(key)} must be more than 0; leave it out to validate after each epoch")
    if key == "seed" and value >= 2**32:
        raise ValueError(f"{key}={value}{where(key)} must be less than 2**32 = 4294967296")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
