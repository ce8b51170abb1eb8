"""Settings of lengths, and how much may be cut or dropped before a run is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_lightning.data.record_store.samples import Samples


def lost_of(samples: Mapping[str, Samples[Any]]) -> dict[str, Any]:
    """Facts about each split, and what was cut or dropped in all of them."""
    counts = sum((found.counts for found in samples.values()), Counter[str]())
    lost = {name: counts[name] for name in ("prompts_cut", "answers_cut", "dropped")}
    return {"splits": {split: found.facts for split, found in samples.items()}, **lost}


SOON = 1000
"""Records of which cutting takes a second."""


def check_cut_fraction(facts: Mapping[str, Any], max_cut: float, lengths: np.ndarray) -> None:
    """Raise ValueError if more prompts were cut than allowed."""
    if facts["prompts_cut"] > max_cut * facts["records"]:
        raise ValueError(too_many_cut(facts["prompts_cut"], facts["records"], facts["limit"], max_cut, lengths))


def check_lengths(lengths: np.ndarray, n_records: int, limit: int, max_cut: float, max_dropped: float) -> None:
    """Raise ValueError if more is too long than may be cut or dropped: at once, since cutting takes time.

    Args:
        lengths: tokens of the records that are used.
    """
    n_long = int((lengths > limit + 2).sum())  # the end of an answer may not be scored
    if n_long > max(SOON, (max_cut + max_dropped) * n_records):
        raise ValueError(too_many_cut(n_long, n_records, limit, max_cut, lengths))


def too_many_cut(n_cut: int, n_records: int, limit: int, max_cut: float, lengths: np.ndarray) -> str:
    """The error for prompts that do not fit."""
    return (
        f"{n_cut:,} of {n_records:,} records do not fit into {limit} tokens without a cut in their prompt, more than "
        f"data.max_cut={max_cut:g} allows: {needed(lengths)}, or raise data.max_cut if the cuts are intended"
    )


def check_dropped_fraction(facts: Mapping[str, Any], max_dropped: float, lengths: np.ndarray) -> None:
    """Raise ValueError if more records were dropped, or had an answer cut, than allowed."""
    n_dropped = facts["dropped"] + facts["answers_cut"]
    if n_dropped > max_dropped * facts["records"]:
        raise ValueError(
            f"{n_dropped} of {facts['records']} records do not fit into {facts['limit']} tokens ({facts['dropped']} "
            f"dropped, {facts['answers_cut']} answers cut), more than data.max_dropped={max_dropped:g} allows: "
            f"{needed(lengths)}, or raise data.max_dropped if that is intended"
        )


def needed(lengths: np.ndarray) -> str:
    """How long records are, and the context that holds them."""
    # The last token is only a label.
    half, most, longest = (int(one) - 1 for one in np.quantile(lengths, (0.5, 0.95, 1), method="higher"))
    of_most = f", or to {most} for 95% of them" if most < longest else ""
    return (
        f"half of them need {half} tokens, 95% {most}, the longest {longest}; set model.context_length (and "
        f"data.max_length, if it is set) to {longest}{of_most}"
    )


def check_choices(allowed: Mapping[str, tuple[Any, ...]], **given: Any) -> None:
    """Raise ValueError for a setting that is not allowed."""
    for name, value in given.items():
        if value not in allowed[name]:
            words = ", ".join(str(one).lower() for one in allowed[name])
            raise ValueError(f"data.{name}={value!r} must be one of {words}")


def check_numbers(max_dropped: float, max_cut: float, max_length: int | None) -> None:
    """Raise ValueError for impossible shares or lengths."""
    for name, share in (("max_dropped", max_dropped), ("max_cut", max_cut)):
        if not 0 <= share <= 1:
            raise ValueError(f"data.{name}={share} must be between 0 and 1")
    if max_length is not None and max_length < 2:
        raise ValueError(f"data.max_length={max_length} must be at least 2")
