"""Conversations in data modules: which settings there are, how they are split, what may be lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_lightning.data.splits import grouped_split, joined_groups, normalized, order_split
from llm_lightning.data.templates import Conversation, Template

CHOICES: dict[str, tuple[Any, ...]] = {
    "split": ("grouped", "order"),
    "too_long": ("cut_prompt", "drop", "cut_answer"),
    "packing": ("auto", True, False),
}


def split_conversations(
    records: Sequence[Conversation], split: str, fractions: tuple[float, float], seed: int
) -> dict[str, list[int]]:
    """split -> indices of its records.

    Args:
        split: `grouped` (a prompt, or the records of a group, never stand in two splits) or `order`.
        fractions: of validation and test.

    Raises:
        ValueError: if a split would be empty.
    """
    if split == "order":
        parts = order_split(len(records), fractions)
    else:
        prompts = list(map(prompt_key, records))
        keys = joined_groups([one.group or key for one, key in zip(records, prompts, strict=True)], prompts)
        parts = grouped_split(keys, [0] * len(keys), fractions, seed)
    for name, part in parts.items():
        if not part:
            raise ValueError(f"{len(records)} records leave none for {name}; give more, or raise data.{name}_fraction")
    return parts


def prompt_key(conversation: Conversation) -> str:
    """What makes two prompts the same."""
    asked = [part for turn in conversation.turns for part in (turn.instruction, turn.input)]
    return normalized(" ".join(asked), fold_digits=False)


def leaks(parts: Mapping[str, Sequence[Conversation]], split: str) -> dict[str, int]:
    """How many prompts of a split stand in training, too."""
    seen = set(map(prompt_key, parts["train"]))
    return {"prompts": sum(prompt_key(one) in seen for one in parts[split]), "of": len(parts[split])}


def check_slots(template: Template, records: Sequence[Conversation]) -> None:
    """Refuse a template that would leave something of a record out."""
    for one in records:
        if "system" not in template.slots and one.system:
            raise ValueError(f"{one.place} has a system message, but template {template.name} has no {{system}} slot")
        if "input" not in template.slots and any(turn.input for turn in one.turns):
            raise ValueError(f"{one.place} has an input, but template {template.name} has no {{input}} slot")


def check_choices(allowed: Mapping[str, tuple[Any, ...]], **given: Any) -> None:
    """Raise ValueError for a setting that is none of those allowed."""
    for name, value in given.items():
        if value not in allowed[name]:
            words = ", ".join(str(one).lower() for one in allowed[name])
            raise ValueError(f"data.{name}={value!r} must be one of {words}")


def check_numbers(val: float, test: float, max_lost: float, max_length: int | None) -> None:
    """Raise ValueError for fractions or a length that cannot be."""
    if val <= 0 or test <= 0 or val + test >= 1:
        raise ValueError(
            f"data.val_fraction={val} and data.test_fraction={test} must be positive and sum to less than 1"
        )
    if not 0 <= max_lost <= 1:
        raise ValueError(f"data.max_lost={max_lost} must be between 0 and 1")
    if max_length is not None and max_length < 2:
        raise ValueError(f"data.max_length={max_length} must be at least 2")


def refuse_losses(facts: Mapping[str, Any], max_lost: float) -> None:
    """Raise ValueError if more records were dropped, or had an answer cut, than allowed."""
    lost = facts["dropped"] + facts["answers_cut"]
    if lost > max_lost * facts["records"]:
        raise ValueError(
            f"{lost} of {facts['records']} records do not fit into {facts['limit']} tokens ({facts['dropped']} "
            f"dropped, {facts['answers_cut']} answers cut), more than data.max_lost={max_lost:g} allows; "
            "raise model.context_length or data.max_length, or data.max_lost if that is meant"
        )
