"""Where the data of a run come from: the settings that name them, those that exclude each other, and what validation
and test sets of one's own replace. The same for every task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from llm_lightning.data.files.find import PathWords
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.mixture import check_source_name
from llm_lightning.data.records.rows import Source


class OwnSplit(NamedTuple):
    """Where a split comes from that is not cut off from the training data."""

    setting: str
    """that names it, for messages"""
    source: Source


def check_one_source(*, path: PathWords | None, hf_dataset: str | None, mixture: Any = None) -> None:
    """Refuse two settings that both name the training data; `data.name` may be a default, and is no third one."""
    others = [f"data.{key}={value}" for key, value in (("path", path), ("hf_dataset", hf_dataset)) if value is not None]
    given = [*(["data.mixture"] if mixture is not None else []), *others]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given[:2])} are both set; set one of them to null")


def own_splits(
    *,
    val_path: PathWords | None,
    test_path: PathWords | None,
    val_sets: Mapping[str, PathWords | None] | None,
    hub: HubDataset | None,
    hf_val_split: str | None,
    hf_test_split: str | None,
) -> dict[str, OwnSplit]:
    """`val`, `val/<name>` in the order of `val_sets`, and `test`, each where settings name it.

    Args:
        val_sets: a set whose path is null is left out.
        hub: the dataset of the hub whose splits the last two are.

    Raises:
        ValueError: if a split is named twice, or a name cannot be one.
    """
    found = _one_of("val", val_path, hub, hf_val_split)
    for name, path in (val_sets or {}).items():
        check_source_name(name, "data.val_sets")
        if path is not None:
            found[f"val/{name}"] = OwnSplit(f"data.val_sets.{name}", path)
    return found | _one_of("test", test_path, hub, hf_test_split)


def splits_in_order(splits: Iterable[str]) -> list[str]:
    """`train`, `val`, `val/<name>` in the order that they have, `test`."""
    return sorted(
        splits, key=lambda split: ("train", "val", "val/", "test").index(split[:4] if "/" in split else split)
    )


def cut_fractions(own: Mapping[str, OwnSplit], val: float, test: float) -> tuple[float, float]:
    """The shares of validation and test that are cut off from the training data: 0 for a split of one's own.

    Raises:
        ValueError: if a share that counts is not positive, or nothing is left for training.
    """
    shares = {split: share for split, share in (("val", val), ("test", test)) if split not in own}
    if any(share <= 0 for share in shares.values()) or sum(shares.values()) >= 1:
        named = " and ".join(f"data.{split}_fraction={share}" for split, share in shares.items())
        raise ValueError(f"{named} must be positive and sum to less than 1")
    return shares.get("val", 0.0), shares.get("test", 0.0)


@contextmanager
def named_by(setting: str) -> Iterator[None]:
    """Begin the errors of a source with the setting that names it, where that is not the main one."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{setting}: {error}" if setting else str(error)) from None


def _one_of(split: str, path: PathWords | None, hub: HubDataset | None, hub_split: str | None) -> dict[str, OwnSplit]:
    if path is not None and hub_split is not None:
        raise ValueError(
            f"data.{split}_path={path} and data.hf_{split}_split={hub_split} are both set; set one of them to null"
        )
    if path is not None:
        return {split: OwnSplit(f"data.{split}_path", path)}
    if hub_split is None:
        return {}
    if hub is None:
        raise ValueError(f"data.hf_{split}_split={hub_split} is a split of data.hf_dataset, which is null; name it")
    return {split: OwnSplit(f"data.hf_{split}_split", hub._replace(split=hub_split))}
