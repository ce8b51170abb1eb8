"""The splits of a pool of records, and the digest of what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_lightning.data.record_store.pool import Part, Pool
from llm_lightning.data.record_store.records import FORMAT
from llm_lightning.data.splits import SPLITS, grouped_split, joined_groups, numbered, order_split
from llm_lightning.data.templates.conversation import plain_part
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.columns import Writer, key_of, made_once


def split_pool(
    pool: Pool,
    how: str,
    fractions: tuple[float, float],
    seed: int,
    *,
    by_source: bool = False,
    verify: bool = False,
) -> dict[str, Part]:
    """The parts of a pool; made now, or as they were made before.

    Args:
        how: `grouped` (no prompt, and no group of records, appears in two splits) or `order`.
        fractions: of validation and test; 0: there is no such part.
        by_source: the training records source after source, as a mixture takes them.

    Raises:
        ValueError: if a part would be empty.
    """

    def write(writer: Writer) -> dict[str, Any]:
        for split, rows in _split_rows(pool, how, fractions, seed).items():
            writer.column(split, np.int64).extend(rows.tobytes())
        return {}

    folder = cache_dir() / "records" / f"split-{key_of([FORMAT, pool.key, how, fractions, seed])}"
    columns = made_once(folder, write, verify=verify)
    wanted = {"train": True, "val": fractions[0] > 0, "test": fractions[1] > 0}
    rows = {split: columns.mapped(split) for split in SPLITS if wanted[split]}
    if by_source:
        rows["train"] = rows["train"][np.argsort(pool.store_of(rows["train"]), kind="stable")]
    return {split: Part(pool, part) for split, part in rows.items()}


def _split_rows(pool: Pool, how: str, fractions: tuple[float, float], seed: int) -> dict[str, np.ndarray]:
    if how == "order":
        parts = order_split(len(pool), fractions)
    else:
        has_group = np.any(pool.groups, axis=1)
        keys = numbered(pool.prompts)
        if has_group.any():
            keys = joined_groups(numbered(np.where(has_group[:, None], pool.groups, pool.prompts)), keys)
        parts = grouped_split(keys, pool.store_of(np.arange(len(pool))), fractions, seed)
    for name, share in zip(("val", "test"), fractions, strict=True):
        if not share:  # what rounding leaves for it
            parts["train"], parts[name] = np.concatenate([parts["train"], parts[name]]), parts[name][:0]
        elif not len(parts[name]):
            raise ValueError(f"{len(pool)} records leave none for {name}; give more, or raise data.{name}_fraction")
    if not len(parts["train"]):
        raise ValueError(f"{len(pool)} records leave none for train; give more, or lower data.val_fraction")
    return parts


def digest_of(parts: Mapping[str, Part], values: Sequence[Any]) -> str:
    """The sha256 of `json.dumps([{split: [record, ...], ...}, *values])`, of which a part at a time is in memory."""
    digest = hashlib.sha256(b"[{")
    for number, (split, part) in enumerate(parts.items()):
        digest.update(f"{', ' if number else ''}{json.dumps(split)}: [".encode())
        for index, line in enumerate(part.lines()):
            digest.update((b", " if index else b"") + plain_part(line))
        digest.update(b"]")
    digest.update("".join(["}", *(f", {json.dumps(value)}" for value in values), "]"]).encode())
    return digest.hexdigest()
