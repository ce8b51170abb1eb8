"""An exported folder, read back: by us, bit for bit, and by transformers, if installed, whose numbers are compared.

The models are built one after the other, so that only one is in memory beside the exported one.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.shapes import parameter_shapes
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights.chat import Chat
from llm_lightning.weights.contents import Pretrained
from llm_lightning.weights.families.choose import family_of
from llm_lightning.weights.folder import load_folder
from llm_lightning.weights.load import rebuild_model
from llm_lightning.weights.tokenizer_files import is_known_there

_TEXT = "It's 2,048 words:\n\n\tnaïve ½ Größe 日本語  end "
_TOLERANCE = 1e-3  # relative to the largest logit; two correct fp32 implementations differ by about 1e-6


def check_model(
    folder: Path, state: Mapping[str, Tensor], config: GPTConfig, dtype: torch.dtype, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Load the folder as a user would, and compare; a part of the report.

    Raises:
        OSError: if it reads back differently.
        ValueError: if transformers computes other logits.
    """
    loaded, family = load_folder(folder), family_of(config)
    same = all(
        torch.equal(loaded.state[name], state[name][: shape[0]].to("cpu", dtype))
        for name, shape in parameter_shapes(config).items()
    )
    has_config = family.config_to_hf(loaded.config, None) == family.config_to_hf(config, None)
    if not same or not has_config or loaded.tokenizer != tokenizer.describe():
        raise OSError(
            f"{folder} reads back differently from what was written: the format cannot hold this model, or the disk is "
            "faulty"
        )
    try:
        difference, largest = _compare_with_transformers(folder, loaded)
    except ImportError:  # transformers is optional, and older ones lack a class
        return {"reloaded": "bitwise equal", "transformers": None, "max_logit_difference": None}
    return {"reloaded": "bitwise equal", **_verdict(difference, largest)}


@torch.no_grad()
def check_classifier(folder: Path, model: Classifier, architecture: str) -> dict[str, Any]:
    """Load the folder with transformers, if installed, and compare the logits of padded rows in float32.

    Raises:
        ValueError: if transformers computes other logits.
    """
    try:
        theirs = _theirs(folder, architecture)
    except ImportError:
        return {"transformers": None, "max_logit_difference": None}
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


def check_tokens(folder: Path, tokenizer: Tokenizer, chat: Chat | None) -> list[str]:
    """Notes on the tokenizer and the chat template: where transformers makes other ids than we do.

    That refuses nothing: numbers are right, and a template may differ by design, as one that writes today's date.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return []
    if not is_known_there(tokenizer):
        return []
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    notes = _difference(theirs, "a text", theirs(_TEXT)["input_ids"], [*begin, *tokenizer.encode(_TEXT)])
    if chat is None:
        return notes
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False, **chat.variables}
    for messages, ids in chat.prompts:
        found: Any = theirs.apply_chat_template(messages, **options)
        if different := _difference(theirs, "the chat template", found, ids):
            return [*notes, *different]
    return [*notes, f"chat template: transformers makes our tokens of {len(chat.prompts)} conversations"]


def _difference(theirs: Any, what: str, found: list[int], ids: list[int]) -> list[str]:
    if list(found) == ids:
        return []
    place = next((i for i, pair in enumerate(zip(found, ids, strict=False)) if pair[0] != pair[1]), 0)
    there, here = (theirs.decode(several[place : place + 4]) for several in (found, ids))
    return [f"transformers makes other tokens of {what}, first at position {place}: {there!r}, ours are {here!r}"]


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
    """The largest difference between their logits and ours in float32, and the largest logit; empties `loaded`."""
    import transformers  # noqa: F401 (missing: nothing is built)

    ours = rebuild_model({"model": asdict(loaded.config)}, loaded.state).float().eval()
    assert isinstance(ours, GPT)
    loaded.state.clear()
    ids = torch.arange(min(loaded.config.context_length, 64))[None] * 7919 % loaded.config.vocab_size
    logits = ours(ids)
    del ours
    architecture = family_of(loaded.config).config_to_hf(loaded.config, None)["architectures"][0]
    theirs = _theirs(folder, architecture)
    return (theirs(ids).logits - logits).abs().max().item(), logits.abs().max().item()


def _theirs(folder: Path, architecture: str) -> Any:
    """The model of transformers in float32.

    Raises:
        ImportError: if it is not installed, or has no such class.
    """
    import transformers
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise ImportError(f"transformers {transformers.__version__} has no {architecture}")
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
