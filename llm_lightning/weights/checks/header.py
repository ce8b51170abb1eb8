"""The header of a checkpoint: types, ranges and keys, before anything is built from it.

The digest of a checkpoint proves that nobody has changed it since it was written. It does not prove that its author
was honest: anyone who writes a file can write its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from reprlib import repr as short
from typing import Any

from llm_lightning.models.classifier import POOLINGS
from llm_lightning.models.gpt import FREE_FIELDS, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.weights.checks.kinds import (
    COUNT,
    DICT,
    FLAG,
    NUMBER,
    SIZE,
    TEXT,
    Check,
    check_keys,
    dict_of,
    list_of,
    or_none,
    refuse_unknown,
)

HEADER = "llm_lightning"
TASKS = ("pretraining", "classification", "sft", "dpo")
"""Our tasks, whose checkpoints hold one model of ours and nothing else under that name."""
FIRST_FIELDS = (
    *("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "embedding_dropout", "attention_dropout"),
    *("residual_dropout", "qkv_bias", "tied_head", "layer_norm_eps"),
)
"""The fields of `GPTConfig` that every header has. Older ones lack the others, whose defaults are GPT-2's."""
_NEEDED: dict[str, Check] = {"task": TEXT, "model": DICT, "tokenizer": DICT}
_OPTIONAL: dict[str, Check] = {
    "step": COUNT,
    "epoch": COUNT,
    "tokens_seen": COUNT,
    "sequences_seen": COUNT,
    "pairs_seen": COUNT,
    "metrics": dict_of(NUMBER),
    "config": DICT,
    "lineage": DICT,
    "classifier": DICT,
    "lora": DICT,
    "base": TEXT,
    "rows": DICT,
    "layout": DICT,
    "template": DICT,
    "generation": DICT,
}
_GENERATION: dict[str, Check] = {"eos_token_id": list_of(COUNT), "bos_token_id": COUNT, "pad_token_id": COUNT}
_LINEAGE: dict[str, Check] = {
    **dict.fromkeys(("data", "parent", "parent_name", "base", "base_of"), or_none(TEXT)),
    "places": DICT,
}
_LAYOUT = dict.fromkeys(("batch_size", "accumulated", "processes", "counted_batch"), SIZE)
_TEMPLATE: dict[str, Check] = {
    "kind": (lambda value: value in ("slots", "jinja"), "slots or jinja"),
    "name": TEXT,
    "text": TEXT,
}
_TEMPLATE_OPTIONAL: dict[str, Check] = {
    **dict.fromkeys(("system", "date"), TEXT),
    **dict.fromkeys(("tokens", "others"), dict_of(TEXT)),
    "controls": list_of(TEXT),
}
_CLASSIFIER: dict[str, Check] = {
    "labels": list_of(TEXT),
    "pooling": (lambda value: value in POOLINGS, f"one of {', '.join(POOLINGS)}"),
    "causal": FLAG,
    "pad_to": or_none(SIZE),
    "pad_id": COUNT,
}


def check_header(header: Mapping[str, Any]) -> None:
    """Check types, ranges and keys of a header."""
    check_keys(header, HEADER, _NEEDED)
    check_keys(header, HEADER, _OPTIONAL, is_optional=True)
    if not isinstance(header["tokenizer"].get("name"), str):
        raise ValueError(f"{HEADER}.tokenizer.name={short(header['tokenizer'].get('name'))} must be a text")
    config_of(header)
    check_keys(header.get("lineage", {}), f"{HEADER}.lineage", _LINEAGE, is_optional=True)
    settings = {"data": DICT, "monitor": or_none(TEXT)}
    check_keys(header.get("config", {}), f"{HEADER}.config", settings, is_optional=True)
    check_keys(header.get("generation", {}), f"{HEADER}.generation", _GENERATION, is_optional=True)
    if "layout" in header:
        check_keys(header["layout"], f"{HEADER}.layout", _LAYOUT)
        refuse_unknown(header["layout"], f"{HEADER}.layout", _LAYOUT)
    if "rows" in header:
        check_keys(header["rows"], f"{HEADER}.rows", {"count": COUNT, "sha256": TEXT})
    if "template" in header:
        check_keys(header["template"], f"{HEADER}.template", _TEMPLATE)
        check_keys(header["template"], f"{HEADER}.template", _TEMPLATE_OPTIONAL, is_optional=True)
    if "base" in header and "lora" not in header:
        raise ValueError(f"{HEADER}.base names the weights under an adapter, but {HEADER}.lora describes none")
    if "classifier" in header:
        _check_classifier(header)
    lora_of(header)


def check_base(header: Mapping[str, Any], base: GPTConfig) -> None:
    """Refuse an adapter for another model than its base."""
    config = config_of(header)
    ours, theirs = _resolved(config), _resolved(base)
    for name in (field.name for field in fields(config) if field.name not in (*FREE_FIELDS, "tied_head")):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"{HEADER}.model.{name}={getattr(ours, name)}, but the weights under the adapter have "
                f"{getattr(theirs, name)}"
            )
    if config.context_length > base.context_length:
        raise ValueError(
            f"{HEADER}.model.context_length={config.context_length}, but the weights under the adapter have "
            f"{base.context_length} positions"
        )


def _resolved(config: GPTConfig) -> GPTConfig:
    """The config with every width as a number: `None` and the number that it stands for are the same model."""
    return replace(config, n_kv_head=config.kv_heads, head_dim=config.head_width, ffn_width=config.mlp_width)


def check_run(header: Mapping[str, Any]) -> None:
    """Check that a valid header also has the step, the settings and the lineage of a run."""
    check_keys(header, HEADER, {"step": COUNT, "config": DICT, "lineage": DICT})
    check_keys(header["lineage"], f"{HEADER}.lineage", {"data": TEXT, "parent": or_none(TEXT)})


def config_of(header: Mapping[str, Any]) -> GPTConfig:
    names = [field.name for field in fields(GPTConfig)]
    check_keys(header["model"], f"{HEADER}.model", dict.fromkeys(FIRST_FIELDS, (lambda value: True, "")))
    refuse_unknown(header["model"], f"{HEADER}.model", names)
    with _below_header():
        return GPTConfig(**header["model"])


def lora_of(header: Mapping[str, Any]) -> LoRAConfig | None:
    if "lora" not in header:
        return None
    names = [field.name for field in fields(LoRAConfig)]
    checks: dict[str, Check] = {**dict.fromkeys(names, (lambda value: True, "")), "targets": list_of(TEXT)}
    check_keys(header["lora"], f"{HEADER}.lora", checks)
    refuse_unknown(header["lora"], f"{HEADER}.lora", names)
    with _below_header():
        return LoRAConfig(**header["lora"])


class _below_header:  # noqa: N801 (a context manager)
    """Prefix an error of a dataclass with the name of the header."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{HEADER}.{error}") from None


def _check_classifier(header: Mapping[str, Any]) -> None:
    described, where, model = header["classifier"], f"{HEADER}.classifier", header["model"]
    check_keys(described, where, _CLASSIFIER)
    refuse_unknown(described, where, _CLASSIFIER)
    labels = described["labels"]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"{where}.labels={short(labels)} must be at least two different names")
    if not model["tied_head"]:
        raise ValueError(f"{HEADER}.model.tied_head=false, which no classifier has")
    if described["pad_id"] >= model["vocab_size"]:
        raise ValueError(
            f"{where}.pad_id={described['pad_id']} must be below {HEADER}.model.vocab_size={model['vocab_size']}"
        )
