"""Build a tokenizer by name, or from the description that a checkpoint carries."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.byte import ByteTokenizer
from llm_lightning.tokenizers.tiktoken_encodings import TiktokenTokenizer
from llm_lightning.tokenizers.tokenizer_json import NAME, JsonTokenizer
from llm_lightning.tokenizers.trained import train_merges
from llm_lightning.tokenizers.word import WordTokenizer


def build_tokenizer(name: str, *, vocab_size: int | None = None, texts: Iterable[str] | None = None) -> Tokenizer:
    """Build a tokenizer by name, training it if it is `word` or `bpe`.

    Args:
        name: gpt2, byte, word, bpe, or any encoding of tiktoken, which downloads it on first use.
        vocab_size: for bpe only: 256 bytes, the merges, and the end of text as the last id.
        texts: the training documents; read once, and only for word and bpe.

    Raises:
        ValueError: if the name is unknown, `vocab_size` is missing, too small or not for this name, or there is
            no text to train on.
        OSError: if the files of an encoding cannot be read or downloaded.
    """
    if vocab_size is not None and name != "bpe":
        raise ValueError(f"tokenizer.vocab_size={vocab_size} is for tokenizer=bpe only; leave it out for {name}")
    if name in ("word", "bpe") and texts is None:
        raise ValueError(f"tokenizer={name} is trained on text; pass `texts`")
    if name == "word":
        return WordTokenizer.train(texts or ())
    if name == "bpe":
        return TiktokenTokenizer.from_merges(train_merges(texts or (), vocab_size))
    return from_description({"name": name})


def from_description(description: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer that `describe()` described.

    Raises:
        ValueError: if the description is damaged or names no tokenizer.
        OSError: if the files of an encoding cannot be read or downloaded.
    """
    kinds: dict[Any, type[Tokenizer]] = {"byte": ByteTokenizer, "word": WordTokenizer}
    name = description.get("name")
    if name == NAME:
        return _json_tokenizer(json.dumps(description, default=repr))
    kind = kinds.get(name, TiktokenTokenizer) if isinstance(name, str) else TiktokenTokenizer
    return kind.from_description(description)


@functools.lru_cache(maxsize=1)
def _json_tokenizer(description: str) -> JsonTokenizer:
    """The tokenizer of a description in JSON; the latest is kept, because it takes seconds and is often built twice."""
    return JsonTokenizer.from_description(json.loads(description))
