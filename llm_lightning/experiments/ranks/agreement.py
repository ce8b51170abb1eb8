"""Compare what the processes of a run would do, before the first step: a difference would show as a hang or worse."""

from __future__ import annotations

import hashlib
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_lightning.experiments.run_folder import OWNER, RunFolder
from llm_lightning.experiments.run_records import Settings
from llm_lightning.experiments.settings.nodes import leaves
from llm_lightning.files.data_paths import data_paths, with_data_paths

PACKAGES = ("torch", "lightning", "numpy", "tokenizers", "torchmetrics")
"""Libraries that decide what a step computes."""
MAY_DIFFER = ("init_from", "resume", "run_name", "data.num_workers", "trainer.enable_progress_bar")
"""Settings that one node may have otherwise; digests compare the content of paths."""
SHOWN = 3
"""Maximum number of differences in a message."""
SEES_SECONDS = 30.0
"""Seconds until a network disk shows a file that another node has just written."""
Facts = dict[str, Any]
"""Dotted name -> plain value."""


def facts_of(settings: Settings, run: RunFolder, lineage: Mapping[str, Any]) -> Facts:
    """What this process would compute, and with what."""
    data = with_data_paths(settings["data"], dict.fromkeys(data_paths(settings["data"])))
    facts = {key: value for key, value in leaves({**settings, "data": data}).items() if key not in MAY_DIFFER}
    return {
        **facts,
        "the digest of the data": lineage.get("data"),
        "the digest of the first weights": lineage.get("parent"),
        "the checkpoint to continue from": run.checkpoint.name if run.checkpoint else None,
        "the source code of llm_lightning": source_digest(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def source_digest() -> str:
    """A digest of the package's source code."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def refuse_differences(of_ranks: Sequence[Facts]) -> None:
    """Raise ValueError if processes differ: the names, the values and the ranks, in one line."""
    names = dict.fromkeys(name for facts in of_ranks for name in facts)
    different = [line for name in names if (line := _difference(name, of_ranks))]
    if different:
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ValueError(
            f"the processes of this run disagree: {'; '.join(different[:SHOWN])}{more}; "
            "start all with the same command, code, libraries and data"
        )


def _difference(name: str, of_ranks: Sequence[Facts]) -> str:
    """`seed is 1 on rank 0 and 2 on ranks 1, 3`; empty if all agree."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, facts in enumerate(of_ranks):
        ranks[repr(facts.get(name))].append(rank)
    shown = [f"{value} on rank{'s' * (len(on) > 1)} {', '.join(map(str, on))}" for value, on in ranks.items()]
    return f"{name} is {' and '.join(shown)}" if len(ranks) > 1 else ""


def sees_folder(path: Path, owner: bytes, seconds: float = SEES_SECONDS) -> bool:
    """Whether this process sees the run folder of the first one, whose `owner.json` has the content `owner`."""
    deadline = time.monotonic() + seconds
    while True:
        file = path / OWNER
        if file.is_file() and file.read_bytes() == owner:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def refuse_other_disks(path: Path, sees: Sequence[bool], hosts: Sequence[str]) -> None:
    """Raise ValueError if a process does not see the run folder of the first one."""
    blind = [rank for rank, one in enumerate(sees) if not one]
    if blind:
        raise ValueError(
            f"rank {blind[0]} on {hosts[blind[0]]} does not see the run folder {path} of rank 0 on {hosts[0]}; "
            "set run_name, or hydra.run.dir to a folder on a disk that all nodes share"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
