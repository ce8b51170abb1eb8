"""What weights state about generation: the ids that begin, end and pad a text, and settings of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_lightning.weights.export_folder import read_json
from llm_lightning.weights.families.checks import shown

FILE = "generation_config.json"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation(folder: Path, config_json: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`eos_token_id` (a list), `bos_token_id`, `pad_token_id` and sampling of a folder, as far as it states them.

    As in transformers, `config.json` counts only where there is no `generation_config.json`.

    Raises:
        ValueError: if a value has the wrong type, or an id is none of the model's.
    """
    path = folder / FILE
    stated = read_json(path) if path.is_file() else {k: v for k, v in config_json.items() if k.endswith("_token_id")}
    path = path if path.is_file() else folder / "config.json"
    ends = stated.get("eos_token_id")
    result: dict[str, Any] = {}
    if ends is not None:
        several = ends if isinstance(ends, list) else [ends]
        result["eos_token_id"] = [_id(path, "eos_token_id", one, vocab_size) for one in several]
    for key in ("bos_token_id", "pad_token_id"):
        if stated.get(key) is not None and stated[key] != -1:  # -1: none, in some older files
            result[key] = _id(path, key, stated[key], vocab_size)
    for key in SAMPLING:
        if stated.get(key) is not None:
            if not isinstance(stated[key], (int, float)):
                raise ValueError(f"{path}: {key}={shown(stated[key])} must be a number")
            result[key] = stated[key]
    return result


def _id(path: Path, key: str, value: Any, vocab_size: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ValueError(f"{path}: {key}={shown(value)} is none of the model's {vocab_size:,} ids")
    return value
