"""List the runs that led to a checkpoint, the newest first.

Each checkpoint is read and compared with the digest that its descendant recorded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_lightning.cli.arguments import add_checkpoint_argument
from llm_lightning.terminal import say_json, say_lines

SHORT = 12
"""Digits shown of a digest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, with whole digests")


def run(args: argparse.Namespace) -> None:
    for depth, link in enumerate(trace(args.checkpoint)):
        if args.json:
            say_json(link)
        else:
            say_lines([_row(depth, link)])


def trace(name_or_path: str) -> Iterator[dict[str, Any]]:
    """Yield a checkpoint, the checkpoint it started from, and so on.

    `state` of an ancestor: `same` as at the start of its descendant, `changed`, `gone`, `damaged`, or `not read`
    (weights of others that are not on this machine).

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if what is there is damaged or not a GPT.
    """
    link, names = _described(name_or_path)
    seen: set[str | None] = set()
    while True:
        yield link
        if link["parent"] is None or not names or link["digest"] in seen:
            return
        seen.add(link["digest"])
        found = [_ancestor(name, link["parent"]) for name in names]
        link, names = next((one for one in found if one[0]["state"] == "same"), found[0])


def _ancestor(name: str, expected: str) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint at a place where a run may have found its first weights, whose digest was `expected`."""
    from llm_lightning.weights.checkpoint import CheckpointError
    from llm_lightning.weights.releases import RELEASES, is_release

    unread = {"path": name, "task": None, "digest": None, "parent": None, "parent_name": None}
    if is_release(name) and not Path(name).exists():
        pinned = getattr(RELEASES.get(name), "sha256", None)  # reading them could start a download
        state = "not read" if pinned is None else "same" if pinned == expected else "changed"
        return {**unread, "digest": pinned or expected, "state": state}, []
    try:
        found, names = _described(name)
    except FileNotFoundError:
        return {**unread, "digest": expected, "state": "gone"}, []
    except CheckpointError:
        return {**unread, "digest": expected, "state": "damaged"}, []
    return {**found, "state": "same" if found["digest"] == expected else "changed"}, names


def _described(name_or_path: str) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint, and the possible places of its parent."""
    from llm_lightning.files.places import parent_names
    from llm_lightning.weights.checkpoint import read_header
    from llm_lightning.weights.load import load_model, resolve

    path = resolve(name_or_path)
    header = load_model(name_or_path).header if path is None else read_header(path)
    lineage, settings, metrics = header.get("lineage", {}), header.get("config", {}), header.get("metrics", {})
    monitor = settings.get("monitor")
    link = {
        "path": str(path or name_or_path),
        "state": "same",
        "task": header["task"] if path is not None else None,
        "step": header.get("step"),
        "monitor": monitor,
        "value": metrics.get(monitor),
        "lora": bool(header.get("lora")),
        "data": lineage.get("data"),
        "digest": header.get("digest"),
        "parent": lineage.get("parent"),
        "parent_name": lineage.get("parent_name"),
    }
    return link, parent_names(header, path)


def _row(depth: int, link: dict[str, Any]) -> str:
    task = (link["task"] or "weights") + (" (lora)" if link.get("lora") else "")
    facts = [f"{task:<16}"]
    facts += [f"{link['step']:,} steps"] if link.get("step") is not None else []
    facts += [f"{link['monitor']} {link['value']:.4f}"] if link.get("value") is not None else []
    facts += [f"data {link['data'][:SHORT]}"] if link.get("data") else []
    facts += [f"weights {link['digest'][:SHORT]}"] if link["digest"] else []
    note = {"same": "", "changed": " (changed since)"}.get(link["state"], f" ({link['state']})")
    return f"{'   ' * (depth - 1) + '└─ ' if depth else ''}{'  '.join(facts)}  {_shown(link['path'])}{note}"


def _shown(path: str) -> str:
    """Relative to the current folder, if it is below."""
    inside = Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if inside else path
