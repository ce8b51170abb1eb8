"""Training of `bpe`: merges with GPT-2's pattern, from your own text."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import chain

from llm_lightning.tokenizers.base import last_start, without_surrogates
from llm_lightning.tokenizers.tiktoken_encodings import PIECE_END

logger = logging.getLogger(__name__)


def train_merges(texts: Iterable[str], vocab_size: int | None) -> list[str]:
    """Learn the merges with the `tokenizers` library; the same texts give the same merges."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size is None or vocab_size < 257:
        raise ValueError(f"tokenizer.vocab_size={vocab_size} must be at least 257 (256 bytes, the end of text)")
    pieces = _pieces(texts)
    if not (first := next(pieces, "")):
        raise ValueError("tokenizer=bpe found no text to train on; is the file empty?")
    trainable = Trainable(BPE())
    trainable.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,  # a pair that occurs once would only memorise its word
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    trainable.train_from_iterator(chain([first], pieces), trainer)
    merges = [" ".join(pair) for pair in json.loads(trainable.to_str())["model"]["merges"]]
    if 257 + len(merges) < vocab_size:
        logger.warning("tokenizer=bpe: the text yields %d of %d tokens", 257 + len(merges), vocab_size)
    return merges


def _pieces(texts: Iterable[str], size: int = 1 << 16) -> Iterator[str]:
    """Cut long texts where GPT-2's pattern cuts them anyway: the trainer holds 256 texts in memory."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + size
            if end < len(text):
                end = start + (last_start(PIECE_END, text[start:end]) or size)
            yield without_surrogates(text[start:end])
            start = end
