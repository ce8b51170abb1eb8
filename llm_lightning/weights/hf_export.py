"""Export our models as folders that transformers loads: `GPT2LMHeadModel`, or a sequence classifier.

`families/gpt2.py` converts names and layouts; `folder.py` reads such folders.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lightning.files.atomic import naming
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer
from llm_lightning.tokenizers.tiktoken_encodings import gpt2_merges
from llm_lightning.weights.contents import Pretrained
from llm_lightning.weights.export_folder import (
    NOTE,
    REPORT,
    check_target,
    digests_of,
    publishing,
    write_json,
    write_text,
    write_weights,
)
from llm_lightning.weights.families.gpt2 import MOST_PADDING, config_to_hf, from_hf, to_hf
from llm_lightning.weights.folder import load_folder
from llm_lightning.weights.safetensors_files import WEIGHTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TOLERANCE = 1e-3  # relative to the largest logit; two correct fp32 implementations differ by about 1e-6


def export_hf(
    model: GPT | Mapping[str, Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a folder for transformers' `GPT2LMHeadModel`, and for `load_pretrained` with any of our tokenizers.

    The folder appears only once it is complete, flushed to disk and read back: by us, bit for bit, and by
    transformers, if installed, with the same logits. A padded vocabulary is cut to the tokenizer's size.

    Args:
        model: a model or its state dict.
        dtype: `float32` or `bfloat16`.
        overwrite: replace an earlier export.

    Returns:
        the content of the folder's `export_report.json`.

    Raises:
        ValueError: if the folder is not empty, the vocabulary is too small for the tokenizer, the state dict does
            not fit the config or is not finite, or transformers computes other logits.
        OSError: if the folder cannot be written, or reads back differently.
    """
    cut = _cut_to_tokenizer(config, tokenizer)
    state = model.state_dict() if isinstance(model, GPT) else model

    def check(written: Path) -> dict[str, Any]:
        return _read_back(written, weights, cut, tokenizer)

    folder = Path(folder).resolve()  # "." has no name to derive the temporary folder's from
    check_target(folder, overwrite)
    weights = _ready(to_hf(state, cut), dtype)
    padding = config.vocab_size - cut.vocab_size
    return _publish(folder, weights, cut, {}, tokenizer, dtype, check, padding=padding, overwrite=overwrite)


def export_classifier(
    model: Classifier,
    labels: Sequence[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a folder that transformers loads as `GPT2ForSequenceClassification`, checked as in `export_hf`.

    transformers' head has no bias. Ours moves into the bias of the final norm, which only the head reads: if
    W b' = bias, then W (h + b') = W h + bias; the smallest such b' is W's pseudo-inverse times the bias.

    Raises:
        ValueError: if the model does not classify, as transformers does, by the last real token with causal attention;
            and as in `export_hf`.
        OSError: if the folder cannot be written, or reads back differently.
    """
    if model.pooling != "last" or not model.causal:
        raise ValueError(
            f"transformers reads the last token by causal attention, this classifier has task.pooling={model.pooling} "
            f"and task.causal={str(model.causal).lower()}: its logits would differ, so it is not exported"
        )
    config = _cut_to_tokenizer(model.trunk.config, tokenizer)
    head, state = model.head, dict(model.trunk.state_dict())
    shift = torch.linalg.pinv(head.weight.detach().double()) @ head.bias.detach().double()
    state["final_norm.bias"] = (state["final_norm.bias"].double() + shift).to(state["final_norm.bias"].dtype)
    more = {
        "architectures": ["GPT2ForSequenceClassification"],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": 0 if tokenizer.eot_id is None else tokenizer.eot_id,
    }

    def check(written: Path) -> dict[str, Any]:
        return _compare_classifiers(written, model)

    folder = Path(folder).resolve()
    check_target(folder, overwrite)
    weights = _ready(to_hf(state, config) | {"score.weight": head.weight}, dtype)
    padding = model.trunk.config.vocab_size - config.vocab_size
    return _publish(folder, weights, config, more, tokenizer, dtype, check, padding=padding, overwrite=overwrite)


def _ready(weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors as they will be written.

    Raises:
        ValueError: if the dtype is not in `DTYPES`, or a value is not finite in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be {' or '.join(DTYPES)}")
    weights = {name: tensor.detach().cpu().to(DTYPES[dtype]).contiguous() for name, tensor in weights.items()}
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} has values that are not finite in {dtype}; export an earlier checkpoint")
    return weights


def _publish(
    folder: Path,
    weights: dict[str, Tensor],
    config: GPTConfig,
    more: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: str,
    check: Callable[[Path], dict[str, Any]],
    *,
    padding: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Write and check the folder, then move it into place; `more` is added to its `config.json`."""
    with publishing(folder, overwrite=overwrite) as temporary:
        with naming(folder):
            _write_folder(temporary, weights, config, more, tokenizer, dtype)
        report = _report(temporary, config, tokenizer, dtype, padding=padding)
        report |= check(temporary)
        with naming(folder):
            write_json(temporary / REPORT, report)
    return report


def _cut_to_tokenizer(config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    surplus = config.vocab_size - tokenizer.vocab_size
    if surplus < 0:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size={config.vocab_size}; "
            "export with the tokenizer that the model was trained with"
        )
    return replace(config, vocab_size=tokenizer.vocab_size) if surplus <= MOST_PADDING else config


def _write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    config: GPTConfig,
    more: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    eot = tokenizer.eot_id
    ends = {} if eot is None else {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_json(folder / "config.json", config_to_hf(config, eot) | {"dtype": dtype} | dict(more))
    write_json(folder / "generation_config.json", ends)
    write_json(folder / NOTE, {"format": 1, "tokenizer": tokenizer.describe()})
    _write_tokenizer(folder, tokenizer, config.context_length)
    write_weights(folder / WEIGHTS, weights)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write `gpt2` and `bpe`, which share a pattern, in GPT-2's own format; transformers lacks the others."""
    description = tokenizer.describe()
    if description["name"] not in ("gpt2", "bpe"):
        return
    from tokenizers.pre_tokenizers import ByteLevel

    merges = gpt2_merges() if description["name"] == "gpt2" else description["merges"]
    # Order of ids: the 256 bytes, sorted by the characters that represent them; the merges; the end of text.
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)}, indent=None)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": context_length,
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        },
    )


def _report(folder: Path, config: GPTConfig, tokenizer: Tokenizer, dtype: str, *, padding: int) -> dict[str, Any]:
    notes = []
    if padding:
        notes.append(f"{padding} padded rows of the vocabulary cut")
    if not config.qkv_bias:
        notes.append("query-key-value bias written as zeros: GPT-2 always has one")
    if not (folder / "merges.txt").exists():
        notes.append(f"transformers has no tokenizer {tokenizer.describe()['name']}; {NOTE} describes it")
    return {
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "tied_head": config.tied_head,
        "notes": notes,
        "sha256": digests_of(folder),
    }


def _read_back(folder: Path, weights: Mapping[str, Tensor], config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Load the folder as a user would, and compare."""
    expected, loaded = from_hf(weights, config), load_folder(folder)
    same = all(torch.equal(loaded.state[name], expected[name]) for name in expected)
    if not same or loaded.config != config or loaded.tokenizer != tokenizer.describe():
        raise OSError(
            f"{folder} reads back differently from what was written: the format cannot hold this model, or the disk is "
            "faulty"
        )
    try:
        difference, largest = _compare_with_transformers(folder, loaded)
    except ImportError:  # transformers is optional
        return {"reloaded": "bitwise equal", "transformers": None, "max_logit_difference": None}
    return {"reloaded": "bitwise equal", **_verdict(difference, largest)}


def _verdict(difference: float, largest: float) -> dict[str, Any]:
    version = importlib.metadata.version("transformers")
    if not difference <= _TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"transformers {version} computes logits from the export that differ by {difference:.2g}; nothing was "
            "written. Please report it, with both versions"
        )
    return {"transformers": version, "max_logit_difference": difference}


@torch.no_grad()
def _compare_with_transformers(folder: Path, loaded: Pretrained) -> tuple[float, float]:
    """The largest difference between their logits and ours in float32, and the largest logit."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    ours = GPT(loaded.config).eval()
    ours.load_state_dict(loaded.state)
    ids = torch.arange(min(loaded.config.context_length, 64))[None] * 7919 % loaded.config.vocab_size
    logits = ours(ids)
    return (theirs(ids).logits - logits).abs().max().item(), logits.abs().max().item()


@torch.no_grad()
def _compare_classifiers(folder: Path, model: Classifier) -> dict[str, Any]:
    """Load the folder with transformers, if installed, and compare the logits of padded rows in float32."""
    try:
        from transformers import GPT2ForSequenceClassification
        from transformers.utils import logging as their_logging
    except ImportError:
        return {"transformers": None, "max_logit_difference": None}
    their_logging.disable_progress_bar()
    theirs = GPT2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    length, pad = min(model.trunk.config.context_length, 64), theirs.config.pad_token_id
    lengths = torch.tensor([length, (length + 1) // 2])
    ids = torch.arange(2 * length).view(2, length) * 7919 % theirs.config.vocab_size
    ids[ids == pad] = pad - 1 if pad else 1  # transformers takes a pad inside a text for its end
    ids[1, lengths[1] :] = pad
    logits = copy.deepcopy(model).float().cpu()(ids, lengths)
    difference, largest = (theirs(ids).logits - logits).abs().max().item(), logits.abs().max().item()
    rounded = not torch.equal(theirs.score.weight, model.head.weight.float().cpu())  # bfloat16 keeps 8 bits
    verdict = _verdict(difference / 64 if rounded else difference, largest)
    return verdict | {"max_logit_difference": difference}
