"""The tokenizer that a folder of weights describes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_lightning.files.atomic import sha256_of
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tokenizers.base import END_OF_TEXT
from llm_lightning.tokenizers.tiktoken_encodings import GPT2_VOCAB_BPE_SHA256
from llm_lightning.tokenizers.tokenizer_json import NAME, describe_folder
from llm_lightning.weights.export_folder import NOTE, read_json
from llm_lightning.weights.families.gpt2 import MOST_PADDING

log = logging.getLogger(__name__)

FILES = (NOTE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
"""What may say which tokenizer it is, the first wins."""


def tokenizer_of(folder: Path, config: GPTConfig, eos_ids: Iterable[int] = ()) -> dict[str, Any] | None:
    """The description of a folder's tokenizer: ours if we wrote the folder, else that of its tokenizer.json.

    GPT-2's if there are only its merges, or nothing but a vocabulary of its size; None if it cannot be known.

    Args:
        eos_ids: where generation stops by the folder's settings.
    """
    if (folder / NOTE).is_file():
        description = read_json(folder / NOTE).get("tokenizer")
        if not isinstance(description, dict):
            raise ValueError(f"{folder / NOTE} has no tokenizer; export the model again")
        return description | _content(folder) if description.get("name") == NAME else description
    if (folder / "tokenizer.json").is_file():
        return describe_folder(folder, eos_ids=eos_ids)
    _warn_of_added(folder)
    if (folder / "merges.txt").is_file():
        return {"name": "gpt2"} if sha256_of(folder / "merges.txt") == GPT2_VOCAB_BPE_SHA256 else None
    if config.position == "learned" and 0 <= config.vocab_size - 50257 <= MOST_PADDING:
        log.info("no tokenizer in %s: taken for GPT-2's, because there are %d tokens", folder, config.vocab_size)
        return {"name": "gpt2"}
    return None


def _warn_of_added(folder: Path) -> None:
    """Say which tokens of older files, without a tokenizer.json, are not read."""
    files = [folder / "added_tokens.json", folder / "tokenizer_config.json"]
    ids, settings = (read_json(file) if file.is_file() else {} for file in files)
    decoder = settings.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    contents = (entry.get("content") for entry in entries if isinstance(entry, dict))
    if added := {*ids, *map(str, contents)} - {END_OF_TEXT}:
        log.warning(
            "%s adds tokens such as %s, which are plain text here; save a tokenizer.json with transformers",
            folder,
            min(added),
        )


def _content(folder: Path) -> dict[str, str]:
    """The content of tokenizer.json, which an export writes once: it may have many megabytes."""
    path = folder / "tokenizer.json"
    try:
        return {"json": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; export the model again") from None
