"""Leaks: prompts and texts that an evaluation split shares with training; and duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_lightning.data.splits import normalized
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.data.text_keys import TextKeys, as_scalars


def prompt_key(conversation: Conversation) -> str:
    """Equal for prompts that are the same up to case, white space and punctuation."""
    prompts = [part for turn in conversation.turns for part in (turn.instruction, turn.input)]
    return normalized(" ".join(prompts), fold_digits=False)


def leaked_texts(train: TextKeys, evaluated: TextKeys, classes: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Numbers of evaluated texts that are also in training: byte for byte, trimmed, normalized; in all and by class.

    Args:
        train, evaluated: keys of the texts of training and of a split.
        classes: of the split's texts, (n,) int.
    """
    hits = {
        way: np.bincount(classes[np.isin(as_scalars(keys), as_scalars(known))], minlength=len(labels)).tolist()
        for way, known, keys in zip(TextKeys._fields, train, evaluated, strict=True)
    }
    of_class = np.bincount(classes, minlength=len(labels)).tolist()
    by_class = {
        name: {way: hit[index] for way, hit in hits.items()} | {"of": of_class[index]}
        for index, name in enumerate(labels)
    }
    return {way: sum(hit) for way, hit in hits.items()} | {"of": len(classes), "classes": by_class}


def duplicates(keys: TextKeys) -> dict[str, int]:
    """Numbers of texts that repeat another one: byte for byte, and normalized."""
    repeats = {way: len(found) - len(np.unique(as_scalars(found))) for way, found in keys._asdict().items()}
    return {"exact_duplicates": repeats["exact"], "normalized_duplicates": repeats["normalized"]}
