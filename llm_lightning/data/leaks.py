"""Leaks: prompts and texts that an evaluation split shares with training; and duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_lightning.data.splits import normalized
from llm_lightning.data.templates.conversation import Conversation


def prompt_key(conversation: Conversation) -> str:
    """Equal for prompts that are the same up to case, white space and punctuation."""
    prompts = [part for turn in conversation.turns for part in (turn.instruction, turn.input)]
    return normalized(" ".join(prompts), fold_digits=False)


def leaked_prompts(parts: Mapping[str, Sequence[Conversation]], split: str) -> dict[str, int]:
    """Number of prompts of a split that are also in training."""
    seen = set(map(prompt_key, parts["train"]))
    return {"prompts": sum(prompt_key(one) in seen for one in parts[split]), "of": len(parts[split])}


def leaked_texts(texts: dict[str, list[tuple[str, int]]], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Numbers of texts in `val` and `test` that are also in `train`: byte for byte, trimmed, normalized."""
    leaked = {}
    ways: dict[str, Callable[[str], str]] = {"exact": str, "trimmed": str.strip, "normalized": normalized}
    for split in ("val", "test"):
        rows = texts[split]
        hits: dict[str, Counter[int]] = {}
        for way, form in ways.items():
            seen = {form(text) for text, _ in texts["train"]}
            hits[way] = Counter(label for text, label in rows if form(text) in seen)
        of_class = Counter(label for _, label in rows)
        by_class = {
            name: {way: hit[index] for way, hit in hits.items()} | {"of": of_class[index]}
            for index, name in enumerate(labels)
        }
        leaked[split] = {way: hit.total() for way, hit in hits.items()} | {"of": len(rows), "classes": by_class}
    return leaked


def duplicates(texts: Sequence[str]) -> dict[str, int]:
    """Numbers of texts that repeat another one: byte for byte, and normalized."""
    return {
        "exact_duplicates": len(texts) - len(set(texts)),
        "normalized_duplicates": len(texts) - len({normalized(text) for text in texts}),
    }
