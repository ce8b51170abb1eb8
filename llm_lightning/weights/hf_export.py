"""Export our models as folders that transformers loads: a causal language model, or a sequence classifier.

State dict and config -> the family's names and layout (`families/`), as views -> shards, written tensor by tensor;
beside them config.json, the tokenizer and the chat template, settings of generation, our own note, and a report. Then
the folder is read back (`hf_checks.py`), and only then it appears. `folder.py` reads such folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lightning.files.atomic import naming
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights.chat import Chat
from llm_lightning.weights.export_folder import NOTE, REPORT, check_target, digests_of, publishing, write_json
from llm_lightning.weights.families.architecture import architecture_of
from llm_lightning.weights.families.choose import family_of
from llm_lightning.weights.families.gpt2 import MOST_PADDING
from llm_lightning.weights.hf_checks import check_classifier, check_model, check_tokens
from llm_lightning.weights.safetensors_files import WEIGHTS
from llm_lightning.weights.safetensors_writing import write_shards
from llm_lightning.weights.tokenizer_files import is_known_there, write_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Contents:
    """What a folder gets beside the weights.

    Args:
        padding: number of rows of the vocabulary that were cut.
        generation: what the weights stated about generation.
        lineage: plain values for the report.
        more: further keys of config.json.
    """

    config: GPTConfig
    tokenizer: Tokenizer
    dtype: str
    padding: int
    chat: Chat | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


def export_hf(
    model: GPT | Mapping[str, Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    chat: Chat | None = None,
    generation: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a folder for transformers, and for `load_pretrained` with any of our tokenizers.

    It is a Llama, a Qwen2, a Qwen3 or a GPT-2, whichever computes what the config says. The folder appears only once
    it is complete, flushed to disk and read back: by us, bit for bit, and by transformers, if installed, with the same
    logits. A padded vocabulary of a GPT-2 is cut to the tokenizer's size; other families keep their rows.

    Args:
        model: a model or its state dict.
        chat: the model's template.
        generation: what the weights that it was trained from state about generation: ids and settings of sampling.
        lineage: plain values for the report: which checkpoint this is, and what it was trained from.
        dtype: `float32` or `bfloat16`.
        overwrite: replace an earlier export.

    Returns:
        the content of the folder's `export_report.json`.

    Raises:
        ValueError: if the folder is not empty, no class of transformers computes this model, the vocabulary is too
            small for the tokenizer, the state dict does not fit the config or is not finite, or transformers computes
            other logits.
        OSError: if the folder cannot be written, or reads back differently.
    """
    cut = _cut_to_tokenizer(config, tokenizer)
    state = model.state_dict() if isinstance(model, GPT) else model
    padding = config.vocab_size - cut.vocab_size
    contents = _Contents(cut, tokenizer, _known(dtype), padding, chat, generation or {}, lineage or {})

    def check(written: Path) -> dict[str, Any]:
        return check_model(written, state, cut, DTYPES[dtype], tokenizer)

    folder = Path(folder).resolve()  # "." has no name to derive the temporary folder's from
    check_target(folder, overwrite)
    return _publish(folder, family_of(cut).to_hf(state, cut), contents, check, overwrite=overwrite)


def export_classifier(
    model: Classifier,
    labels: Sequence[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    lineage: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a folder that transformers loads as a `...ForSequenceClassification`, checked as in `export_hf`.

    transformers' head has no bias. Ours moves into the bias of the final norm, which only the head reads: if
    W b' = bias, then W (h + b') = W h + bias; the smallest such b' is W's pseudo-inverse times the bias. The RMS norms
    of Llama and Qwen have no bias to take it.

    Raises:
        ValueError: if the model does not classify, as transformers does, by the last real token with causal attention,
            or its head has a bias that no norm can take; and as in `export_hf`.
        OSError: if the folder cannot be written, or reads back differently.
    """
    if model.pooling != "last" or not model.causal:
        raise ValueError(
            f"transformers reads the last token by causal attention, this classifier has task.pooling={model.pooling} "
            f"and task.causal={str(model.causal).lower()}: its logits would differ, so it is not exported"
        )
    config = _cut_to_tokenizer(model.trunk.config, tokenizer)
    architecture = architecture_of(config).replace("LMHeadModel", "").replace("ForCausalLM", "")
    architecture += "ForSequenceClassification"
    more = {
        "architectures": [architecture],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": 0 if tokenizer.eot_id is None else tokenizer.eot_id,
    }
    padding = model.trunk.config.vocab_size - config.vocab_size
    contents = _Contents(config, tokenizer, _known(dtype), padding, lineage=lineage or {}, more=more)
    state = _with_bias_in_norm(model, architecture)

    def check(written: Path) -> dict[str, Any]:
        return check_classifier(written, model, architecture)

    folder = Path(folder).resolve()
    check_target(folder, overwrite)
    weights = family_of(config).to_hf(state, config) | {"score.weight": model.head.weight}
    return _publish(folder, weights, contents, check, overwrite=overwrite)


def _with_bias_in_norm(model: Classifier, architecture: str) -> dict[str, Tensor]:
    """The trunk's state dict for a head without a bias."""
    head, state = model.head, dict(model.trunk.state_dict())
    if model.trunk.config.norm == "layer":
        shift = torch.linalg.pinv(head.weight.detach().double()) @ head.bias.detach().double()
        state["final_norm.bias"] = (state["final_norm.bias"].double() + shift).to(state["final_norm.bias"].dtype)
    elif head.bias.any():
        raise ValueError(
            f"transformers' {architecture} has no bias in its head, and RMS norms have none that could take this "
            "classifier's: its logits would differ, so it is not exported; give its texts to llm-lightning classify"
        )
    return state


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be {' or '.join(DTYPES)}")
    return dtype


def _cut_to_tokenizer(config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """The config without the padded rows of a GPT-2, whose reader cuts them too; in other families they are normal."""
    surplus = config.vocab_size - tokenizer.vocab_size
    if surplus < 0:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size={config.vocab_size}; "
            "export with the tokenizer that the model was trained with"
        )
    is_padded = surplus <= MOST_PADDING and config.position == "learned"
    return replace(config, vocab_size=tokenizer.vocab_size) if is_padded else config


def _publish(
    folder: Path,
    weights: Mapping[str, Tensor],
    contents: _Contents,
    check: Callable[[Path], dict[str, Any]],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Write and check the folder, then move it into place."""
    with publishing(folder, overwrite=overwrite) as temporary:
        with naming(folder):
            _write_folder(temporary, weights, contents)
        report = _report(temporary, contents)
        report |= check(temporary)
        report["notes"] += check_tokens(temporary, contents.tokenizer, contents.chat)
        with naming(folder):
            write_json(temporary / REPORT, report)
    return report


def _write_folder(folder: Path, weights: Mapping[str, Tensor], contents: _Contents) -> None:
    config, generation = contents.config, _generation(contents)
    facts = family_of(config).config_to_hf(config, contents.tokenizer.eot_id) | {"dtype": contents.dtype}
    facts |= {key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation}
    write_json(folder / "config.json", facts | dict(contents.more))
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, contents.tokenizer, contents.chat, config.context_length)
    write_shards(folder, WEIGHTS, weights, DTYPES[contents.dtype])


def _generation(contents: _Contents) -> dict[str, Any]:
    """generation_config.json: what the weights stated; generation also stops where answers end by our template."""
    tokenizer, chat, stated = contents.tokenizer, contents.chat, contents.generation
    ends = [chat.end_id] if chat is not None and chat.end_id is not None else []
    known = stated.get("eos_token_id", [])
    ends += [*(known if isinstance(known, list) else [known]), *tokenizer.stop_ids]
    stops = list(dict.fromkeys(ends))
    bos = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
    ids = {"bos_token_id": bos, "pad_token_id": tokenizer.eot_id}
    result = {key: index for key, index in ids.items() if index is not None} | dict(stated)
    result |= {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    return dict(sorted(result.items()))


def _report(folder: Path, contents: _Contents) -> dict[str, Any]:
    config, notes = contents.config, []
    if contents.padding:
        notes.append(f"{contents.padding} padded rows of the vocabulary cut")
    if config.position == "learned" and not config.qkv_bias:
        notes.append("query-key-value bias written as zeros: GPT-2 always has one")
    if not is_known_there(contents.tokenizer):
        notes.append(f"transformers has no tokenizer {contents.tokenizer.describe()['name']}; {NOTE} describes it")
        notes += ["nor therefore a chat template"] if contents.chat else []
    chat = contents.chat
    date = chat.variables.get("date_string") if chat else None
    if chat and date and any(name in chat.jinja for name in ("date_string", "strftime_now")):
        notes.append(f"the chat template writes a date: here {date}, elsewhere today's, unless date_string is given")
    return {
        "dtype": contents.dtype,
        "vocab_size": config.vocab_size,
        "tied_head": config.tied_head,
        "notes": notes,
        "lineage": dict(contents.lineage),
        "sha256": digests_of(folder),
    }
